"""Several budgets after one warm-up: each run is the one that its budget alone would give."""

import json

import pytest
from commands import call, check_refused, search_tool, workflow

from dnas.runtime.checkpoint import Stopped
from dnas.runtime.signals import stop

pytestmark = pytest.mark.usefixtures("trusted")
SHORT = ("--supernet", "toy", "--width-mult", 1, "--search-epochs", 3, "--epochs", 1, "--img-size", 8, "-b", 128)


def untimed(run):
    rows = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.endswith("_ms")} for row in rows]


def test_each_net_of_a_sweep_is_that_of_its_budget(tmp_path, monkeypatch, capsys):
    """Stopped in the trainings of the second budget, and resumed: the first is whole, the third has not begun."""
    sweep, trained = ("--sweep", "30%,50%,70%", "--output", tmp_path / "sweep"), []

    def train_arch(*given):
        trained.append(given)
        if len(trained) == 4:
            raise Stopped(15)
        return real(*given)

    real = workflow.train_arch
    with monkeypatch.context() as stopped:
        stopped.setattr(workflow, "train_arch", train_arch)
        assert call(search_tool, stopped, *SHORT, *sweep) == 143
    assert capsys.readouterr().err == "stopped\n"
    assert sorted(path.name for path in (tmp_path / "sweep").iterdir()) == ["30pc", "50pc"]
    check_refused(call(search_tool, monkeypatch, "--resume", tmp_path / "sweep/50pc"), capsys, "one budget of a sweep")
    assert call(search_tool, monkeypatch, "--resume", tmp_path / "sweep") == 0
    assert sorted(path.name for path in (tmp_path / "sweep").iterdir()) == ["30pc", "50pc", "70pc"]
    for budget in (30, 70):
        alone, own = tmp_path / str(budget), tmp_path / f"sweep/{budget}pc"
        assert call(search_tool, monkeypatch, *SHORT, "--budget", f"{budget}%", "--output", alone) == 0
        one, other = (json.loads((run / "arch.json").read_text()) for run in (alone, own))
        assert one["net"] == other["net"] and other["name"] == f"dnas_sweep_{budget}pc"
        assert untimed(alone) == untimed(own)
        one, other = (json.loads((run / "metrics.json").read_text()) for run in (alone, own))
        assert one["found"]["top1"] == other["found"]["top1"] and one["uniform"]["loss"] == other["uniform"]["loss"]


def test_a_stopped_sweep_says_how_it_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(stop, "asked", lambda: 15)
    sweep = ("--sweep", "30%,50%", "--output", tmp_path / "sweep")
    assert call(search_tool, monkeypatch, *SHORT, *sweep) == 143
    assert f"--resume {tmp_path / 'sweep'} goes on" in capsys.readouterr().err
    assert (tmp_path / "sweep/30pc/checkpoint.pt").exists()


def test_a_dry_run_of_a_sweep(tmp_path, monkeypatch, capsys):
    sweep = ("--sweep", "1MFLOPs,500kFLOPs", "--output", tmp_path / "sweep", "--name", "mine", "--dry-run")
    assert call(search_tool, monkeypatch, *SHORT[4:], *sweep) == 0
    documents = [json.loads(path.read_text()) for path in sorted((tmp_path / "sweep").glob("*/arch.json"))]
    assert sorted(document["name"] for document in documents) == ["mine_1mflops", "mine_500kflops"]
    assert all(0.98 <= d["macs"] / d["budget"][0]["limit"] <= 1 for d in documents)


@pytest.mark.parametrize(
    "flags, quoted",
    [
        (("--sweep", "30%,2MParams"), "--sweep '30%,2MParams': budgets of one kind"),
        (("--sweep", "30%,30%"), "--sweep '30%,30%': budgets of one kind are expected, each once"),
        (("--sweep", "30%,"), "budget ''"),
        (("--sweep", "30%", "--budget", "30%"), "not allowed with"),
        ((), "--budget --sweep"),
        (("--sweep", "30%,0.001%"), "out of reach"),
    ],
)
def test_what_a_sweep_refuses(flags, quoted, tmp_path, monkeypatch, capsys):
    code = call(search_tool, monkeypatch, *SHORT, *flags, "--output", tmp_path / "run")
    check_refused(code, capsys, quoted)
    assert not (tmp_path / "run").exists()
