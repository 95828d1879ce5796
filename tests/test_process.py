"""The command as a process: what it imports, the threads that wait, the memory that it keeps, its log."""

import importlib
import os
import platform
import subprocess
import sys
from itertools import count
from types import SimpleNamespace

import pytest

import dnas.cli
from dnas.runtime import progress


def test_a_log_has_a_line_now_and_then(monkeypatch, capsys):
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=count(step=25).__next__))  # seconds
    with progress.progress_bar("searching", 9) as advance:
        for _ in range(9):
            advance("1M alive")
    assert capsys.readouterr().out.splitlines() == [f"searching 1M alive: {k} of 9" for k in (3, 6, 9)]


def test_threads_that_wait_let_others_run(monkeypatch):
    for given, told in (({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)):
        for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
            monkeypatch.delenv(name, raising=False)
        for name, value in given.items():
            monkeypatch.setenv(name, value)
        importlib.reload(dnas.cli)
        assert os.environ.get("GOMP_SPINCOUNT") == told


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = sys.modules["timm"] = None  # to import them is an error
from dnas import cli
for name in cli.COMMANDS:
    for words in (["--help"], [name, "--help"], [name, "--bugdet", "1M"], [name, "--resume", "no/run"]):
        sys.argv = ["dnas", *words]
        try:
            cli.main()
        except SystemExit as stop:
            print(words, stop.code, file=sys.stderr)
"""


def test_flags_are_read_before_torch_is_imported():
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = done.stderr.splitlines()
    for name in dnas.cli.COMMANDS:
        assert f"usage: dnas {name}" in done.stdout
        wrong = said.index(f"{[name, '--bugdet', '1M']} 2")
        assert said[wrong - 1].startswith("error: unknown argument '--bugdet'"), said
        assert f"{[name, '--help']} 0" in said and f"{[name, '--resume', 'no/run']} 2" in said
    assert "error: --resume 'no/run': expected a run folder, which has a config.json" in said


def test_python_m_dnas_is_the_command():
    done = subprocess.run([sys.executable, "-m", "dnas", "nothing"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: command 'nothing' is not one of search, ")


FAULTS = """
import resource, sys
from dnas.cli import process

def page_faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        bytearray(b"x") * 2**26
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

fresh = page_faults()
process.keep_freed_memory()
page_faults()  # the first round takes the memory that the second is to find
print(fresh, page_faults())
"""


# Meant: other C libraries have no such setting, and `keep_freed_memory` does nothing there.
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
def test_freed_memory_is_kept():
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    fresh, kept = map(int, done.stdout.split())
    assert kept < fresh / 10
