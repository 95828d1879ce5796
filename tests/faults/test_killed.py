"""Runs that are killed at any moment go on, and end with the very bits of a run that was left alone."""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from itertools import count
from pathlib import Path

import pytest
import torch
from forks import FORKS

from dnas import cli
from dnas.runtime.run_folder import run_folder

ROOT = Path(__file__).resolve().parents[2]
SEARCH = ["--supernet", "toy", "--width-mult", "1", "--search-epochs", "5", "--epochs", "2", "--img-size", "8"]
SEARCH += ["-b", "96", "--budget", "40%", "--num-random", "1", "--name", "found", "--checkpoint-every", "0"]
RANK = [*SEARCH, "--method", "l1"]
RETRAIN = ["--epochs", "6", "-b", "64", "--model-ema-decay", "0.9", "--mixup", "0.2", "--drop", "0.1"]
RETRAIN += ["--checkpoint-every", "0"]
ONE_THREAD = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
COMMAND = {"search": "search", "rank": "search", "retrain": "retrain"}


def forked(tool, args, said, killed_at):
    """A tool in this process; killed in place of the n-th call of a function of os that a checkpoint is written by."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(said, os.O_WRONLY), 2)
    if killed_at:
        name, at = killed_at.split(":")
        real, calls = getattr(os, name), count(1)

        def call(*given, **named):
            if next(calls) == int(at):
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*given, **named)

        setattr(os, name, call)
    sys.argv = [tool, *args]
    cli.command(COMMAND[tool])


def start(tool, *args, killed_at=""):
    said = tempfile.NamedTemporaryFile("r")  # noqa: SIM115  its name is given away; it goes with the process
    process = FORKS.Process(target=forked, args=(tool, [*map(str, args)], said.name, killed_at), daemon=True)
    process.start()
    process.said = said
    return process


def end(process):
    """(exit code, what it said)"""
    process.join(300)
    assert process.exitcode is not None
    return process.exitcode, process.said.read()


def finish(tool, run):
    code, said = end(start(tool, "--resume", run))
    assert code == 0, said


def timeless(value):
    if isinstance(value, dict):
        timed = ("seconds", "peak_memory_mb", "relative_cost")
        return {k: timeless(v) for k, v in value.items() if k not in timed and not k.endswith("_ms")}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def check_same(run, whole):
    """The same files, those with times in them but for those, and nothing else left."""
    assert sorted(p.name for p in run.iterdir()) == sorted(p.name for p in whole.iterdir())
    for name in ("arch.json", "model.py", "model.safetensors"):
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name
    one, other = (timeless(json.loads((r / "metrics.json").read_text())) for r in (run, whole))
    assert one == other
    if (whole / "history.jsonl").exists():
        rows, wanted = ([*map(json.loads, (r / "history.jsonl").read_text().splitlines())] for r in (run, whole))
        assert [row["step"] for row in rows] == [*range(len(wanted))] and timeless(rows) == timeless(wanted)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Tool -> (its flags, what a run that was left alone ended with, in a Python with another order of sets)."""
    folder = tmp_path_factory.mktemp("whole")
    searched, ranked, retrained = folder / "search", folder / "rank", folder / "retrain"
    runs = {"search": (SEARCH, searched), "rank": (RANK, ranked), "retrain": ([searched, *RETRAIN], retrained)}
    for tool, (flags, run) in runs.items():
        command = [
            sys.executable,
            ROOT / "tools" / f"{'search' if tool == 'rank' else tool}.py",
            *flags,
            "--output",
            run,
        ]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | ONE_THREAD)
        assert (done.returncode, done.stderr) == (0, "")
    return runs


@pytest.mark.parametrize("tool, moments", [
    ("search", ["fsync:1", "replace:8", "fsync:41"]),
    ("rank", ["fsync:2", "replace:31"]),
    ("retrain", ["replace:5", "fsync:30"]),
])  # fmt: skip
def test_killed_while_a_file_is_written(tool, moments, whole, tmp_path):
    """Before any checkpoint, with a new file written but not named, between the two renames of a checkpoint."""
    flags, wanted = whole[tool]
    run = tmp_path / "run"
    for moment in moments:
        given = ("--resume", run) if (run / "config.json").exists() else (*flags, "--output", run)
        assert end(start(tool, *given, killed_at=moment))[0] == -signal.SIGKILL
    finish(tool, run)
    check_same(run, wanted)


def wait_for(process, path, rows):
    while not (path.exists() and len(path.read_text().splitlines()) >= rows):
        assert process.exitcode is None, end(process)
        time.sleep(0.01)


def test_a_signal_stops_between_steps_and_a_folder_has_one_writer(whole, tmp_path):
    flags, wanted = whole["search"]
    run = tmp_path / "run"
    process = start("search", *flags, "--output", run, "--checkpoint-every", "1000")
    wait_for(process, run / "history.jsonl", 10)
    os.kill(process.pid, signal.SIGTERM)
    assert end(process) == (143, f"stopped: --resume {run} goes on from here\n")
    with run_folder(run):
        code, said = end(start("search", "--resume", run))
    assert code == 2 and "another process" in said and said.count("\n") == 1
    for sent in (signal.SIGINT, signal.SIGHUP):  # Ctrl-C, a terminal that is gone
        steps = len((run / "history.jsonl").read_text().splitlines())
        process = start("search", "--resume", run)
        wait_for(process, run / "history.jsonl", steps + 10)
        os.kill(process.pid, sent)
        assert end(process)[0] == 128 + sent
    damaged = bytearray((run / "checkpoint.pt").read_bytes())
    damaged[len(damaged) // 2] ^= 255
    (run / "checkpoint.pt").write_bytes(damaged)
    finish("search", run)
    check_same(run, wanted)


@pytest.mark.faults
@pytest.mark.parametrize("tool, kills", [("search", 18), ("rank", 12), ("retrain", 12)])
def test_killed_at_random_moments(tool, kills, whole, tmp_path):
    flags, wanted = whole[tool]
    rng, done, runs = random.Random(0), 0, 0
    while done < kills:
        run = tmp_path / str(runs)
        while done < kills:
            begun = (run / "config.json").exists()
            process = start(tool, *(("--resume", run) if begun else (*flags, "--output", run)))
            process.join(rng.uniform(0.5, 8))
            if process.exitcode is None:
                process.kill()
                done += 1
            if end(process)[0] == 0:
                break
        if (run / "config.json").exists():
            finish(tool, run)
            check_same(run, wanted)
        runs += 1
    print(f"{tool}: {done} kills, {runs} runs")
