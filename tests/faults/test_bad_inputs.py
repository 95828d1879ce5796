"""Wrong flags and folders, made by hand and by hypothesis: one line, exit code 2, and nothing written."""

import io
import json
import sys

import pytest
import torch
from commands import call, export_tool, profile_tool, retrain_tool, search_tool, trust
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dnas.runtime.checkpoint import FORMAT, LAST, write_checkpoint
from dnas.runtime.signals import stop
from dnas.spec.checks import MAX_BYTES

TOY = [
    "--supernet",
    "toy",
    "--width-mult",
    "1",
    "--img-size",
    "8",
    "-b",
    "128",
    "--search-epochs",
    "2",
    "--epochs",
    "1",
]


def refused(tool, monkeypatch, capsys, tmp_path, *args, quoted=""):
    """Exit code 2, a line on stderr, and the folder as it was."""
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    monkeypatch.chdir(tmp_path)
    code, said = call(tool, monkeypatch, *args), capsys.readouterr().err
    assert code == 2 and said.startswith("error: ") and said.count("\n") == 1, (code, said)
    assert quoted in said
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


CONFIGS = [
    ("", "does not tell"),
    ("[]", "does not tell"),
    ("{}", "does not tell"),
    ('{"argv": null}', "does not tell"),
    ('{"argv": "--budget 50%"}', "does not tell"),
    ('{"argv": [1]}', "does not tell"),
    ('{"argv": [["--budget"]]}', "does not tell"),
    ('{"argv": [], "argv": []}', "does not tell"),
    ('{"argv": []}', "--budget --sweep"),
    ('{"argv": ["--budget", "50%", "--nonsense"]}', "--nonsense"),
    ('{"argv": ["--budget", "50%", "--dry-run"]}', "is of a dry run"),
    ('{"argv": ["--resume", "x"]}', "is of no run"),
    ('{"argv": ["--sweep", "50%,60%"]}', "one budget of a sweep"),
    ('{"argv": ["--budget", "50%", "--supernet", "__import__"]}', "__import__"),
    ('{"argv": ["--budget", "50%"], "x": NaN}', "does not tell"),
    ('{"argv": ' + "[" * 5000 + "]" * 5000 + "}", "does not tell"),
    ('{"argv": ["' + "x" * MAX_BYTES + '"]}', "does not tell"),
]


@pytest.mark.parametrize("content, quoted", CONFIGS, ids=range(len(CONFIGS)))
def test_a_config_that_is_none(content, quoted, tmp_path, monkeypatch, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(content)
    refused(search_tool, monkeypatch, capsys, tmp_path, "--resume", "run", quoted=quoted)


@pytest.mark.parametrize("args, quoted", [
    (["--resume", "nowhere"], "'nowhere'"),
    (["--resume", ""], "''"),
    (["--resume"], "--resume"),
    (["--resume", "run", "--budget", "50%"], "not allowed with"),
    (["--resume", "run", "--lr", "0.1"], "none are expected here"),
    (["--lr", "0.1", "--resume", "run"], "none are expected here"),
    (["--resume=run", "-b", "3"], "none are expected here"),
    (["--budget", "50%", "--checkpoint-every", "-1"], "'-1'"),
    (["--budget", "50%", "--checkpoint-every", "nan"], "'nan'"),
    (["--budget", "50%", "--checkpoint-every", "often"], "'often'"),
])  # fmt: skip
def test_flags_of_resuming(args, quoted, tmp_path, monkeypatch, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps({"argv": ["--budget", "50%", *TOY]}))
    refused(search_tool, monkeypatch, capsys, tmp_path, *args, quoted=quoted)


CHECKPOINTS = [
    (b"", "no checkpoint"),
    (b"PK\x03\x04", "no checkpoint"),
    (b"\x80\x04cos\nsystem\n(S'true'\ntR.", "no checkpoint"),
    ({}, "no checkpoint"),
    ({"format": 1, "sha256": "", "content": torch.zeros(1, dtype=torch.uint8)}, "its format is 1"),
    ({"format": FORMAT, "sha256": "", "content": torch.zeros(9, dtype=torch.uint8)}, "its checksum is wrong"),
    ({"format": FORMAT, "sha256": "", "content": None}, "no checkpoint"),
    ([1], "no checkpoint"),
]


@pytest.mark.parametrize("content, quoted", CHECKPOINTS, ids=range(len(CHECKPOINTS)))
def test_a_checkpoint_that_is_none(content, quoted, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"argv": ["--budget", "50%", *TOY]}))
    if isinstance(content, bytes):
        (run / LAST).write_bytes(content)
    else:
        torch.save(content, run / LAST)
    refused(search_tool, monkeypatch, capsys, tmp_path, "--resume", "run", quoted=quoted)


STATES = [
    [], 1, {"done": {}}, {"done": [], "under_way": {}}, {"done": {}, "under_way": {"what": "search"}},
    {"done": {}, "under_way": {"what": "search", "state": {}, "random": {}}},
    {"done": {"search": {}}, "under_way": {}},
    {"done": {"search": {"nets": {"found": {"arch": {"stem": 3}, "costs": {}}}}}, "under_way": {}},
]  # fmt: skip


@pytest.mark.parametrize("content", STATES, ids=range(len(STATES)))
def test_a_checkpoint_of_something_else(content, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"argv": ["--budget", "50%", *TOY]}))
    write_checkpoint(run, content)
    refused(search_tool, monkeypatch, capsys, tmp_path, "--resume", "run", quoted="checkpoint")


NUMBERS = ["-1", "nan", "inf", "-inf", "1e999", "", "x", "1,5", "0x10", "--", "٣"]
FLAGS = [
    "--search-epochs", "--epochs", "--batch-size", "--lr", "--weight-decay", "--warmup", "--gate-every", "--gate-lr",
    "--gate-fraction", "--paths", "--budget-weight", "--budget-from", "--budget-by", "--temperature", "--width-below",
    "--patience", "--skip-at", "--skip-from", "--seed", "--divisor", "--width-mult", "--img-size", "--in-chans",
    "--num-classes", "--smoothing", "--mixup", "--drop", "--drop-path", "--model-ema-decay", "--clip-grad", "--min-lr",
    "--prior", "--num-random", "--checkpoint-every", "--block-from", "--block-by", "--warmup-epochs",
]  # fmt: skip


@pytest.mark.parametrize("flag", FLAGS)
def test_numbers_that_are_none(flag, tmp_path, trusted, monkeypatch, capsys):
    """Every number flag with every such text; what it takes after all is a number that it may be."""
    taken = []
    for text in NUMBERS:
        out = tmp_path / "run"
        code = call(search_tool, monkeypatch, *TOY, "--budget", "50%", "--dry-run", "--output", out, f"{flag}={text}")
        said = capsys.readouterr().err
        if code == 0:
            taken.append(text)
            for path in out.iterdir():
                path.unlink()
            out.rmdir()
            continue
        assert code == 2 and said.startswith("error: ") and said.count("\n") == 1, (text, code, said)
        assert not out.exists()
    assert {*taken} <= {"٣"}, taken  # Python reads it as 3


BUDGETS = st.one_of(
    st.text(max_size=12),
    st.builds(
        lambda number, unit, more: number + unit + more,
        st.sampled_from(["", "0", "-1", "1", "50", "1e3", "nan", "inf", "1e999", "1.5.2", "0.0", "9" * 400]),
        st.sampled_from(["", "%", "MFLOPs", "GMACs", "MParams", "ms", "kB", "flops", "M", "µs"]),
        st.sampled_from(["", ",", ",50%", ",50%,50%", " ", ";", "\n"]),
    ),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[*HealthCheck])
@given(budget=BUDGETS)
def test_budgets(budget, tmp_path_factory):
    """A text is a budget that a net is found for, or refused."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        trust(monkeypatch)
        told = io.StringIO()
        monkeypatch.setattr(sys, "stderr", told)
        out = tmp_path_factory.mktemp("budget") / "run"
        code = call(search_tool, monkeypatch, *TOY, f"--budget={budget}", "--dry-run", "--output", out)
        if code == 0:
            rows = json.loads((out / "arch.json").read_text())["budget"]
            assert rows and all(0 < row["reached"] <= row["limit"] for row in rows)
        else:
            line = told.getvalue()
            assert code == 2 and line.startswith("error: ") and line.count("\n") == 1, (budget, line)
            assert not out.exists()


@pytest.mark.parametrize("tool, args", [
    (retrain_tool, []), (retrain_tool, ["nowhere"]), (retrain_tool, ["nowhere", "--output", "x"]),
    (retrain_tool, ["--output", "x"]), (retrain_tool, ["--resume", "nowhere"]), (retrain_tool, ["a", "b"]),
    (export_tool, []), (export_tool, ["nowhere"]), (export_tool, ["nowhere", "--check"]),
    (export_tool, ["nowhere", "--output", "x"]), (profile_tool, []), (profile_tool, ["--check", "nowhere"]),
    (profile_tool, ["--supernet", "prunet"]), (profile_tool, ["--supernet", "none", "--out", "x.json"]),
    (profile_tool, ["--model", "no_such_model", "--out", "x.json"]),
    (search_tool, ["--budget", "50%", "--model", "no_such_model"]),
    (search_tool, ["--budget", "50%", "--model", "../x"]),
    (search_tool, ["--budget", "50%", "--model", "vit_tiny_patch16_224", "--model-kwargs", "img_size=abc"]),
    (search_tool, ["--budget", "50%", "--data-dir", "nowhere"]),
    (search_tool, ["--budget", "50%", "--dataset", "torch/none", "--data-dir", "."]),
    (search_tool, ["--budget", "50%", "--initial-checkpoint", "nowhere", "--model", "resnet18"]),
    (search_tool, ["--budget", "50%", "--latency-table", "nowhere"]),
    (search_tool, ["--budget", "5ms"]), (search_tool, ["--budget", "50%", "--name", "os.system"]),
    (search_tool, ["--budget", "50%", "--name", "a\nb"]), (search_tool, ["--budget", "50%", "--name", "resnet18"]),
    (search_tool, ["--budget", "50%", "--opt", "none"]), (search_tool, ["--budget", "50%", "--sched", "none"]),
    (search_tool, ["--budget", "50%", "--device", "none"]), (search_tool, ["--budget", "50%", "--weights-on", "x"]),
])  # fmt: skip
def test_tools(tool, args, tmp_path, monkeypatch, capsys):
    refused(tool, monkeypatch, capsys, tmp_path, *args)


def test_stop_is_as_it_was(monkeypatch):
    """After all these calls no signal is waiting."""
    assert stop.asked() == 0
