"""Runs that are killed at any moment go on, and end with the very bits of a run that was left alone."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dnas.runs import run_folder

ROOT = Path(__file__).resolve().parents[2]
SEARCH = ["--supernet", "toy", "--width-mult", "1", "--search-epochs", "5", "--epochs", "2", "--img-size", "8"]
SEARCH += ["-b", "96", "--budget", "40%", "--num-random", "1", "--name", "found", "--checkpoint-every", "0"]
RETRAIN = ["--epochs", "6", "-b", "64", "--model-ema-decay", "0.9", "--mixup", "0.2", "--drop", "0.1"]
RETRAIN += ["--checkpoint-every", "0"]

# Calls a tool, and kills it in place of the n-th call of a function of os: those that a checkpoint is written by.
KILLED = """
import os, runpy, signal, sys
name, _, at = sys.argv[1].partition(":")
real, left = getattr(os, name), int(at)
def call(*args, **kwargs):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kwargs)
setattr(os, name, call)
sys.argv = sys.argv[2:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def start(tool, *args, killed_at=""):
    command = [sys.executable, *(["-c", KILLED, killed_at] if killed_at else []), ROOT / "tools" / f"{tool}.py"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.Popen([*command, *map(str, args)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=env)


def end(process):
    """(exit code, what it said)"""
    said = process.communicate(timeout=300)[1].decode()
    return process.returncode, said


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
    """Tool -> (its flags, what a run that was left alone ended with)."""
    folder = tmp_path_factory.mktemp("whole")
    searched, retrained = folder / "search", folder / "retrain"
    assert end(start("search", *SEARCH, "--output", searched)) == (0, "")
    assert end(start("retrain", searched, *RETRAIN, "--output", retrained)) == (0, "")
    return {"search": (SEARCH, searched), "retrain": ([searched, *RETRAIN], retrained)}


@pytest.mark.parametrize("tool, moments", [
    ("search", ["fsync:1", "fsync:2", "replace:8", "fsync:41", "replace:103"]),
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
        assert process.poll() is None, end(process)
        time.sleep(0.01)


def test_a_signal_stops_between_steps_and_a_folder_has_one_writer(whole, tmp_path):
    flags, wanted = whole["search"]
    run = tmp_path / "run"
    process = start("search", *flags, "--output", run, "--checkpoint-every", "1000")
    wait_for(process, run / "history.jsonl", 10)
    process.send_signal(signal.SIGTERM)
    assert end(process) == (143, f"stopped: --resume {run} goes on from here\n")
    with run_folder(run):
        code, said = end(start("search", "--resume", run))
    assert code == 2 and "another process" in said and said.count("\n") == 1
    steps = len((run / "history.jsonl").read_text().splitlines())
    process = start("search", "--resume", run)
    wait_for(process, run / "history.jsonl", steps + 10)
    process.send_signal(signal.SIGINT)
    assert end(process)[0] == 130
    damaged = bytearray((run / "checkpoint.pt").read_bytes())
    damaged[len(damaged) // 2] ^= 255
    (run / "checkpoint.pt").write_bytes(damaged)
    finish("search", run)
    check_same(run, wanted)


@pytest.mark.faults
@pytest.mark.parametrize("tool, kills", [("search", 18), ("retrain", 12)])
def test_killed_at_random_moments(tool, kills, whole, tmp_path):
    flags, wanted = whole[tool]
    rng, done, runs = random.Random(0), 0, 0
    while done < kills:
        run = tmp_path / str(runs)
        while done < kills:
            begun = (run / "config.json").exists()
            process = start(tool, *(("--resume", run) if begun else (*flags, "--output", run)))
            try:
                process.wait(rng.uniform(2, 14))
            except subprocess.TimeoutExpired:
                process.kill()
                done += 1
            if end(process)[0] == 0:
                break
        if (run / "config.json").exists():
            finish(tool, run)
            check_same(run, wanted)
        runs += 1
    print(f"{tool}: {done} kills, {runs} runs")
