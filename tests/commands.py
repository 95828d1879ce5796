"""The commands, called in this process, and what must hold when they refuse something."""

import sys

from dnas import cli, workflow
from dnas.cli import compare as compare_tool  # noqa: F401
from dnas.cli import export as export_tool  # noqa: F401
from dnas.cli import profile as profile_tool  # noqa: F401
from dnas.cli import rehearsal
from dnas.cli import retrain as retrain_tool
from dnas.cli import search as search_tool  # noqa: F401


def call(tool, monkeypatch, *args):
    """Exit code of a command, run in this process."""
    monkeypatch.setattr(sys, "argv", ["tool", *map(str, args)])
    try:
        cli.command(tool.__name__.rpartition(".")[2])
    except SystemExit as stop:
        return stop.code
    return 0


def trust(patch):
    """Let no tool verify what it exports: each time a process imports torch and timm anew. Returns the folders."""
    folders = []
    for tool in (workflow, retrain_tool):
        patch.setattr(tool, "verify_export", folders.append)
    patch.setattr(rehearsal, "verify_export", lambda folder: None)
    return folders


def check_refused(code, capsys, quoted):
    captured = capsys.readouterr()
    assert code == 2, captured.err
    assert quoted in captured.err
    assert captured.err.count("\n") == 1, captured.err
