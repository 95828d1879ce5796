"""The statistics that nets are compared by, against simulations; a row of the instrument."""

import copy
import itertools
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import norm

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import iso_flops  # noqa: E402
import iso_stats as stats  # noqa: E402
import variants  # noqa: E402

from dnas.nets.bipath_block import PairGate  # noqa: E402
from dnas.spec.recipe import Recipe

NOISE, SPREAD = 0.7, 1.1


def simulated(rng, nets=100, seeds=2, mean=60.0, spread=SPREAD, method="random"):
    """Nets whose true top-1 has the standard deviation ``spread``, each trained ``seeds`` times."""
    truth = mean + spread * rng.standard_normal(nets)
    return {
        f"{method}/{k}": {s: float(t + NOISE * rng.standard_normal()) for s in range(seeds)}
        for k, t in enumerate(truth)
    }


def test_noise_and_spread_are_told_apart():
    rng = np.random.default_rng(0)
    tables = [simulated(rng) for _ in range(200)]
    noises = [stats.noise(t) for t in tables]
    assert fmean(n**2 for n in noises) == pytest.approx(NOISE**2, rel=0.03)
    assert fmean(stats.spread(t, n) ** 2 for t, n in zip(tables, noises, strict=True)) == pytest.approx(1.21, rel=0.05)
    alike = [simulated(rng, spread=0.0) for _ in range(200)]
    assert fmean(stats.spread(t, stats.noise(t)) for t in alike) < 0.2


def test_noise_of_single_trainings_is_unknown():
    once = {"random/0": {0: 1.0}, "random/1": {0: 2.0}}
    assert math.isnan(stats.noise(once))
    assert math.isnan(stats.spread(once, stats.noise(once))) and math.isnan(stats.best_of(once, 1))


def test_percentile_counts_ties_half():
    assert stats.percentile(2.0, [1.0, 2.0, 3.0, 4.0]) == 37.5


@pytest.mark.parametrize("which", ["uniform", "random"])
def test_intervals_hold_what_they_promise(which):
    """95 of 100 intervals hold the true difference, here 0.5."""
    rng, held = np.random.default_rng(1), 0
    for _ in range(2000):
        found = {f"default/{k}": {} for k in range(5)}
        uniform = {s: 60 + NOISE * rng.standard_normal() for s in range(15)}
        for k, net in enumerate(found):
            truth = 60.5 + 0.4 * rng.standard_normal()
            found[net] = {s: truth + NOISE * rng.standard_normal() for s in iso_flops.own_seeds(f"default/{k}")}
        if which == "uniform":
            mean, low, high = stats.minus_paired(found, uniform)
        else:
            mean, low, high = stats.minus_mean(found, simulated(rng, nets=30, mean=60.0))
        assert low < mean < high
        held += low <= 0.5 <= high
    assert held / 2000 == pytest.approx(0.95, abs=0.015)


def test_the_best_of_n_is_the_mean_over_all_subsets():
    scores = simulated(np.random.default_rng(2), nets=9, seeds=3)
    for n in (1, 3, 9):
        best = [max(subset, key=lambda s: s[0]) for subset in itertools.combinations(scores.values(), n)]
        assert stats.best_of(scores, n) == pytest.approx(fmean((s[1] + s[2]) / 2 for s in best))
    # without noise, and nearly so with many nets: the expected largest of n normal values
    scores = {f"random/{k}": {0: v, 1: v} for k, v in enumerate(norm.ppf((np.arange(4000) + 0.5) / 4000))}
    assert stats.best_of(scores, 5) == pytest.approx(1.163, abs=0.01)


def test_methods_are_told_by_name_and_sorted_by_number():
    scores = {"random/10": {0: 1.0}, "random/2": {0: 2.0}, "uniform": {0: 3.0}, "randomly/1": {0: 4.0}}
    assert list(stats.of_method(scores, "random")) == ["random/2", "random/10"]
    assert list(stats.of_method(scores, "uniform")) == ["uniform"]


def test_methods_are_paired_by_the_seed_of_the_search():
    """What the searches share (here 0 or 50) cancels; a search that the other method lacks does not count."""
    other = {f"default/{k}": {3 * k: 50.0 * k, 3 * k + 1: 50.0 * k} for k in range(2)}
    found = {f"l1/{k}": {3 * k: 50.0 * k + 1 + 2 * k, 3 * k + 1: 50.0 * k + 1 + 2 * k} for k in range(3)}
    mean, low, high = stats.minus_method(found, other)
    assert mean == pytest.approx(2.0) and high - low == pytest.approx(2 * 12.706 * 1.0, rel=1e-3)
    assert all(math.isnan(v) for v in stats.minus_method(found, {}))


def test_rank_correlation_of_judges():
    scores = {f"random/{k}": {0: float(k), 1: float(k)} for k in range(10)}
    assert stats.rank_correlation({name: 3 * s[0] ** 3 for name, s in scores.items()}, scores) == pytest.approx(1)
    assert stats.rank_correlation({name: -s[0] for name, s in scores.items()}, scores) == pytest.approx(-1)


SHORT = Recipe(epochs=2, batch_size=16)
SMALL = iso_flops.Setup("prunet", 0.25, 2, "20%", "digits", 200, 8, SHORT, replace(SHORT, epochs=4), 2)


@pytest.fixture(scope="module")
def lab():
    return iso_flops.open_lab(SMALL, "", "cpu")


SOME = ["default", "sgd", "fixed-grid", "soft-weights", "l1", "taylor", "snip", "l1-threshold", *iso_flops.OPPONENTS]


@pytest.mark.parametrize("method", SOME)
def test_every_method_ends_inside_the_budget(method, lab, monkeypatch):
    if method == "torch-pruning":
        # Meant: peers are an extra of their own, pip install -e '.[peers]'; no other method needs them.
        pytest.importorskip("torch_pruning")
    monkeypatch.setattr(iso_flops.opponents, "POPULATION", 8)
    monkeypatch.setattr(iso_flops.opponents, "GENERATIONS", 2)
    row = iso_flops.run_search(lab, method, 0)
    assert 0.98 <= row["macs"] / lab.budgets[0].limit <= 1
    assert (row["search_images"] > 200 or method == "snip") and row["net"] == f"{method}/0"
    again = json.loads(json.dumps(row))
    trained = iso_flops.train_net(lab, again["net"], again["arch"], seed=3)
    assert 0 <= trained["top1"] <= 100 and trained["seed"] == 3


@pytest.mark.parametrize(
    "names", [["hrank", "l1", "lasso-threshold"], ["slimming", "slimming-threshold"], ["snip", "snip-threshold"]]
)
def test_methods_that_train_alike_share_a_training(names, lab):
    """Each of them chooses what it chooses alone, in any order."""
    assert iso_flops.training_of(names[0]) and len({*map(iso_flops.training_of, names)}) == 1
    # These look at the budget while they train.
    others = ["dropnet", "kfac", "admm", "default", "torch-pruning", "evolution"]
    assert not any(map(iso_flops.training_of, others))
    assert len({*map(iso_flops.training_of, ["l1", "slimming", "ssl", "snip"])}) == 4
    together = iso_flops.chosen(lab, names, 0, [lab.budgets])
    assert [*together] == names
    for name in names[::-1]:
        assert together[name][0] == iso_flops.chosen(lab, [name], 0, [lab.budgets])[name][0], name


def test_ablations_change_a_search_of_half_the_length(lab):
    seen = {name: iso_flops.run_search(lab, name, 0)["search_images"] for name in ("default", "half-length")}
    assert seen["half-length"] / seen["default"] == pytest.approx(1 / 2, rel=0.1)
    for baseline, of in (
        ("default", {"default", "older"}),
        ("older", {"late-widths", "half-length", "quarter-length", "sgd"}),
    ):
        assert {name for name in variants.VARIANTS if variants.baseline_of(name) == baseline} == of
    assert {variants.baseline_of(name) for name in iso_flops.opponents.OPPONENTS} == {"default"}


def test_the_same_seed_trains_the_same_net(lab):
    arch = iso_flops.RULES["uniform"](lab.net.space, lab.tables, lab.budgets)
    one, other = (iso_flops.train_net(lab, "uniform", arch, seed=1) for _ in range(2))
    assert one["top1"] == other["top1"] and one["loss"] == other["loss"]


def test_what_is_in_the_table_is_not_trained_again(lab, tmp_path, monkeypatch):
    monkeypatch.setattr(iso_flops, "RESULTS", tmp_path)
    table, done = iso_flops.Table("digits"), []
    table.append({"kind": "net", "net": "random/0", "arch": {}})
    table.append({"kind": "training", "net": "random/0", "seed": 1, "top1": 50.0})

    def do(jobs, table):
        for _, name, _, seed in jobs:
            done.append((name, seed))
            table.append({"kind": "training", "net": name, "seed": seed, "top1": 60.0})
            yield

    for _ in range(2):  # the second time from the file
        iso_flops.train_all(["random/0"], lambda name: range(3), table, do)
        assert done == [("random/0", 0), ("random/0", 2)]
        table = iso_flops.Table("digits")
    assert stats.scores_of(table.rows) == {"random/0": {0: 60.0, 1: 50.0, 2: 60.0}}


def test_every_net_is_trained_once_before_any_is_trained_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(iso_flops, "RESULTS", tmp_path)
    table, done = iso_flops.Table("digits"), []
    for k in range(2):
        table.append({"kind": "net", "net": f"random/{k}", "arch": {}})
    iso_flops.train_all(
        ["random/0", "random/1"], lambda name: range(2), table, lambda jobs, table: done.extend(jobs) or ()
    )
    assert [(name, seed) for _, name, _, seed in done] == [(f"random/{k}", seed) for seed in range(2) for k in range(2)]


@pytest.mark.parametrize("variant", ["default", "scale-in-gradient"])
def test_only_the_ablation_leaves_the_scale_in_the_gradient(variant, lab, monkeypatch):
    seen = []

    def search(method, net, task, on_row):
        gate = net.widths["head"]
        net.soft(with_scale=task.config.scale_in_gradient)["head"].square().sum().backward()
        seen.append(float(gate.alpha.grad.abs().max()))
        return SimpleNamespace(net=net, own=SimpleNamespace(temperature=1.0)), None

    monkeypatch.setattr(iso_flops, "search", search)
    iso_flops.run_search(lab, variant, 0)
    assert (seen[0] > 0.1) if variant == "scale-in-gradient" else (seen[0] < 1e-4)


def test_evolution_climbs_what_the_judge_says(lab, monkeypatch):
    """A judge who likes wide streams: the answer beats all that were drawn at random."""
    space, looked = lab.net.space, []
    streams = [d for d in space.decisions if d.is_width and not d.name.endswith("/mid")]

    def likes(arch):
        return sum(d.index(arch[d.name]) for d in streams)

    def judge(net, arch, x, y, recalibrate=True):
        looked.append(arch)
        return likes(arch)

    monkeypatch.setattr(iso_flops.opponents, "judge", judge)
    monkeypatch.setattr(iso_flops.opponents, "train_shared", lambda *args: 0)
    monkeypatch.setattr(iso_flops.opponents, "POPULATION", 12)
    monkeypatch.setattr(iso_flops.opponents, "GENERATIONS", 5)
    best, _ = iso_flops.opponents.evolution(lab, 0)
    assert likes(best) == max(map(likes, looked)) > max(map(likes, looked[:12]))


def test_judges_look_at_all_nets(lab):
    archs = {f"random/{k}": dict(iso_flops.random_arch(lab.net.space, lab.tables, lab.budgets, k)) for k in range(4)}
    row = iso_flops.judge_nets(lab, archs, seed=0)
    for judged in (row["judged"], row["judged_running"]):
        assert set(judged) == set(archs) and all(0 <= v <= 100 for v in judged.values())


def test_a_judge_leaves_the_statistics_and_only_recalibrated_sees_its_own_images(lab):
    """Shifted statistics mislead a judge that uses them, and not one that recalibrates."""
    torch.manual_seed(0)
    net = lab.supernet().train()
    arch = iso_flops.RULES["uniform"](net.space, lab.tables, lab.budgets)
    x, y = next(iter(lab.data.train_batches(64, seed=0)))
    judge, before = iso_flops.opponents.judge, copy.deepcopy(net.state_dict())
    own = judge(net, arch, x, y)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items() if k != "_extra_state")
    with torch.no_grad():
        net.bn1.running_var.fill_(1e6)
        net.bn2.running_mean.fill_(1e6)
    assert judge(net, arch, x, y) == own
    misled = judge(net, arch, x, y, recalibrate=False)
    assert misled == pytest.approx(100 * float((y == net.classifier.bias.argmax()).float().mean())) != own


def test_the_likeliest_width_is_the_one_that_the_gate_calls_best(lab):
    net = lab.supernet()
    with torch.no_grad():
        for k, p in enumerate(net.gate_parameters()):
            p.add_((-1.0) ** k * (1 + torch.arange(p.numel()).reshape(p.shape) % 3))
    like, gates = variants.likeliest_width(net, 1.0), net.gates()
    widths = [d for d in net.space.decisions if d.is_width and d.name in gates]
    assert all(d.options[like[d.name].argmax()] == gates[d.name].best() for d in widths)
    assert {isinstance(gates[d.name], PairGate) for d in widths} == {True, False}
