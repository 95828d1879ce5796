"""Two processes against one with the whole batch: statistics, gradients, a whole search; torchrun on the tools."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from commands import call, search_tool
from forks import FORKS
from timm.utils import random_seed
from torch import nn

from dnas.methods.derive import derive, gate_likelihood
from dnas.methods.gates import GATES
from dnas.methods.loop import search
from dnas.methods.method import Task
from dnas.methods.rankings import L1
from dnas.methods.settings import GatesConfig
from dnas.nets.layer_supernet import MacroSupernet
from dnas.nets.timm_space import TimmBase
from dnas.nets.timm_supernet import TimmSupernet
from dnas.runtime.distributed import average_gradients, from_first, mean, rank, share_of, shared_statistics, world_size
from dnas.runtime.signals import stop
from dnas.spec.budget import Budget
from dnas.spec.checks import UserError
from dnas.spec.cost import CostTable
from dnas.spec.recipe import Recipe
from dnas.training.criterion import cross_entropy, make_criterion
from dnas.training.data import load_data
from dnas.training.from_scratch import train_from_scratch
from dnas.training.loop import evaluate, make_learner, steps_per_epoch, train
from supernets import SUPERNETS

ROOT = Path(__file__).parents[1]


def _joined(number, work, folder, count):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=number, world_size=count)
    torch.save(work(), f"{folder}/{number}.pt")
    dist.destroy_process_group()


def by(count, work, folder):
    """What ``work()`` returns in each of ``count`` processes that train together."""
    mp.start_processes(_joined, (work, folder, count), nprocs=count, start_method=FORKS.get_start_method())
    return [torch.load(f"{folder}/{k}.pt", weights_only=False) for k in range(count)]


def batch_norms():
    """Statistics, outputs and gradients of batch norms of maps and of vectors, on this process's half of 8 images."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.BatchNorm1d(180)).double()
    net = net.append(nn.Linear(180, 4, dtype=torch.float64))
    x, y = torch.randn(8, 3, 8, 8, dtype=torch.float64), torch.randint(4, (8,))
    _, own = share_of(8, 8)
    x = x[own].requires_grad_()
    with shared_statistics():
        out = net(x)
    loss = nn.functional.cross_entropy(out, y[own])
    loss.backward()
    average_gradients(net.parameters())
    grads = {name: p.grad for name, p in net.named_parameters()} | {"x": x.grad / world_size()}
    return {"out": out.detach(), "loss": mean(loss.detach()), "grads": grads, "state": net.state_dict()}


def test_two_halves_of_a_batch_are_the_batch(tmp_path):
    one, halves = batch_norms(), by(2, batch_norms, tmp_path)
    torch.testing.assert_close(torch.cat([half["out"] for half in halves]), one["out"])
    torch.testing.assert_close(torch.cat([half["grads"].pop("x") for half in halves]), one["grads"].pop("x"))
    for half in halves:
        for key in ("loss", "grads", "state"):
            torch.testing.assert_close(half[key], one[key])
    assert all(torch.equal(a, b) for a, b in zip(*(half["grads"].values() for half in halves), strict=True))


def parts_of_the_data():
    """Rank's images of two epochs and its part of the validation, by their sums; what the first one says."""
    data, seen = load_data("digits", img_size=8), []
    batches = data.train_batches(100, seed=3)
    for epoch in range(2):
        batches.set_epoch(epoch)
        seen += [x.sum((1, 2, 3)) for x, _ in batches]
    told = torch.tensor([float(rank())])
    from_first([told])
    return {"train": torch.stack(seen), "val": [x.sum((1, 2, 3)) for x, _ in data.val_batches(50)], "told": told}


def test_every_image_is_in_one_process(tmp_path):
    one, parts = parts_of_the_data(), by(2, parts_of_the_data, tmp_path)
    assert torch.equal(torch.cat([part["train"] for part in parts], 1), one["train"])
    seen = torch.cat([x for part in parts for x in part["val"]])
    assert torch.equal(seen.sort().values, torch.cat(one["val"]).sort().values)
    assert [float(part["told"]) for part in parts] == [0, 0]


def first_of_many():
    """Tensors of several dtypes, shapes and layouts, of this process's own, after the first one's were sent."""
    torch.manual_seed(rank())
    kinds = [torch.randn(2, 3), torch.randn(4).double(), torch.randint(9, (5,)), torch.rand(()), torch.zeros(0)]
    kinds.append(torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last))
    strides = [t.stride() for t in kinds]
    from_first(kinds)
    assert strides == [t.stride() for t in kinds]
    return kinds


def test_the_first_process_gives_all_its_tensors_at_once(tmp_path, monkeypatch):
    one, both = first_of_many(), by(2, first_of_many, tmp_path)
    for tensors in both:
        assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(tensors, one, strict=True))


def weighted():
    """The loss with class weights of a part of 20 images, as averaged over all processes."""
    torch.manual_seed(0)
    z, y, w = torch.randn(20, 4).double(), torch.randint(4, (20,)), torch.rand(4).double() + 0.1
    own = share_of(20, 20)[1]
    return float(mean(cross_entropy(z[own], y[own], w, 0.1)))


def test_class_weights_weigh_alike_in_all_processes(tmp_path):
    """Classes are not in equal shares in both halves."""
    one = weighted()
    assert by(2, weighted, tmp_path) == pytest.approx([one, one], rel=1e-12)


def accumulated():
    """Weights after steps of three batches, with class weights, in double precision and without a batch norm."""
    torch.manual_seed(0)
    data, net = load_data("digits", img_size=8).take(250), nn.Sequential(nn.Flatten(), nn.Linear(192, 10)).double()
    net.register_forward_pre_hook(lambda net, args: (args[0].double(),))
    text = ",".join(str(1 + k) for k in range(10))
    recipe = Recipe(epochs=2, batch_size=20, grad_accum_steps=3, opt="sgd", class_weights=text)
    criterion = make_criterion(recipe, data)
    batches = data.train_batches(recipe.batch_size, seed=0)
    learner = make_learner(net, net.parameters(), recipe, steps_per_epoch(batches, recipe))
    losses = [*train(lambda x, y: criterion(net(x), x, y), learner, batches, recipe)]
    return losses, [p.detach() for p in net.parameters()]


def test_accumulated_steps_of_two_processes(tmp_path):
    one, both = accumulated(), by(2, accumulated, tmp_path)
    for losses, weights in both:
        assert losses == pytest.approx(one[0], rel=1e-10) and len(losses) == 2 * 4
        torch.testing.assert_close(weights, one[1], atol=1e-10, rtol=0)


def ranked():
    """A short run of l1: what it chooses, and its rows without times."""
    random_seed(0)
    data, rows = load_data("digits", img_size=8).take(400), []
    net = TimmSupernet(TimmBase("resnet18", 10, 3, 8, divisor=2, kwargs={"layers": [1] * 4, "channels": [8] * 4}))
    net = net.double()
    net.register_forward_pre_hook(lambda net, args: (args[0].double(), *args[1:]))
    tables = {"macs": CostTable.build(net.space, "macs")}
    budgets = (Budget("macs", 0.4 * tables["macs"].of(tables["macs"].extremes()[1])),)
    task = Task(tables, budgets, data, Recipe(epochs=2, batch_size=20, lr=1e-3), L1.config())
    _, arch = search(L1, net, task, on_row=rows.append)
    return dict(arch), [(row["step"], row["loss"], row["live_macs"]) for row in rows]


def test_two_processes_rank_as_one_does(tmp_path):
    one, both = ranked(), by(2, ranked, tmp_path)
    assert both[0] == both[1] and both[0][0] == one[0]
    for (step, loss, macs), row in zip(both[0][1], one[1], strict=True):
        assert (step, macs) == (row[0], row[2]) and loss == pytest.approx(row[1], rel=1e-5)


def searched():
    """A short search of the toy, a net trained: the arch, gates, rows without times, and scores.

    The search is in double precision: sums of halves round differently, and Adam makes whole steps of a bias before a
    batch norm out of that.
    """
    random_seed(0)
    data = load_data("digits", img_size=8).take(400)
    net = MacroSupernet(SUPERNETS["toy"](num_classes=10, img_size=8)).double()
    net.register_forward_pre_hook(lambda net, args: (args[0].double(), *args[1:]))
    tables = {"macs": CostTable.build(net.space, "macs")}
    budgets, rows = [Budget("macs", 0.4 * tables["macs"].of(tables["macs"].extremes()[1]))], []
    recipe = Recipe(epochs=4, batch_size=20, lr=1e-3)
    search(GATES, net, Task(tables, budgets, data, recipe, GatesConfig(), 0), on_row=rows.append)
    arch = derive(net.space, tables, budgets, gate_likelihood(net))
    random_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
    model, scores = train_from_scratch(model, data, replace(recipe, model_ema_decay=0.9), seed=0)
    scores |= {"again": evaluate(model, data.val_batches(64), recipe)}
    rows = [{key: value for key, value in row.items() if not key.endswith("_ms")} for row in rows]
    gates = [p.detach() for p in net.gate_parameters()]
    return {"arch": dict(arch), "gates": gates, "rows": rows, "scores": {**scores, "seconds": 0.0}}


def test_two_processes_find_what_one_finds(tmp_path):
    one, both = searched(), by(2, searched, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(both[0]["gates"], both[1]["gates"], strict=True))
    assert both[0]["rows"] == both[1]["rows"] and both[0]["scores"] == both[1]["scores"]
    found = both[0]
    assert found["arch"] == both[1]["arch"] == one["arch"]
    assert [row["live_macs"] for row in found["rows"]] == [row["live_macs"] for row in one["rows"]]
    assert found["rows"][-1]["live_macs"] < found["rows"][0]["live_macs"]
    for a, b in zip(found["rows"], one["rows"], strict=True):
        assert a.get("images") == b.get("images") and a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    torch.testing.assert_close(found["gates"], one["gates"], atol=1e-6, rtol=0)
    assert found["scores"]["loss"] == pytest.approx(one["scores"]["loss"], rel=0.02)
    assert found["scores"]["again"]["loss"] == pytest.approx(found["scores"]["loss"], rel=1e-5)


def test_shares_of_a_batch(monkeypatch):
    for ranks, count, batch, sizes in ((1, 12, 4, [4]), (2, 12, 4, [2, 2]), (3, 7, 9, [2, 2, 2]), (4, 8, 4, [1] * 4)):
        seen = []
        monkeypatch.setattr("dnas.runtime.distributed.world_size", lambda n=ranks: n)
        for k in range(ranks):
            monkeypatch.setattr("dnas.runtime.distributed.rank", lambda k=k: k)
            own, places = share_of(count, batch)
            seen.append(places)
            assert own == sizes[k] and all(places[i] // min(batch, count) == i // own for i in range(len(places)))
        everything = torch.cat(seen).tolist()
        assert len(set(everything)) == len(everything) == sum(sizes) * max(1, count // batch)
    with pytest.raises(UserError, match="^batch_size 6 does not divide among 4"):
        share_of(12, 6)
    with pytest.raises(UserError, match="2 images are too few for 4"):
        share_of(2, 8)


def torchrun(*command):
    flags = ("--standalone", "--nproc-per-node", "2")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *flags, *map(str, command)],
        capture_output=True, text=True, cwd=ROOT, env=environment, timeout=500,
    )  # fmt: skip


def test_torchrun_writes_one_run_folder(tmp_path, monkeypatch):
    short = ("--epochs", 1, "--img-size", 8, "-b", 128)
    flags = ("--supernet", "toy", "--budget", "50%", "--search-epochs", 2, *short)
    done = torchrun("tools/search.py", *flags, "--output", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("files:") == 1  # the other process is silent
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    history = [json.loads(line) for line in (tmp_path / "run/history.jsonl").read_text().splitlines()]
    assert metrics["search"]["steps"] == len(history) and [row["step"] for row in history] == [*range(len(history))]
    done = torchrun("tools/retrain.py", tmp_path / "run", "--output", tmp_path / "again", *short)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "run"]
    with monkeypatch.context() as patch:  # by one process, which is stopped in its search
        steps = iter([0, 0, 0])
        patch.setattr(stop, "asked", lambda: next(steps, 15))
        assert call(search_tool, patch, *flags, "--output", tmp_path / "stopped") == 143
    assert not (tmp_path / "stopped/metrics.json").exists()
    again = torchrun("tools/search.py", "--resume", tmp_path / "stopped")
    assert again.returncode == 0 and again.stdout.count("files:") == 1, again.stderr
    assert "the search goes on at step 4" in again.stdout
    rows = (tmp_path / "stopped/history.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [row["step"] for row in history]
    for epochs in (1, 2):  # complete; then trained on
        done = torchrun("tools/retrain.py", "--resume", tmp_path / "again", *(("--epochs", 2) * (epochs - 1)))
        assert done.returncode == 0 and done.stdout.count("files:") == 1, done.stderr
        assert json.loads((tmp_path / "again/metrics.json").read_text())["found"]["epochs"] == epochs
    assert (tmp_path / "again/metrics-1-epochs.json").exists()
    refused = torchrun("tools/search.py", *flags, "-b", 127, "--output", tmp_path / "odd")
    assert refused.returncode != 0 and "error: --batch-size 127 does not divide among 2 processes" in refused.stderr
    assert not (tmp_path / "odd").exists()
