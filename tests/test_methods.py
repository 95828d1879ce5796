"""One battery for every method, on spaces that end in seconds; then what is true of some methods only."""

from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from planted import plant, planted_data
from spaces import LARGE, Brute, assert_in_band, widest_cost
from test_search import planted_best, run_toy
from timm.utils import random_seed
from torch.nn import functional as F

from dnas.cli.methods import facts
from dnas.methods.catalog import METHODS
from dnas.methods.derive import derive
from dnas.methods.loop import begin, load_search, run, search, search_data
from dnas.methods.method import Task
from dnas.methods.rank_and_cut import dense_arch, most_score
from dnas.methods.rankings import l1_norms, taylor
from dnas.methods.rules import balanced_arch, random_arch, uniform_arch
from dnas.methods.settings import CONFIGS
from dnas.nets.layer_supernet import MacroSupernet, space_of
from dnas.nets.shrink import extract
from dnas.nets.timm_space import TimmBase
from dnas.nets.timm_supernet import TimmSupernet
from dnas.runtime.checkpoint import read_checkpoint, write_checkpoint
from dnas.spec.budget import Budget, parse_budget
from dnas.spec.checks import UserError
from dnas.spec.cost import CostTable, resolve_budgets
from dnas.spec.recipe import Recipe
from dnas.training.data import load_data
from dnas.training.loop import cycle
from supernets import SUPERNETS
from supernets.toy import toy

ROOT = Path(__file__).resolve().parents[1]
RECIPE = Recipe(epochs=4, batch_size=32)
NARROW = {"layers": [1, 1, 1, 1], "channels": [8, 16, 16, 24]}
every_method = pytest.mark.parametrize("name", METHODS)
every_space = pytest.mark.parametrize("space", ["resnet", "prunet"])
training = [name for name, method in METHODS.items() if method.loss]


def net_of(space):
    random_seed(0)
    if space == "resnet":
        return TimmSupernet(TimmBase("resnet18", 10, 3, 8, divisor=2, kwargs=NARROW))
    macro = SUPERNETS["prunet"](num_classes=10, img_size=8, width_mult=0.2, divisor=2)
    return MacroSupernet(replace(macro, stages=tuple(replace(s, depth=min(s.depth, 2)) for s in macro.stages)))


@cache
def digits():
    return load_data(img_size=8).take(300)


def quick(config):
    """The same settings, with few images and cuts."""
    few = {"score_batches": 2, "cuts": 2}
    return replace(
        config, **{key: min(value, getattr(config, key, 0)) for key, value in few.items() if hasattr(config, key)}
    )


def task_of(net, name, budget, seed=0, data=None):
    tables = {metric: CostTable.build(net.space, metric) for metric in ("macs", "params")}
    budgets = resolve_budgets(tables, parse_budget(budget))
    return Task(tables, budgets, data or digits(), RECIPE, quick(METHODS[name].config()), seed)


@cache
def chosen(name, space, budget="40%", seed=0):
    net = net_of(space)
    task = task_of(net, name, budget, seed)
    return search(METHODS[name], net, task)[1], task


@every_space
@every_method
def test_the_network_is_inside_the_budget(name, space):
    arch, task = chosen(name, space)
    assert_in_band(task.tables, task.budgets, arch)
    assert net_of(space).space.check(dict(arch)) == arch


@every_method
def test_a_budget_in_parameters_needs_no_table_of_macs(name):
    net = net_of("resnet")
    task = task_of(net, name, "40%")
    table = task.tables["params"]
    task = replace(task, tables={"params": table}, budgets=(Budget("params", 0.4 * widest_cost(table)),))
    _, arch = search(METHODS[name], net, task)
    assert_in_band(task.tables, task.budgets, arch)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("random", "gates")])
def test_the_budget_of_the_dense_network_gives_the_dense_network(name):
    """Not so for random, which draws among all that cost 98 to 100 %, and gates, which stop at the budget's edge."""
    arch, task = chosen(name, "resnet", "100%")
    assert arch == dense_arch(net_of("resnet").space) == task.tables["macs"].extremes()[1]


@every_method
def test_the_same_seed_gives_the_same_network(name):
    arch, _ = chosen(name, "prunet")
    assert arch == chosen.__wrapped__(name, "prunet")[0]


KEPT = ("gates", "l1", "dropnet", "admm")  # of the methods whose state is kept alike, one on both spaces


@pytest.mark.parametrize("name, space", [(n, "resnet") for n in training] + [(n, "prunet") for n in KEPT])
def test_a_search_that_was_stopped_ends_as_one_that_was_not(name, space, tmp_path):
    """From what is on disk, with a supernet that is built anew: rows, tensors and network are the same, to the bit."""
    method = METHODS[name]

    def part(saved=None, until=None):
        net, rows = net_of(space), [] if saved is None else list(saved["rows"])
        task = task_of(net, name, "40%")
        state = begin(method, net, task)
        if saved:
            load_search(method, state, saved["search"])

        class Stop(Exception):
            pass

        def on_row(row):
            rows.append({key: value for key, value in row.items() if not key.endswith("_ms")})
            if len(rows) == until:
                write_checkpoint(tmp_path, {"search": search_data(method, state), "rows": rows})
                raise Stop

        try:
            run(method, state, task, on_row=on_row)
        except Stop:
            return None
        return rows, net.tensors(), method.choose(state, task)

    rows, tensors, arch = part()
    part(until=2)
    part(read_checkpoint(tmp_path), 17)
    again, others, found = part(read_checkpoint(tmp_path))
    assert again == rows and len(rows) > 20 and found == arch
    assert all(map(torch.equal, tensors, others))


@every_method
def test_validation_images_are_never_touched(name):
    def poisoned(*_):
        raise AssertionError("validation images were read")

    net = net_of("resnet")
    data = replace(digits(), _val=poisoned)
    with pytest.raises(AssertionError):
        next(iter(data.val_batches(4)))
    search(METHODS[name], net, task_of(net, name, "40%", data=data))


@pytest.mark.parametrize("name", training)
def test_training_images_are_all_used_once_an_epoch(name):
    """Those that are held out are none of those that the weights learn from, and no image is left out."""
    net = net_of("resnet")
    task = task_of(net, name, "40%")
    fraction = METHODS[name].held_out(task.config)
    weights, held_out = task.weight_batches(fraction)._indices, task.held_out_batches(fraction)._indices
    seen = set(weights.tolist())
    assert seen | (set(held_out.tolist()) if fraction else set()) == set(range(digits().num_train))
    assert not fraction or not seen & set(held_out.tolist())


def test_a_space_with_one_network_is_refused_by_every_method():
    net = net_of("resnet")
    only = {d.name: [len(d.options) - 1] for d in net.space.decisions}
    space = replace(net.space, decisions=tuple(replace(d, options=d.options[-1:]) for d in net.space.decisions))
    net.cut_to(only)
    net.space = space
    for name, method in METHODS.items():
        with pytest.raises(UserError, match="nothing can be searched"):
            begin(method, net, task_of(net_of("resnet"), name, "40%"))


# Rank and cut.


@pytest.mark.parametrize("space", ["resnet", "prunet"])
def test_planted_dead_channels_are_cut_first(space):
    """A third of all filters are zero: at the cost of the rest, l1 chooses the rest, and keeps its weights."""
    net, rng = net_of(space), np.random.default_rng(0)
    method, task = METHODS["l1"], task_of(net, "l1", "40%")
    state = begin(method, net, task)
    living = {}
    for name, axes in net.channel_axes().items():
        d = net.space.by_name[name]
        units, step = len(axes[0].places), d.options[-1] // len(axes[0].places)
        keep = min((w for w in d.options), key=lambda w: abs(w - 0.67 * d.options[-1]))
        dead = rng.permutation(units)[keep // step :]
        living[name] = keep
        with torch.no_grad():
            for axis in axes:
                if axis.role == "out":
                    getattr(axis.module, axis.name)[axis.places[dead].ravel()] = 0
    scores = l1_norms(state, task)
    assert {name: int((s > 0).sum()) for name, s in scores.items()} == {
        name: len(scores[name]) * width // net.space.by_name[name].options[-1] for name, width in living.items()
    }
    wanted = net.space.complete(dict(dense_arch(net.space)) | living)
    budgets, x = (Budget("macs", task.tables["macs"].of(wanted)),), torch.randn(2, 3, 8, 8)
    net.eval()  # norms are as they were made: what a filter of zeros writes is zero behind them, too
    with torch.no_grad():
        logits = net(x, dense_arch(net.space))
        assert method.choose(state, replace(task, budgets=budgets)) == wanted
        left = extract(net, wanted)
        assert torch.allclose(left(x, wanted), logits, rtol=1e-4, atol=1e-5 * float(logits.abs().max()))


@pytest.mark.parametrize("ties", [(), ("layer2.0.conv1,layer3.0.conv1",)])
def test_taylor_scores_are_the_squared_derivatives_by_factors_of_channels(ties):
    """A factor on a channel wherever it is read, as gates have one: its gradient, in every one of two batches."""
    random_seed(0)
    kwargs = NARROW | {"channels": [8, 16, 16, 16]}
    net = TimmSupernet(TimmBase("resnet18", 10, 3, 8, divisor=2, kwargs=kwargs, ties=ties))
    for name, p in net.model.named_parameters():
        if name.endswith("bn2.weight"):  # timm starts them at zero, where nothing before them has an effect
            torch.nn.init.uniform_(p, 0.5, 1.5)
    task = task_of(net, "taylor", "40%")
    task = replace(task, config=replace(task.config, score_batches=2))
    state = begin(METHODS["taylor"], net, task)
    scores = taylor(state, task)
    squares = {}
    net.eval()
    for _, (x, y) in zip(range(2), cycle(task.held_out_batches(0.0)), strict=False):
        factors = {name: torch.ones(int(width), requires_grad=True) for name, width in state.own.arch.items()}
        F.cross_entropy(net(x, factors), y).backward()
        squares = {name: squares.get(name, 0) + factor.grad**2 for name, factor in factors.items()}
    assert set(scores) == set(squares) == set(net.space.by_name)
    for name, score in scores.items():
        torch.testing.assert_close(score, squares[name], rtol=1e-3, atol=1e-5 * float(score.max()))


def test_l1_scores_are_the_norms_of_the_filters():
    """Of a layer alone, and of a stream that several layers write, by hand from timm's own weights."""
    net = net_of("resnet")
    state = begin(METHODS["l1"], net, task_of(net, "l1", "40%"))
    scores = l1_norms(state, task_of(net, "l1", "40%"))

    def norms(layer):
        weight = net.model.get_submodule(layer).weight.detach()
        return weight.abs().sum((1, 2, 3)) / weight.abs().sum((1, 2, 3)).mean()

    torch.testing.assert_close(scores["layer2.0.conv1"], norms("layer2.0.conv1"))
    stream = norms("layer2.0.conv2") + norms("layer2.0.downsample.0")
    torch.testing.assert_close(
        next(s for n, s in scores.items() if len(s) == 16 and "layer2" in n and n != "layer2.0.conv1"), stream
    )


def test_the_most_score_is_what_brute_force_finds():
    """Any scores: among all networks of the base blocks in the band, none keeps more."""
    brute, rng = Brute("widths"), np.random.default_rng(1)
    for _ in range(5):
        scores = {d.name: torch.from_numpy(rng.exponential(size=d.options[-1])) for d in brute.space.decisions}
        like = most_score(brute.space, scores, dense_arch(brute.space))
        budgets = (Budget("macs", float(rng.choice(brute.costs["macs"]))),)
        best = np.where(brute.band(budgets), brute.scores(like), -np.inf).max()
        assert brute.score(like, derive(brute.space, brute.tables, budgets, like)) == pytest.approx(best)


# Rules.


@pytest.mark.parametrize("name", ["widths", "blocks", "depth"])
def test_balanced_is_the_largest_product_of_widths_by_brute_force(name):
    brute = Brute(name)
    for limit in np.quantile(brute.costs["macs"], (0.3, 0.6, 0.9), method="nearest"):
        budgets = (Budget("macs", float(limit)),)
        like = {
            d.name: np.log(d.options) if d.is_width else np.where(np.array(d.options) == d.base, 0.0, -1e3)
            for d in brute.space.decisions
        }
        best = np.where(brute.band(budgets), brute.scores(like), -np.inf).max()
        arch = balanced_arch(brute.space, brute.tables, budgets)
        assert brute.score(like, arch) == pytest.approx(best, abs=1e-9)


@pytest.mark.parametrize("name, width_mult", LARGE)
def test_balanced_widths_account_for_equal_shares_of_the_cost(name, width_mult):
    """w dC/dw is the same for all widths inside their grids, but for the steps of the grids; uniform's are not."""
    space = space_of(SUPERNETS[name](num_classes=10, img_size=32, width_mult=width_mult, divisor=2))
    table = CostTable.build(space, "macs")
    tables, budgets = {"macs": table}, (Budget("macs", 0.4 * widest_cost(table)),)

    def shares(arch):
        at = {d.name: d.index(arch[d.name]) if d.name in arch else 0 for d in space.decisions}
        found = []
        for d in space.decisions:
            if d.is_width and d.name in arch and 0 < at[d.name] < len(d.options) - 1:
                k, along = at[d.name], table.along(d, at)
                slope = (along[k + 1] - along[k - 1]) / (d.options[k + 1] - d.options[k - 1])
                found.append(np.log(d.options[k] * slope))
        return np.array(found)

    balanced = shares(balanced_arch(space, tables, budgets))
    assert len(balanced) >= 5
    assert np.std(balanced) < 0.15 and np.std(balanced) < 0.5 * np.std(shares(uniform_arch(space, tables, budgets)))


def test_random_depends_on_the_seed():
    archs = {chosen("random", "prunet", seed=seed)[0] for seed in range(2)}
    net, task = net_of("prunet"), chosen("random", "prunet")[1]
    assert len(archs) == 2 and chosen("random", "prunet", seed=1)[0] == random_arch(
        net.space, task.tables, task.budgets, 1
    )


# Gates.


@pytest.mark.slow
def test_gates_are_better_than_random_on_the_toy():
    """With the planted weights, on images that the search never saw: as good as the best of ten, above their mean."""
    net = plant(MacroSupernet(toy()), 0).train()
    tables = {"macs": CostTable.build(net.space, "macs")}
    budgets = (Budget("macs", 1.02 * tables["macs"].of(planted_best(net.space))),)
    x, y = next(iter(planted_data(9, num_train=1024).train_batches(1024, seed=0)))

    def loss(arch):
        with torch.no_grad():
            return float(torch.nn.functional.cross_entropy(net(x, arch), y))

    drawn = [loss(random_arch(net.space, tables, budgets, seed)) for seed in range(10)]
    found = loss(run_toy(0)[1])
    assert found <= min(drawn) + 1e-6 and found < np.mean(drawn) - 0.05


def test_settings_are_checked_when_they_are_made():
    gates = METHODS["gates"].config
    for wrong in ({"weights_on": "sotf"}, {"warmup": 1.5}, {"budget_from": 0.9, "budget_by": 0.5}):
        for make in (gates, partial(replace, gates())):
            with pytest.raises(UserError, match=f"^{[*wrong][0]} ") as told:
                make(**wrong)
            assert told.value.with_flags.startswith(f"--{[*wrong][0].replace('_', '-')} ")
    for wrong in ({"epochs": 0}, {"sched": "no-such"}, {"amp_dtype": "float8"}):
        with pytest.raises(UserError, match=f"^{[*wrong][0]} "):
            Recipe(**wrong)


def test_flags_are_made_of_the_configs_of_all_methods():
    assert {name: method.config for name, method in METHODS.items()} == CONFIGS and [*METHODS] == [*CONFIGS]


def test_the_table_of_the_docs_has_the_facts_of_every_method():
    rows = [line for line in (ROOT / "docs" / "methods.md").read_text().splitlines() if line.startswith("| `")]
    expected = {name: f"| `{name}` | {' | '.join(facts(method).values())} |" for name, method in METHODS.items()}
    assert [row for row in rows if row.split("`")[1] in METHODS] == [*expected.values()]
