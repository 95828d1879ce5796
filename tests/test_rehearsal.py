"""What can only fail after a search fails before it; and what fails after it all the same costs nothing of it."""

import json
import random
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from commands import call, check_refused, search_tool

from dnas.cli import rehearsal
from dnas.cli.search import introduce
from dnas.nets.timm_space import TimmBase
from dnas.nets.timm_supernet import TimmSupernet
from dnas.spec.cost import CostTable
from dnas.training.batches import Data, in_memory
from dnas.training.data import load_data

SHORT = ("--supernet", "toy", "--img-size", 8, "--budget", "50%", "--search-epochs", 2, "--epochs", 1, "-b", 256)


def planted(*_args, **_more):
    raise ArithmeticError("planted")


STAGES = {
    "build": "dnas.plan.build_net",
    "count": "dnas.plan.count_macs",
    "export": "dnas.plan.write_export",
    "train": "dnas.training.from_scratch.train",
    "evaluate": "dnas.training.from_scratch.evaluate",
    "load": "dnas.cli.rehearsal.verify_export",
    "report": "dnas.cli.rehearsal.write_report",
}


@pytest.mark.parametrize("dry", [False, True], ids=["search", "dry run"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_failure_of_a_later_stage_is_refused_before_the_first_step(
    stage, dry, tmp_path, trusted, monkeypatch, capsys
):
    monkeypatch.setattr(STAGES[stage], planted)
    monkeypatch.setattr("dnas.cli.search.time_step", lambda *_: pytest.fail("the search has begun"))
    out = tmp_path / "run"
    code = call(search_tool, monkeypatch, *SHORT, "--output", out, *["--dry-run"] * dry)
    check_refused(code, capsys, "ArithmeticError: planted")
    assert not out.exists()


def test_counters_that_disagree_are_refused_before_the_first_step(tmp_path, trusted, monkeypatch, capsys):
    monkeypatch.setattr("dnas.plan.count_macs", lambda *_: 1)
    out = tmp_path / "run"
    check_refused(call(search_tool, monkeypatch, *SHORT, "--output", out), capsys, "counts 1 MACs")
    assert not out.exists()


def test_a_machine_without_memory_is_no_mistake_of_the_user(tmp_path, trusted, monkeypatch, capsys):
    def full(*_args, **_more):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(STAGES["train"], full)
    assert call(search_tool, monkeypatch, *SHORT, "--output", tmp_path / "run") == 1
    said = capsys.readouterr().err
    assert said.startswith("error: out of memory") and said.count("\n") == 1 and not (tmp_path / "run").exists()


def test_reasons_why_channels_stay_are_whole(capsys):
    """A line that was cut in mid-sentence would lack the number at the end of a reason."""
    net = TimmSupernet(TimmBase("resnet18", 10, 3, 8, kwargs={"layers": [1] * 4, "channels": [8] * 4}))
    reasons = tuple(f"layer{k}: a product of {'many ' * 40}factors {k}" for k in range(5))
    net.channels = replace(net.channels, fixed=reasons)
    task = SimpleNamespace(net=net, data=load_data(img_size=8), tables={"macs": CostTable.build(net.space, "macs")})
    introduce(task)
    said = capsys.readouterr().out
    assert all(reason in said for reason in reasons[:3]) and "and 2 more" in said


def test_rates_that_a_network_does_not_take(tmp_path, trusted, monkeypatch, capsys):
    out, small = tmp_path / "run", ("--img-size", 32, "--budget", "50%", "--output", tmp_path / "run")
    for more in ((), ("--dry-run",)):
        code = call(search_tool, monkeypatch, "--model", "dla34", "--drop-path", 0.1, *small, *more)
        check_refused(code, capsys, "does not take drop_path_rate")
        assert not out.exists()


def fails_from(monkeypatch, place, times):
    """Let a function work so many times, for the rehearsal, and fail from then on."""
    module, _, name = place.rpartition(".")
    real, calls = getattr(__import__(module, fromlist=[name]), name), []

    def sometimes(*args, **more):
        calls.append(name)
        return planted() if len(calls) > times else real(*args, **more)

    monkeypatch.setattr(place, sometimes)


def test_what_is_evaluated_at_once_is_a_batch(tmp_path, trusted, monkeypatch):
    """Of the rehearsal and after the trainings: what a machine can train, it can evaluate."""
    sizes, real = set(), Data.val_batches
    monkeypatch.setattr(Data, "val_batches", lambda self, size: sizes.add(size) or real(self, size))
    assert call(search_tool, monkeypatch, *SHORT[:-1], 128, "--output", tmp_path / "run") == 0
    assert sizes == {128}


LATER = {  # place: how often the rehearsal calls it
    "dnas.workflow.in_time": 0,
    "dnas.plan.write_export": 1,
    "dnas.workflow.train_from_scratch": 0,
    "dnas.training.from_scratch.evaluate": 1,
    "dnas.workflow.save_model": 0,
    "dnas.workflow.as_good_as_one_answer": 0,
    "dnas.cli.search.write_report": 0,
}


@pytest.mark.parametrize("place", LATER)
def test_a_failure_after_the_search_leaves_it_to_be_resumed(place, tmp_path, trusted, monkeypatch, capsys):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        fails_from(patch, place, LATER[place])
        with pytest.raises(ArithmeticError, match="planted"):
            call(search_tool, patch, *SHORT, "--output", out)
    assert f"--resume {out}" in capsys.readouterr().err
    rows = (out / "history.jsonl").read_text()
    assert rows.count("\n") == 6
    with monkeypatch.context() as patch:  # a search that is done is not done again
        patch.setattr("dnas.methods.loop.train", lambda *_, **__: iter(()))
        assert call(search_tool, patch, "--resume", out) == 0
    assert (out / "history.jsonl").read_text() == rows
    assert (out / "report.html").is_file() and not (out / "checkpoint.pt").exists()
    assert set(json.loads((out / "metrics.json").read_text())) >= {"found", "uniform", "balanced"}


def test_the_data_of_a_run_that_goes_on_are_the_same(image_folder, tmp_path, trusted, monkeypatch, capsys):
    out, data = tmp_path / "run", ("--data-dir", image_folder, "--workers", 0, "--img-size", 16)
    flags = (
        *data,
        "--supernet",
        "toy",
        "--budget",
        "50%",
        "--search-epochs",
        4,
        "--epochs",
        1,
        "-b",
        4,
        "--output",
        out,
    )
    with monkeypatch.context() as patch:
        fails_from(patch, "dnas.workflow.train_from_scratch", 0)
        with pytest.raises(ArithmeticError, match="planted"):
            call(search_tool, patch, *flags)
    config = json.loads((out / "config.json").read_text())
    assert config["data"]["train"] == {"images": 12, "least": 6, "median": 6, "most": 6}
    capsys.readouterr()
    for split in ("train", "validation"):
        (image_folder / split / "class1").rename(image_folder / split / "a")
    check_refused(call(search_tool, monkeypatch, "--resume", out), capsys, "class 'a' was not there")
    for split in ("train", "validation"):
        (image_folder / split / "a").rename(image_folder / split / "class1")
    (image_folder / "train" / "class1" / "6.png").write_bytes(
        (image_folder / "train" / "class1" / "5.png").read_bytes()
    )
    check_refused(call(search_tool, monkeypatch, "--resume", out), capsys, "12 train images are now 13")
    (image_folder / "train" / "class1" / "6.png").unlink()
    assert call(search_tool, monkeypatch, "--resume", out) == 0


def test_a_run_folder_of_another_name_keeps_the_name_of_its_network(tmp_path, trusted, monkeypatch, capsys):
    out, copy = tmp_path / "first", tmp_path / "second"
    with monkeypatch.context() as patch:
        fails_from(patch, "dnas.workflow.save_model", 0)
        with pytest.raises(ArithmeticError):
            call(search_tool, patch, *SHORT, "--output", out)
    shutil.copytree(out, copy)
    assert call(search_tool, monkeypatch, "--resume", copy) == 0
    assert json.loads((copy / "arch.json").read_text())["name"] == "dnas_first"
    said = " ".join(capsys.readouterr().out.split())
    assert "timm.create_model('dnas_first'" in said and "dnas_second" not in said


@pytest.mark.parametrize(("counts", "enough"), [((2, 1, 1), False), ((2, 2, 1), True)])
def test_the_smallest_classes_that_a_search_takes(counts, enough, tmp_path, trusted, monkeypatch, capsys):
    y = torch.repeat_interleave(torch.arange(3), torch.tensor(counts))
    x = torch.randint(256, (len(y), 3, 32, 32), dtype=torch.uint8)
    data = in_memory("few", (x, y), (x, y), ("a", "b", "c"), None, 3, "cpu", flip=True)
    monkeypatch.setattr("dnas.cli.search.data_of", lambda args, device: data)
    small = ("--model", "resnet18", "--model-kwargs", "layers=[1,1,1,1]", "channels=[8,16,16,24]", "--divisor", 2)
    out = tmp_path / "run"
    code = call(
        search_tool, monkeypatch, *small, "--budget", "50%", "--search-epochs", 10, "--epochs", 1, "--output", out
    )
    if enough:
        assert code == 0 and (out / "report.html").is_file()
    else:
        check_refused(code, capsys, "only 1 of 4 training images would be held out from the weights: at least 2")
        assert not out.exists()


def test_a_network_that_timm_does_not_own_is_refused_at_the_start(monkeypatch, tmp_path, capsys):
    @timm.models.register_model
    def resnet_of_mine(pretrained=False, **kwargs):
        return timm.create_model("resnet18", **kwargs)

    out = tmp_path / "run"
    code = call(
        search_tool, monkeypatch, "--model", "resnet_of_mine", "--img-size", 32, "--budget", "50%", "--output", out
    )
    check_refused(code, capsys, "no network of timm's own")
    assert not out.exists()


def test_it_changes_no_random_number_and_nothing_of_the_supernet(tmp_path, trusted, monkeypatch):
    real, watched = rehearsal.rehearse, []

    def state(plan):
        weights = {name: t.clone() for name, t in plan.net.state_dict().items() if isinstance(t, torch.Tensor)}
        return weights, (torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state()))

    def rehearse(plan, goal, folder):
        before = state(plan)
        document = real(plan, goal, folder)
        watched.append((before, state(plan)))
        return document

    monkeypatch.setattr(rehearsal, "rehearse", rehearse)
    assert call(search_tool, monkeypatch, *SHORT, "--drop", 0.1, "--dry-run", "--output", tmp_path / "run") == 0
    ((weights, numbers), (weights_after, numbers_after)) = watched[0]
    assert numbers == numbers_after and len(weights) > 20
    assert all(torch.equal(t, weights_after[name]) for name, t in weights.items())
