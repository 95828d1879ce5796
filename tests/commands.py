"""The tools, called in this process, and what must hold when they refuse something."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))
import cli  # noqa: E402
import compare as compare_tool  # noqa: E402, F401
import export as export_tool  # noqa: E402, F401
import goal  # noqa: E402, F401
import profile_latency as profile_tool  # noqa: E402, F401
import retrain as retrain_tool  # noqa: E402, F401
import search as search_tool  # noqa: E402, F401


def call(tool, monkeypatch, *args):
    """Exit code of a tool, run in this process."""
    monkeypatch.setattr(sys, "argv", ["tool", *map(str, args)])
    try:
        cli.run(tool.main)
    except SystemExit as stop:
        return stop.code
    return 0


def trust(patch):
    """Let no tool verify what it exports: each time a process imports torch and timm anew. Returns the folders."""
    folders = []
    for tool in (goal, retrain_tool):
        patch.setattr(tool, "verify_export", folders.append)
    return folders


def check_refused(code, capsys, quoted):
    captured = capsys.readouterr()
    assert code == 2, captured.err
    assert quoted in captured.err
    assert captured.err.count("\n") == 1, captured.err
