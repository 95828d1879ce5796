"""A machine that fails: one line that says what to do, and a run that can go on."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from commands import call, retrain_tool, search_tool, workflow

pytestmark = pytest.mark.usefixtures("trusted")
TOOLS = Path(__file__).resolve().parents[2] / "tools"
FLAGS = ("--supernet", "toy", "--width-mult", 1, "--search-epochs", 2, "--epochs", 1, "--img-size", 8, "-b", 128)
FLAGS += ("--budget", "40%", "--checkpoint-every", 0)


def one_line(capsys, *quoted):
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and all(part in said for part in quoted), said


def test_a_full_disk(tmp_path, monkeypatch, capsys):
    """It fills up while checkpoints are written, and is emptied."""
    real, left = os.fsync, 12

    def fsync(fd):
        nonlocal left
        left -= 1
        if left <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(fd)

    run = tmp_path / "run"
    with monkeypatch.context() as context:
        context.setattr(os, "fsync", fsync)
        assert call(search_tool, context, *FLAGS, "--output", run) == 1
    one_line(capsys, "no space is left")
    assert (run / "checkpoint.pt").exists() and not [*run.glob(".*.tmp")]
    assert call(search_tool, monkeypatch, "--resume", run) == 0
    rows = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [*range(len(rows))]


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB\nmore lines"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:118] . DefaultCPUAllocator: can't allocate memory: you tried"),
    MemoryError(),
])  # fmt: skip
def test_out_of_memory(error, tmp_path, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(workflow, "run", fail)
    assert call(search_tool, monkeypatch, *FLAGS, "--output", tmp_path / "run") == 1
    one_line(capsys, "out of memory", "--batch-size", "--img-size", "--width-mult")
    assert not (tmp_path / "run").exists()


def test_any_other_error_is_no_line_but_a_traceback(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr(workflow, "run", fail)
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        call(search_tool, monkeypatch, *FLAGS, "--output", tmp_path / "run")


def workers_of(pid):
    """The processes that a process has started and that read images: they have its command line."""
    own = Path(f"/proc/{pid}/cmdline").read_bytes()
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(c) for c in children if Path(f"/proc/{c}/cmdline").read_bytes() == own]


# Meant: which processes read images can be asked without another package on Linux only; the code is the same elsewhere.
@pytest.mark.skipif(
    not Path(f"/proc/self/task/{os.getpid()}/children").exists(), reason="Linux tells the children of a process there"
)
def test_a_process_that_reads_images_dies(image_folder, tmp_path):
    flags = ("--budget", "50%", "--data-dir", image_folder, "--img-size", 16, "-b", 4, "--search-epochs", 300, "-j", 1)
    command = [sys.executable, TOOLS / "search.py", *flags, "--supernet", "toy", "--output", tmp_path / "run"]
    process = subprocess.Popen([*map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    history, deadline = tmp_path / "run" / "history.jsonl", time.monotonic() + 120
    while not (history.exists() and history.read_text().count("\n") > 3):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)
    while not (workers := workers_of(process.pid)):
        assert process.poll() is None and time.monotonic() < deadline
    os.kill(workers[0], signal.SIGKILL)
    said = process.communicate(timeout=120)[1].splitlines()
    assert process.returncode == 1 and "a process that reads images has died" in said[-1], said


def test_retraining_goes_on(tmp_path, monkeypatch, capsys):
    run, out = tmp_path / "run", tmp_path / "again"
    assert call(search_tool, monkeypatch, *FLAGS, "--output", run) == 0
    assert call(retrain_tool, monkeypatch, "--resume", out) == 2
    one_line(capsys, f"--resume {str(out)!r}", "config.json")
    assert call(retrain_tool, monkeypatch, run, "--epochs", 1, "--output", out) == 0
    capsys.readouterr()
    assert call(retrain_tool, monkeypatch, "--resume", out) == 0  # complete: it says so once more
    assert "top-1" in capsys.readouterr().out
    assert call(search_tool, monkeypatch, "--resume", out) == 2
    one_line(capsys)
