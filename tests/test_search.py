"""The search as a whole: planted answers, shrinking, gradients, determinism, and what it must not touch."""

import copy
import gc
import weakref
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from planted import BEST, plant, planted_data

from dnas.methods.derive import derive, enumerate_archs, gate_likelihood
from dnas.methods.gates import GATES, check_gradients, image_loss
from dnas.methods.loop import begin, run, search
from dnas.methods.method import Task
from dnas.methods.rules import balanced_arch
from dnas.methods.settings import GatesConfig
from dnas.nets.layer_supernet import MacroSupernet
from dnas.nets.markov_gate import MarkovGate
from dnas.nets.shrink import cut_width
from dnas.nets.timm_space import TimmBase
from dnas.nets.timm_supernet import TimmSupernet
from dnas.spec.budget import Budget, parse_budget
from dnas.spec.checks import UserError
from dnas.spec.cost import CostTable, resolve_budgets
from dnas.spec.layer_space import Candidate
from dnas.spec.recipe import Recipe
from dnas.training.data import Data, load_data
from dnas.training.loop import cycle, make_learner
from dnas.training.optimizer import autocast
from supernets import SUPERNETS
from supernets.toy import toy

FROZEN = Recipe(epochs=15, batch_size=64, lr=1e-9, min_lr=0.0, weight_decay=0.0, smoothing=0.0)
FROM_THE_START = GatesConfig(gate_fraction=0.5, gate_every=1, warmup=0.0, budget_from=0.0)


def tables_of(net):
    return {metric: CostTable.build(net.space, metric) for metric in ("macs", "params")}


def planted_best(space):
    return space.complete({d.name: d.options[-1] for d in space.decisions} | BEST)


@cache
def run_toy(seed):
    torch.manual_seed(seed)
    data = planted_data(seed, num_train=2048, num_val=8)
    net = plant(MacroSupernet(toy()), seed)
    tables, rows = tables_of(net), []
    budgets = (Budget("macs", 1.02 * tables["macs"].of(planted_best(net.space))),)
    search(GATES, net, Task(tables, budgets, data, FROZEN, FROM_THE_START, seed), on_row=rows.append)
    return net, derive(net.space, tables, budgets, gate_likelihood(net)), rows


@pytest.mark.parametrize("seed", range(3))
def test_toy_finds_the_planted_width_block_and_depth(seed):
    net, arch, _ = run_toy(seed)
    assert arch == planted_best(net.space)


def test_toy_budget_alone_does_not_give_the_answer():
    """Many networks fit the budget of the planted one: the images have to tell them apart."""
    net = MacroSupernet(toy())
    table = tables_of(net)["macs"]
    limit = 1.02 * table.of(planted_best(net.space))
    fitting = [a for a in enumerate_archs(net.space) if 0.98 * limit <= table.of(a) <= limit]
    assert len(fitting) >= 20
    assert len({(a["stage0/0/block"], a[f"stage0/0/{a['stage0/0/block']}/mid"]) for a in fitting}) >= 6


def test_planted_answer_is_the_best_of_its_neighbours():
    data = planted_data(3, num_train=1024)
    net = plant(MacroSupernet(toy()), 3).train()
    x, y = next(iter(data.train_batches(512, seed=0)))
    best = dict(planted_best(net.space))
    other_layer = {"stage0/1/keep": "keep", "stage0/1/block": "ir-k3", "stage0/1/ir-k3/mid": 8}
    changes = [{"stage0/0/ir-k5/mid": w} for w in (4, 8, 16, 24, 32)]
    changes += [{"stage0/0/block": "ir-k3", "stage0/0/ir-k3/mid": 12}, other_layer]

    def loss(answers):
        with torch.no_grad():
            return float(torch.nn.functional.cross_entropy(net(x, answers), y))

    assert all(loss(best) < loss(best | change) for change in changes)


@pytest.fixture(scope="module")
def small_search():
    """A short search of the default space on the digits, at 8 px to be quick."""
    torch.manual_seed(0)
    data = load_data(img_size=8).take(360)
    net = MacroSupernet(SUPERNETS["prunet"](num_classes=10, img_size=8, width_mult=0.2))
    tables, rows = tables_of(net), []
    budgets = resolve_budgets(tables, parse_budget("40%"))
    recipe = Recipe(epochs=8, batch_size=16, smoothing=0.0)
    search(GATES, net, Task(tables, budgets, data, recipe, GatesConfig(), 0), on_row=rows.append)
    return net, tables, budgets, rows


@pytest.mark.parametrize("until", [0.1, 0.61])
def test_a_copy_of_a_search_goes_on_as_the_search_itself(until, small_search):
    """Stopped in the warm-up, in the middle of an epoch, after parts were cut off: bit for bit as without a stop."""
    done, tables, budgets, rows = small_search
    torch.manual_seed(0)
    given = (load_data(img_size=8).take(360), Recipe(epochs=8, batch_size=16, smoothing=0.0), GatesConfig())
    net, seen = MacroSupernet(done.outline), []
    task = Task(tables, budgets, *given)
    state = begin(GATES, net, task)
    early = replace(task, budgets=()) if until == 0.1 else task
    run(GATES, state, early, on_row=seen.append, until=until)
    other = copy.deepcopy(state)
    for p in net.parameters():
        p.data.fill_(torch.nan)  # what the copy does must not hang on the original
    run(GATES, other, task, on_row=seen.append)
    timeless = [[{k: v for k, v in row.items() if not k.endswith("_ms")} for row in some] for some in (seen, rows)]
    assert timeless[0] == timeless[1]
    assert all(torch.equal(a, b) for a, b in zip(other.net.tensors(), done.tensors(), strict=True))


def test_history_has_every_step_once_and_shows_the_shrinking(small_search):
    net, tables, _, rows = small_search
    assert [row["step"] for row in rows] == list(range(len(rows)))
    assert rows[-1]["live_macs"] < 0.8 * rows[0]["live_macs"]
    assert rows[-1]["live_macs"] == net.live_cost(tables["macs"])
    assert any(row.get("events") for row in rows)


def test_every_layer_ends_with_one_block_or_none(small_search):
    net, *_ = small_search
    assert all(len(layer.blocks) <= 1 for layer in net.layers)
    for layer in net.layers:
        assert (len(layer.blocks) == 0) == (layer.skip is not None and layer.skip.is_removed)


def test_gates_follow_the_target_and_the_net_lands_in_the_band(small_search):
    net, tables, budgets, rows = small_search
    late = [row["expected"]["macs"] / row["target"]["macs"] for row in rows[-20:] if "expected" in row]
    assert abs(np.mean(late) - 1) < 0.1
    arch = derive(net.space, tables, budgets, gate_likelihood(net))
    assert 0.98 <= tables["macs"].of(arch) / budgets[0].limit <= 1.0


def test_nothing_dead_is_left_in_the_modules(small_search):
    """Physically cut: no parameter is wider than the live gates need, and the weights' count shows it."""
    net, *_ = small_search
    for name, places in net.slices().items():
        gate = net.gates()[name]
        width = gate.widths[-1] if isinstance(gate, MarkovGate) else gate.large
        sizes = {module.weight.shape[1 if side == "in" else 0] for module, side in places}
        assert sizes == {width}, name
    fresh = MacroSupernet(net.outline)
    assert sum(p.numel() for p in net.parameters()) < 0.6 * sum(p.numel() for p in fresh.parameters())


def test_search_never_opens_the_validation_images():
    data = planted_data(0, num_train=256, num_val=8)

    def poisoned(*_):
        raise AssertionError("the search read validation images")

    data = replace(data, _val=poisoned)
    with pytest.raises(AssertionError):
        next(iter(data.val_batches(4)))
    net = plant(MacroSupernet(toy()))
    recipe = replace(FROZEN, epochs=2)
    search(GATES, net, Task(tables_of(net), parse_budget("0.3M"), data, recipe, FROM_THE_START, 0))


def test_weights_and_gates_learn_from_different_images(monkeypatch):
    """What the search itself asks for: two parts of the training images, disjoint, and all of them together."""
    asked, original = [], Data.train_batches

    def spy(self, batch_size, *, seed, indices=None):
        asked.append(set(indices.tolist()))
        return original(self, batch_size, seed=seed, indices=indices)

    monkeypatch.setattr(Data, "train_batches", spy)
    data = planted_data(0, num_train=256, num_val=8)
    net = plant(MacroSupernet(toy()))
    recipe, config = replace(FROZEN, epochs=2), replace(FROM_THE_START, gate_fraction=0.25)
    search(GATES, net, Task(tables_of(net), parse_budget("0.3M"), data, recipe, config, 0))
    weights, gates = sorted({frozenset(indices) for indices in asked}, key=len, reverse=True)
    assert not weights & gates and weights | gates == set(range(256))


def test_dead_gates_stop_the_search():
    net = MacroSupernet(toy())
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    check_gradients(net, 0)
    pair = net.layers[0].blocks["ir-k3"].gate
    pair.logits.grad.zero_()
    with pytest.raises(RuntimeError, match="stage0/0/ir-k3/mid gets no gradient"):
        check_gradients(net, 0)


def test_nothing_to_search_is_an_error():
    only = Candidate("ir", 3, expand=1, base=1)
    stage = replace(toy().stages[0], depth=1, width=8, candidates=(only,))
    net = MacroSupernet(replace(toy(), stages=(stage,), divisor=8, stem=8, head=8))
    assert net.space.num_archs() == 1
    data = planted_data(0, num_train=64, num_val=8)
    with pytest.raises(UserError, match="nothing can be searched"):
        search(GATES, net, Task(tables_of(net), (Budget("macs", 1e9),), data, FROZEN, GatesConfig(), 0), on_row=print)


def test_what_was_cut_off_is_freed_while_the_search_goes_on():
    net = plant(MacroSupernet(toy()), 0)
    weights, freed = {id(p): weakref.ref(p) for p in net.weight_parameters()}, []

    def on_row(row):
        alive = {id(p) for p in net.parameters()}
        gone = [ref for key, ref in weights.items() if key not in alive]
        if gone and not freed:
            gc.collect()
            freed.append(all(ref() is None for ref in gone))

    tables = tables_of(net)
    budgets = (Budget("macs", 1.02 * tables["macs"].of(planted_best(net.space))),)
    data = planted_data(0, num_train=2048, num_val=8)
    search(GATES, net, Task(tables, budgets, data, FROZEN, FROM_THE_START, 0), on_row=on_row)
    assert freed == [True]


def watched(config, data):
    """A short search of the toy, as (is the net hard, images, answers if so) of every forward pass."""
    net, asked = MacroSupernet(toy()), []
    tables = tables_of(net)

    def watch(module, args):  # soft answers would keep a graph alive while parameters shrink
        x, answers = args
        hard = not any(isinstance(a, torch.Tensor | dict) for a in answers.values())
        asked.append((hard, x, answers if hard else None))

    net.register_forward_pre_hook(watch)
    budgets = resolve_budgets(tables, parse_budget("50%"))
    search(GATES, net, Task(tables, budgets, data, replace(FROZEN, epochs=2), config, 0))
    return net, asked


def test_a_gate_step_is_one_batch_whose_parts_weigh_alike():
    """Two blocks mixed: two parts, each image once. One part for the checks: in the first step, and when skips open."""
    data, config = planted_data(0, num_train=256, num_val=8), replace(FROM_THE_START, block_from=1.0, block_by=1.0)
    recipe, net, passes, rows = replace(FROZEN, epochs=2), MacroSupernet(toy()), [], []

    def watch(module, args, logits):
        if any(isinstance(a, torch.Tensor | dict) for a in args[1].values()):
            passes.append([args[0].clone(), logits.detach().clone()])
            logits.register_hook(passes[-1].append)

    net.register_forward_hook(watch)
    budgets = resolve_budgets(tables_of(net), parse_budget("50%"))
    search(GATES, net, Task(tables_of(net), budgets, data, recipe, config, 0), on_row=rows.append)
    batches = cycle(Task({}, (), data, recipe, config).held_out_batches(config.gate_fraction))
    assert len(rows) == 4 and [row["images"] for row in rows] == [32, 32, 64, 64]
    for row in rows:
        x, y = next(batches)
        for part in range(row["images"] // 32):
            seen, logits, grad = passes.pop(0)
            assert torch.equal(seen, x[part::2])
            of_part = y[part::2]
            slope = logits.softmax(1) - torch.nn.functional.one_hot(of_part, 4)
            slope -= (slope * logits).sum() / logits.square().sum() * logits  # the common scale asks for nothing
            torch.testing.assert_close(grad, slope / row["images"])
            row["gate_loss"] -= float(torch.nn.functional.cross_entropy(logits, of_part)) * len(of_part) / row["images"]
        assert row["gate_loss"] == pytest.approx(0, abs=1e-5)
    assert not passes


def test_a_search_goes_on_when_all_is_decided():
    """Every chain is down to one width: gate steps have no gradient from images, and nothing to change."""
    data, net = planted_data(0, num_train=256, num_val=8), TimmSupernet(TimmBase("test_resnet", 4, 3, 12))
    tables, arch, rows = tables_of(net), {d.name: d.options[0] for d in net.space.decisions}, []
    for name, width in arch.items():
        cut_width(net, name, width)
    net.fit()
    budgets = [Budget("macs", tables["macs"].of(arch))]
    search(GATES, net, Task(tables, budgets, data, replace(FROZEN, epochs=2), FROM_THE_START, 0), on_row=rows.append)
    assert net.best() == arch and len(rows) == 4
    assert all(row["gate_loss"] > 0 and row["expected"]["macs"] == pytest.approx(budgets[0].limit) for row in rows)


def test_weights_learn_on_what_they_are_told_to():
    data = planted_data(0, num_train=256, num_val=8)
    warm = replace(GatesConfig(), warmup=0.5)
    for kind, is_hard in (("hard", True), ("soft", False)):
        _, asked = watched(replace(warm, weights_on=kind), data)
        assert asked[0][0] is is_hard and asked[1][1] is not asked[0][1]  # one pass a step


@pytest.mark.parametrize("fraction, shared", [(0.0, True), (0.5, False)])
def test_without_a_fraction_the_gates_see_the_weights_images(fraction, shared):
    data = planted_data(0, num_train=256, num_val=8)
    _, asked = watched(replace(FROM_THE_START, gate_fraction=fraction), data)
    images = [(is_hard, bytes(image.numpy())) for is_hard, x, _ in asked for image in x]
    seen = [{image for is_hard, image in images if is_hard == hard} for hard in (True, False)]
    assert bool(seen[0] & seen[1]) == shared


@pytest.mark.parametrize(
    "change",
    [
        {"gate_fraction": 1.0},
        {"gate_every": 0},
        {"weights_on": "stone"},
        {"prior": -1.0},
        {"temperature": 0.0},
        {"skip_at": 1.5},
        {"budget_from": 0.8},
        {"paths": 0},
    ],
)
def test_bad_config_is_one_line(change):
    with pytest.raises(UserError) as caught:
        GatesConfig(**change)
    assert caught.value.with_flags.startswith("--") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "amp_dtype, taken, scaled",
    [("auto", torch.bfloat16, False), ("bfloat16", torch.bfloat16, False), ("float16", torch.float16, True)],
)
def test_mixed_precision_on_a_cpu(amp_dtype, taken, scaled):
    """Nothing was asked for: bfloat16, as torch itself has it there."""
    layer, recipe = torch.nn.Linear(2, 2), Recipe(amp=True, amp_dtype=amp_dtype)
    with autocast(torch.device("cpu"), recipe):
        assert layer(torch.ones(1, 2)).dtype == taken
    assert make_learner(layer, layer.parameters(), recipe, 1).scaler.is_enabled() == scaled


def test_widths_begin_at_the_headroom_over_balanced_once_the_budget_is_known():
    """At the first gate step: the narrowest width of the grid that is so many times the balanced one, or the widest."""
    data, seen = planted_data(0, num_train=256, num_val=8), []
    net = TimmSupernet(TimmBase("test_resnet", 4, 3, 12, divisor=2))
    budgets = resolve_budgets(tables_of(net), parse_budget("30%"))
    config = replace(GatesConfig(), headroom=1.5, warmup=0.5)
    recipe = replace(FROZEN, epochs=4)
    balanced = balanced_arch(net.space, tables_of(net), budgets)
    options = {name: list(gate.widths) for name, gate in net.gates().items()}

    def on_row(row):
        seen.append({name: list(gate.widths) for name, gate in net.gates().items()})

    search(GATES, net, Task(tables_of(net), budgets, data, recipe, config, 0), on_row=on_row)
    first = next(k for k, live in enumerate(seen) if live != options)
    assert first == len(seen) // 2
    for name, widths in options.items():
        at_least = [w for w in widths if w >= 1.5 * balanced[name]] or widths[-1:]
        assert seen[first][name] == widths[: widths.index(at_least[0]) + 1]
    assert seen[first] != options


@pytest.mark.parametrize("sure", [False, True])
def test_a_gate_gains_nothing_by_a_network_that_is_less_sure(sure):
    """A factor on all logits: no gradient, unless the gates are told to keep it; then that of the cross entropy."""
    data, factors = planted_data(0, num_train=256, num_val=8), []
    net = plant(MacroSupernet(toy()), 0)
    tables = tables_of(net)
    config = replace(FROM_THE_START, confidence=sure)
    task = Task(tables, resolve_budgets(tables, parse_budget("50%")), data, FROZEN, config, 0)
    state = begin(GATES, net, task)

    def scale(module, args, logits):
        factors.append((torch.ones((), requires_grad=True), logits.detach()))
        return factors[-1][0] * logits

    with net.register_forward_hook(scale):
        x, y = next(iter(data.train_batches(32, seed=0)))
        image_loss(state, task, 2, x, y, 1, 1, {n: p.detach().numpy() for n, p in net.probabilities_on_host().items()})
    ((factor, logits),) = factors
    slopes = [float(torch.nn.functional.cross_entropy((1 + e) * logits.double(), y)) for e in (-1e-4, 1e-4)]
    expected = (slopes[1] - slopes[0]) / 2e-4 if sure else 0.0
    assert float(factor.grad) == pytest.approx(expected, abs=1e-5)
    assert abs(slopes[1] - slopes[0]) > 1e-6
