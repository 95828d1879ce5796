"""From probabilities to one network inside the budget: against brute force where it can be had, in the band always."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from spaces import LARGE, METRICS, SMALL, Brute, assert_in_band, large, tables_of, widest_cost

from dnas.methods.derive import BAND, derive, gate_likelihood, in_band
from dnas.methods.rules import random_arch, uniform_arch
from dnas.nets.layer_supernet import MacroSupernet
from dnas.nets.shrink import cut_width, remove_block
from dnas.spec.budget import Budget, show
from dnas.spec.checks import UserError
from dnas.spec.cost import CostTable
from dnas.spec.space import DROP, KEEP, Decision, Site, Space
from supernets import SUPERNETS


@pytest.fixture(scope="module")
def brute():
    return {name: Brute(name) for name in SMALL}


def random_budgets(brute, rng, both):
    budgets = [Budget("macs", rng.uniform(0.05, 0.95) * brute.costs["macs"].max())]
    return [*budgets, Budget("params", rng.uniform(0.1, 0.9) * brute.costs["params"].max())] if both else budgets


LIKELIHOODS = {
    "flat": lambda n, rng: rng.normal(size=n) * 0.01,
    "normal": lambda n, rng: rng.normal(size=n),
    "sharp": lambda n, rng: rng.normal(size=n) * 4,
    "gates": lambda n, rng: np.log(rng.dirichlet(np.ones(n))),
    "dead options": lambda n, rng: np.where((np.arange(n) > 0) & (rng.random(n) < 0.4), -np.inf, rng.normal(size=n)),
}


def random_likelihood(space, rng, kind):
    return {d.name: LIKELIHOODS[kind](len(d.options), rng) for d in space.decisions}


# Against brute force


def test_the_small_spaces_are_small_and_different(brute):
    assert BAND == 0.98 and not in_band(1.0000001) and in_band(1.0) and in_band(0.98) and not in_band(0.9799)
    for b in brute.values():
        assert 2000 < len(b.archs) == b.space.num_archs() <= 20_000
    assert {d.name.split("/")[-1] for d in brute["blocks"].space.decisions} >= {"mid", "keep", "block", "width", "head"}


@pytest.mark.parametrize("name", SMALL)
def test_the_exact_path_gives_the_likeliest_network_of_the_band(brute, name):
    b, rng = brute[name], np.random.default_rng(0)
    for trial, kind in enumerate(LIKELIHOODS):
        best = -np.inf
        while not np.isfinite(best):
            like, budgets = random_likelihood(b.space, rng, kind), random_budgets(b, rng, both=trial % 2 == 1)
            best = np.where(b.band(budgets), b.scores(like), -np.inf).max()
        arch = derive(b.space, b.tables, budgets, like)
        assert_in_band(b.tables, budgets, arch)
        assert b.score(like, arch) == pytest.approx(best, abs=1e-9)


@pytest.mark.parametrize("name", SMALL)
def test_without_enumeration_the_network_is_in_the_band_and_nearly_the_likeliest(brute, name):
    """How near: the gap to the best network is measured in its lead over the average network of the band."""
    b, rng = brute[name], np.random.default_rng(1)
    gaps, given_up = [], 0
    for kind in ("flat", "normal", "sharp", "gates"):
        trials = 0
        while trials < 5:
            like, budgets = random_likelihood(b.space, rng, kind), random_budgets(b, rng, both=trials % 3 == 0)
            scores = b.scores(like)[b.band(budgets)]
            if len(scores) < 10:  # a needle in a haystack is not what coordinate ascent is for
                continue
            trials += 1
            try:
                arch = derive(b.space, b.tables, budgets, like, exact_below=0)
            except UserError:
                given_up += 1
                continue
            assert_in_band(b.tables, budgets, arch)
            gaps.append((scores.max() - b.score(like, arch)) / (scores.max() - scores.mean()))
    gaps = np.array(gaps)
    assert given_up <= 1
    assert gaps.min() > -1e-9
    assert np.mean(gaps < 1e-9) >= 0.4
    assert gaps.mean() < 0.2


@pytest.mark.parametrize("name", SMALL)
def test_options_that_were_cut_off_are_never_taken(brute, name):
    b, rng = brute[name], np.random.default_rng(11)
    for exact_below, most in ((0, 6), (20_000, 1)):
        trials = 0
        while trials < most:
            like, budgets = random_likelihood(b.space, rng, "dead options"), random_budgets(b, rng, both=False)
            if not np.isfinite(b.scores(like)[b.band(budgets)]).any():
                continue
            trials += 1
            try:
                arch = derive(b.space, b.tables, budgets, like, exact_below=exact_below)
            except UserError:
                assert exact_below == 0
                continue
            assert np.isfinite(b.score(like, arch))


def three_networks():
    """A space of three networks, of 100, 200 and 400 MACs."""
    site = Site("it", "conv", {"in": 10, "out": "w"}, {"kernel": 1, "size": 10})
    space = Space((Decision("w", (1, 2, 4), 4),), (site,))
    tables = tables_of(space)
    assert [tables["macs"].of({"w": w}) for w in (1, 2, 4)] == [100, 200, 400]
    return space, tables, {"w": np.zeros(3)}


@pytest.mark.parametrize("exact_below", [0, 20_000])
@pytest.mark.parametrize("limit, near", [(150, (100, 200)), (250, (200, 400)), (50, (100,)), (500, (400,))])
def test_a_budget_that_no_network_meets_is_an_error_that_names_the_nearest_costs(limit, near, exact_below):
    space, tables, like = three_networks()
    with pytest.raises(UserError) as caught:
        derive(space, tables, (Budget("macs", limit),), like, exact_below)
    message = str(caught.value)
    assert show("macs", limit) in message and "\n" not in message
    named = {cost for cost in (100, 200, 400) if f" {show('macs', cost)}" in message.partition("nearest")[2]}
    assert [min(named) < limit, max(named) > limit] == [min(near) < limit, max(near) > limit]
    if exact_below:  # only who looks at all of them knows which are the nearest
        assert named == set(near)


def test_a_uniform_net_that_cannot_be_had_is_an_error_too():
    space, tables, _ = three_networks()
    with pytest.raises(UserError, match="98 to 100 % of 300FLOPs"):
        uniform_arch(space, tables, (Budget("macs", 300),))


@pytest.mark.parametrize("exact_below", [0, 20_000])
def test_the_band_ends_at_the_limit_and_at_98_percent(exact_below):
    space, tables, like = three_networks()
    for limit in (200, 200 / 0.98 - 1e-9):
        assert dict(derive(space, tables, (Budget("macs", limit),), like, exact_below)) == {"w": 2}
    for limit in (200 - 1e-9, 200 / 0.98 + 1e-9):
        with pytest.raises(UserError):
            derive(space, tables, (Budget("macs", limit),), like, exact_below)


# In the band, whatever the space and the budget


@pytest.mark.parametrize("name, width_mult", LARGE)
def test_the_supernets_networks_are_in_the_band_at_every_budget(name, width_mult):
    space, tables = large(name, width_mult)
    rng = np.random.default_rng(3)
    for k, percent in enumerate((10, 50, 90) if name == "prunet" else (10, 30, 50, 70, 90)):
        metric = METRICS[k % 2]
        budgets = (Budget(metric, percent / 100 * widest_cost(tables[metric])),)
        like = random_likelihood(space, rng, "gates")
        for arch in (
            derive(space, tables, budgets, like),
            uniform_arch(space, tables, budgets),
            random_arch(space, tables, budgets, seed=k),
        ):
            assert_in_band(tables, budgets, arch)
            assert space.check(dict(arch)) == arch


@pytest.mark.parametrize("name, width_mult", LARGE[1:3])
def test_two_budgets_at_once(name, width_mult):
    """Both are kept; the one that binds is reached. Which one that is changes."""
    space, tables = large(name, width_mult)
    rng, binding = np.random.default_rng(4), set()
    for macs, params in ((0.3, 0.5), (0.6, 0.2)):
        shares = {"macs": macs, "params": params}
        budgets = tuple(Budget(m, share * widest_cost(tables[m])) for m, share in shares.items())
        for arch in (
            derive(space, tables, budgets, random_likelihood(space, rng, "gates")),
            uniform_arch(space, tables, budgets),
            random_arch(space, tables, budgets, seed=0),
        ):
            assert_in_band(tables, budgets, arch)
            binding |= {b.metric for b in budgets if tables[b.metric].of(arch) >= 0.98 * b.limit}
    assert binding == set(METRICS)


@pytest.mark.parametrize("name, width_mult", [("mobilenet_v2", 0.5), ("prunet", 0.5)])
def test_the_derived_network_is_likelier_than_random_ones(name, width_mult):
    space, tables = large(name, width_mult)
    rng = np.random.default_rng(5)
    budgets = (Budget("macs", 0.4 * widest_cost(tables["macs"])),)
    like = random_likelihood(space, rng, "gates")

    def score(arch):
        return sum(float(like[n][space.by_name[n].index(o)]) for n, o in arch.items())

    best = derive(space, tables, budgets, like)
    assert score(best) > max(score(random_arch(space, tables, budgets, seed)) for seed in range(8)) + 10
    assert derive(space, tables, budgets, like) == best


def test_no_other_width_and_no_pair_of_neighbouring_widths_would_be_likelier():
    space, tables = large("mobilenet_v2", 0.5)
    rng = np.random.default_rng(7)
    for _ in range(6):
        budget = Budget("macs", rng.uniform(0.2, 0.9) * widest_cost(tables["macs"]))
        like = random_likelihood(space, rng, "gates")
        arch = derive(space, tables, (budget,), like)
        at = {n: space.by_name[n].index(o) for n, o in arch.items()}

        def gain(changes, at=at, like=like, arch=arch, limit=budget.limit):
            """What moving to these option indices adds to the log-likelihood, nothing if that leaves the band."""
            answers = dict(arch) | {n: space.by_name[n].options[k] for n, k in changes.items()}
            more = sum(like[n][k] - like[n][at[n]] for n, k in changes.items())
            return more if more > 0 and in_band(tables["macs"].of(answers) / limit) else 0

        singles = [{d.name: k} for d in space.decisions for k in range(len(d.options))]
        steps = {
            d.name: [k for k in (at[d.name] - 1, at[d.name] + 1) if 0 <= k < len(d.options)] for d in space.decisions
        }
        pairs = [{a: j, b: k} for a, b in itertools.combinations(steps, 2) for j in steps[a] for k in steps[b]]
        assert max(map(gain, [*singles, *pairs])) < 1e-8


def test_certain_gates_are_obeyed_when_their_network_is_in_the_band():
    space, tables = large("prunet", 0.5)
    rng = np.random.default_rng(6)
    for seed in range(3):
        budget = Budget("macs", rng.uniform(0.2, 0.8) * widest_cost(tables["macs"]))
        arch = random_arch(space, tables, (budget,), seed)
        like = {d.name: np.full(len(d.options), -20.0) for d in space.decisions}
        for name, option in arch.items():
            like[name][space.by_name[name].index(option)] = 0.0
        assert derive(space, tables, (budget,), like) == arch


# The uniform net


def log_ratios(space, arch, least=0):
    widths = [d for d in space.decisions if d.is_width and d.name in arch and d.base >= least]
    return np.array([math.log(arch[d.name] / d.base) for d in widths])


@pytest.mark.parametrize("name", ["mobilenet_v2", "prunet"])
def test_the_uniform_net_is_the_base_net_with_all_widths_scaled_alike(name):
    """Widths of 96 and more, which the grid does not force apart, all shrink by the same factor to a few percent."""
    space, tables = large(name, 1.0)
    full = tables["macs"].of(space.complete({d.name: d.base for d in space.decisions}))
    factors = []
    for share in (0.25, 0.5, 1.0):
        budgets = (Budget("macs", share * full),)
        arch = uniform_arch(space, tables, budgets)
        assert_in_band(tables, budgets, arch)
        for d in space.decisions:
            if not d.is_width and d.name in arch:
                assert arch[d.name] == (KEEP if KEEP in d.options else d.base)
        ratios, wide = log_ratios(space, arch), log_ratios(space, arch, least=96)
        assert len(wide) >= 10 and wide.std() < 0.06 and ratios.std() < 0.12
        others = [log_ratios(space, random_arch(space, tables, budgets, seed)).std() for seed in range(5)]
        assert ratios.std() < min(others)
        factors.append(math.exp(np.median(wide)))
    # The cost goes with the square of the width, nearly.
    assert factors == pytest.approx([0.5, 0.5**0.5, 1.0], abs=0.05)


def test_the_whole_base_net_is_the_uniform_net_of_its_own_cost():
    for name in ("mobilenet_v2", "prunet"):
        space, tables = large(name, 0.5)
        base = space.complete({d.name: d.base for d in space.decisions})
        assert uniform_arch(space, tables, (Budget("macs", tables["macs"].of(base)),)) == base


def test_in_a_small_space_hardly_any_network_is_more_uniform(brute):
    b = brute["widths"]
    base = np.array([d.base for d in b.space.decisions])
    spread = np.array([np.std(np.log(np.array(list(arch.values())) / base)) for arch in b.archs])
    for share in np.linspace(0.15, 0.95, 5):
        budgets = (Budget("macs", share * b.costs["macs"].max()),)
        inside = spread[b.band(budgets)]
        mine = spread[b.archs.index(uniform_arch(b.space, b.tables, budgets))]
        assert np.mean(inside < mine - 1e-12) <= 0.1


def test_beyond_the_base_net_some_layers_take_dearer_blocks_and_none_is_dropped():
    space, tables = large("prunet", 0.5)
    budgets = (Budget("macs", 0.95 * widest_cost(tables["macs"])),)
    arch = uniform_arch(space, tables, budgets)
    assert_in_band(tables, budgets, arch)
    assert DROP not in arch.values()
    assert any(arch[d.name] != d.base for d in space.decisions if d.name.endswith("/block"))


# What the gates know


def test_a_chain_of_like_links_ends_near_its_expected_width_not_at_an_end():
    net = MacroSupernet(SUPERNETS["mobilenet_v2"](num_classes=4, img_size=16))
    gate = net.widths["stage6/width"]
    with torch.no_grad():
        gate.alpha.fill_(3.0)
    p, options = gate.probabilities().detach().double().numpy(), net.space.by_name["stage6/width"].options
    assert p.argmax() in (0, len(p) - 1) and gate.best() in (options[0], options[-1])
    like = gate_likelihood(net)["stage6/width"]
    mean = sum(draw_width(gate, seed) for seed in range(2000)) / 2000
    nearest = int(np.abs(np.array(options) - mean).argmin())
    assert 0 < nearest < len(options) - 1
    assert like[nearest] == pytest.approx(0, abs=0.1)  # at the expected width, whatever else is decided
    # A width that costs as its logarithm, at the price at which the expected one is the best to have, is that one.
    assert abs(int((like - np.log(options)).argmax()) - nearest) <= 1


def draw_width(gate, seed):
    return gate.draw(torch.Generator().manual_seed(seed))


def test_the_gates_widths_are_weighed_against_the_product_of_widths():
    """Two widths that cost their sum, expected at 4 and 16 of 20: by brute force over all pairs in the budget."""
    decisions = [Decision(name, tuple(range(1, 33)), 1) for name in "ab"]
    space = Space(tuple(decisions), tuple(Site(name, "linear", {"in": name, "out": 1}, {}) for name in "ab"))
    one_hot = {"a": np.eye(32)[3], "b": np.eye(32)[15]}
    net = SimpleNamespace(
        space=space, live_options=lambda: dict.fromkeys("ab", range(32)), seen=lambda temperature: one_hot
    )
    found = derive(space, {"macs": CostTable.build(space, "macs")}, (Budget("macs", 20.0),), gate_likelihood(net))

    def worth(a):
        product, away = math.log(a * (20 - a)), math.log(a / 4) ** 2 + math.log((20 - a) / 16) ** 2
        return product - away

    assert found["a"] == max(range(1, 20), key=worth) and found["a"] + found["b"] == 20
    assert found["a"] > 4  # where the product is larger


def test_a_coarse_grid_is_met_near_the_gates_by_a_width_that_was_cut_off():
    """Cut at 3 of 6 and expected at 2.5: the budget of 20 needs b = 20 - a, which is near only with a = 4 or more."""
    a, b = Decision("a", (1, 2, 3, 4, 6), 1), Decision("b", (8, 16), 8)
    space = Space((a, b), tuple(Site(name, "linear", {"in": name, "out": 1}, {}) for name in "ab"))
    p = {"a": np.array([0.0, 0.5, 0.5, 0.0, 0.0]), "b": np.array([0.0, 1.0])}
    net = SimpleNamespace(space=space, live_options=lambda: {"a": [0, 1, 2], "b": [0, 1]}, seen=lambda temperature: p)
    tables = {"macs": CostTable.build(space, "macs")}
    assert derive(space, tables, (Budget("macs", 20.0),), gate_likelihood(net)) == {"a": 4, "b": 16}


def test_likelihood_of_the_gates():
    torch.manual_seed(0)
    net = MacroSupernet(SUPERNETS["prunet"](num_classes=4, img_size=16, width_mult=0.5))
    cut_width(net, "stage2/width", net.widths["stage2/width"].widths[0])
    layer = next(layer for layer in net.layers if layer.choice)
    removed = layer.choice.options[1]
    remove_block(layer, removed)
    net.fit()
    like = gate_likelihood(net)
    assert list(like) == [d.name for d in net.space.decisions]
    assert all(len(like[d.name]) == len(d.options) for d in net.space.decisions)
    for name, gate in net.gates().items():
        p = gate.probabilities().detach().double().numpy()
        if (d := net.space.by_name[name]).is_width:
            u = [math.log(w / float(p @ np.array(d.options))) for w in d.options]
            assert like[name] == pytest.approx([x - x**2 for x in u], abs=1e-9)
        else:
            assert np.exp(like[name]) == pytest.approx(p, abs=1e-12)  # a probability of 0 included
    # A block that was removed is far less likely than any that is left.
    assert like[f"{layer.name}/block"][1] < np.delete(like[f"{layer.name}/block"], 1).min() - 500
    tables = tables_of(net.space)
    for percent in (15, 30):
        budgets = (Budget("macs", percent / 100 * widest_cost(tables["macs"])),)
        arch = derive(net.space, tables, budgets, like)
        assert_in_band(tables, budgets, arch)
        assert arch.get(f"{layer.name}/block") != removed
