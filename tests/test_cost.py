"""The one formula of cost against brute force, independent draws and finite differences."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from dnas.methods.derive import enumerate_archs
from dnas.nets.layer_supernet import space_of
from dnas.spec.cost import CLOSED_FORMS, CostTable
from dnas.spec.layer_space import Candidate, EfficientNetSpace, Stage, fit_strides
from dnas.spec.space import DROP, KEEP, Decision, Site, Space
from supernets import SUPERNETS

METRICS = ("macs", "params")


def supernet_space(name, img_size=32):
    return space_of(SUPERNETS[name](num_classes=10, img_size=img_size, width_mult=0.5))


def small_macro():
    """Three layers with everything that a layer can have: choice, drop, squeeze-excite, fused, depthwise, stride."""
    stages = (
        Stage(16, 1, 1, (Candidate("ds", 3),)),
        Stage(
            24, 2, 2, (Candidate("ir", 3, 2, 2, se=0.25), Candidate("er", 3, 1, 1), Candidate("ds", 5)), droppable=True
        ),
    )
    return EfficientNetSpace("small", 16, 1, stages, 16, "relu", True, 5, img_size=9)


def random_arch(space, rng):
    return space.complete({d.name: d.options[rng.integers(len(d.options))] for d in space.decisions})


def random_probabilities(space, rng):
    return {d.name: torch.from_numpy(rng.dirichlet(np.ones(len(d.options)))) for d in space.decisions}


def one_hot(space, arch, rng):
    """Certainty about the answers of ``arch``; anything about those that do not matter."""
    p = random_probabilities(space, rng)
    for name, option in arch.items():
        p[name] = torch.zeros_like(p[name])
        p[name][space.by_name[name].index(option)] = 1
    return p


# expected() and of() are one sum


@pytest.mark.parametrize("name", SUPERNETS)
@pytest.mark.parametrize("metric", METRICS)
def test_expected_at_certainty_is_the_exact_cost(name, metric):
    space, rng = supernet_space(name), np.random.default_rng(0)
    table = CostTable.build(space, metric)
    for _ in range(50):
        arch = random_arch(space, rng)
        expected = table.expected(one_hot(space, arch, rng))
        assert expected.dtype == torch.float64 and expected.shape == ()
        assert float(expected) == pytest.approx(table.of(arch), rel=1e-12)
        assert isinstance(table.of(arch), int)


def test_expected_takes_half_precision_probabilities_and_sums_in_double():
    space, rng = supernet_space("toy"), np.random.default_rng(0)
    table = CostTable.build(space, "macs")
    p = random_probabilities(space, rng)
    for dtype, rel in ((torch.float32, 1e-6), (torch.bfloat16, 0.05)):
        rough = {n: v.to(dtype).requires_grad_() for n, v in p.items()}
        expected = table.expected(rough)
        assert expected.dtype == torch.float64
        assert float(expected.detach()) == pytest.approx(float(table.expected(p)), rel=rel)
        expected.backward()
        assert all(v.grad is not None and v.grad.dtype == dtype for v in rough.values())


def draw(space, probabilities, rng, count):
    """``count`` independent draws of every decision: decision -> [count] option indices."""
    return {n: rng.choice(len(p), size=count, p=p.numpy() / p.numpy().sum()) for n, p in probabilities.items()}


def assert_means_agree(samples, expected):
    error = samples.std(ddof=1) / math.sqrt(len(samples))
    assert abs(samples.mean() - expected) < 4 * error
    assert error < 0.01 * expected  # or the test would say little


def test_expected_mobilenet_v2_is_the_mean_of_independent_draws():
    img, mult, count = 32, 0.5, 100_000
    space, rng = supernet_space("mobilenet_v2", img), np.random.default_rng(1)
    p = random_probabilities(space, rng)
    index = draw(space, p, rng, count)
    width = {d.name: np.array(d.options)[index[d.name]] for d in space.decisions}
    # Table 2 of the MobileNetV2 paper, counted again from nothing: (expansion, layers, stride) of each stage.
    rows = ((1, 1, 1), (6, 2, 2), (6, 3, 2), (6, 4, 2), (6, 3, 1), (6, 3, 2), (6, 1, 1))
    stem_stride, *strides = fit_strides(img, (2, *(stride for *_, stride in rows)))
    side = img // stem_stride
    macs, params = 27 * width["stem"] * side**2, 27 * width["stem"] + 2 * width["stem"]
    before = width["stem"]
    for s, (expansion, layers, _) in enumerate(rows):
        after = width[f"stage{s}/width"]
        for i in range(layers):
            hidden = before
            if expansion > 1:
                hidden = width[f"stage{s}/{i}/ir-k3/mid"]
                macs, params = macs + before * hidden * side**2, params + before * hidden + 2 * hidden
            side = side // strides[s] if i == 0 else side
            macs = macs + 9 * hidden * side**2 + hidden * after * side**2
            params = params + 9 * hidden + 2 * hidden + hidden * after + 2 * after
            before = after
    head = width["head"]
    macs, params = macs + before * head * side**2 + head * 10, params + before * head + 2 * head + head * 10 + 10
    full = CostTable.build(space, "macs").extremes()[1]
    assert full["stem"] == 32 * mult and full["head"] == 1280 * mult
    for metric, samples in (("macs", macs), ("params", params)):
        assert_means_agree(samples, float(CostTable.build(space, metric).expected(p)))


def test_expected_choices_and_drops_are_the_mean_of_independent_draws():
    space, rng, count = space_of(small_macro()), np.random.default_rng(2), 100_000
    p = random_probabilities(space, rng)
    index = draw(space, p, rng, count)
    value = {d.name: np.array(d.options)[index[d.name]] for d in space.decisions}
    stem, one, two, head = (value[n] for n in ("stem", "stage0/width", "stage1/width", "head"))
    macs = 27 * stem * 81 + 81 * (9 * stem + stem * one)
    for i, (before, area_in) in enumerate(((one, 81), (two, 25))):  # 9 pixels at stride 2 are 5
        name, se = f"stage1/{i}", round(0.25 * (16, 24)[i])
        fused, plain = value[f"{name}/er-k3/mid"], value[f"{name}/ir-k3-se/mid"]
        cost = {
            "ir-k3-se": before * plain * area_in + 25 * 9 * plain + 2 * se * plain + 25 * plain * two,
            "er-k3": 9 * before * fused * 25 + 25 * fused * two,
            "ds-k5": 25 * 25 * before + 25 * before * two,
        }
        macs = macs + np.select([value[f"{name}/block"] == b for b in cost], list(cost.values())) * (
            (value[f"{name}/keep"] == KEEP) if i else 1
        )
    macs = macs + 25 * two * head + 5 * head
    assert_means_agree(macs, float(CostTable.build(space, "macs").expected(p)))


def test_a_width_that_is_both_input_and_output_is_one_variable():
    """E[w * w], not E[w] * E[w]: the convolution inside one stream."""
    options, p = (8, 16, 40), torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64, requires_grad=True)
    site = Site("it", "conv", {"in": "w", "out": "w"}, {"kernel": 3, "size": 7})
    table = CostTable.build(Space((Decision("w", options, 40),), (site,)), "macs")
    w = torch.tensor(options, dtype=torch.float64)
    expected = table.expected({"w": p})
    assert float(expected.detach()) == pytest.approx(63 * float(p.detach() @ w**2), rel=1e-12)
    assert float(expected.detach()) > 1.4 * 63 * float(p.detach() @ w) ** 2
    (gradient,) = torch.autograd.grad(expected, p)
    assert torch.allclose(gradient, 63 * w**2)
    assert [table.of({"w": o}) for o in options] == [63 * o**2 for o in options]
    block = Site("it", "ir", {"in": "w", "mid": "w", "out": "w"}, {"kernel": 3, "size": 1, "size_in": 1, "se": 0})
    table = CostTable.build(Space((Decision("w", options, 40),), (block,)), "macs")
    assert [table.of({"w": o}) for o in options] == [2 * o**2 + 9 * o for o in options]


@pytest.mark.parametrize("metric", METRICS)
def test_gradient_is_the_finite_difference(metric):
    """The cost is linear in each probability, so a central difference of any step is exact."""
    space, rng = space_of(small_macro()), np.random.default_rng(3)
    table = CostTable.build(space, metric)
    p = {n: v.requires_grad_() for n, v in random_probabilities(space, rng).items()}
    table.expected(p).backward()
    for name, value in p.items():
        for k in range(len(value)):
            ends = []
            for step in (0.25, -0.25):
                moved = value.detach().clone()
                moved[k] += step
                ends.append(float(table.expected({n: v.detach() for n, v in p.items()} | {name: moved})))
            assert float(value.grad[k]) == pytest.approx((ends[0] - ends[1]) / 0.5, rel=1e-9, abs=1e-6)


# along, extremes, without


@pytest.mark.parametrize("name", [*SUPERNETS, "small"])
def test_along_is_the_cost_of_the_sites_that_a_decision_touches(name):
    space = space_of(small_macro()) if name == "small" else supernet_space(name)
    rng, forms = np.random.default_rng(4), CLOSED_FORMS["macs"]
    table = CostTable.build(space, "macs")
    for d in space.decisions:
        at = {e.name: int(rng.integers(len(e.options))) for e in space.decisions}
        costs, brute = table.along(d, at), []
        for k in range(len(d.options)):
            value = {e.name: e.options[k if e is d else at[e.name]] for e in space.decisions}
            total = 0
            for site in space.sites:
                touched = d.name in (*site.widths.values(), *(n for n, _ in site.when))
                if touched and all(value[n] == option for n, option in site.when):
                    slots = {slot: value.get(w, w) for slot, w in site.widths.items()}
                    total += int(forms[site.op](**slots, **site.fixed))
            brute.append(total)
        assert costs.tolist() == brute


@pytest.mark.parametrize("name", [*SUPERNETS, "small"])
def test_along_differs_between_options_as_whole_networks_do(name):
    space = space_of(small_macro()) if name == "small" else supernet_space(name)
    rng, table = np.random.default_rng(5), CostTable.build(space, "params")
    for d in space.decisions:
        at = {e.name: int(rng.integers(len(e.options))) for e in space.decisions}
        costs = table.along(d, at)
        whole = []
        for k in range(len(d.options)):
            whole.append(
                table.of(space.complete({e.name: e.options[(at | {d.name: k})[e.name]] for e in space.decisions}))
            )
        if all(space.by_name[n].options[at[n]] == option for n, option in d.when):
            assert (costs - costs[0]).tolist() == [cost - whole[0] for cost in whole]
        else:
            assert len(set(whole)) == 1


def tiny_macro():
    """Like `small_macro`, but it can be enumerated."""
    stage = Stage(16, 2, 2, (Candidate("ir", 3, 1.5, 1, se=0.25), Candidate("er", 3, 1, 1), Candidate("ds", 5)), True)
    return EfficientNetSpace(
        "tiny", 16, 1, (Stage(16, 1, 1, (Candidate("ds", 3),)), stage), 16, "relu", True, 5, img_size=9
    )


@pytest.mark.parametrize("metric", METRICS)
def test_extremes_are_those_of_all_networks(metric):
    space, rng = space_of(tiny_macro()), np.random.default_rng(6)
    table, archs = CostTable.build(space, metric), list(enumerate_archs(space))
    assert 500 < len(archs) <= 5000
    costs = np.array([table.of(arch) for arch in archs])
    low, high = table.extremes()
    assert (table.of(low), table.of(high)) == (costs.min(), costs.max())
    for _ in range(20):  # of the options that are still alive
        live = {}
        for d in space.decisions:
            kept = rng.random(len(d.options)) < 0.6
            kept[rng.integers(len(kept))] = True
            live[d.name] = np.flatnonzero(kept).tolist()
        alive = [all(space.by_name[n].index(o) in live[n] for n, o in arch.items()) for arch in archs]
        low, high = table.extremes(live)
        assert (table.of(low), table.of(high)) == (costs[alive].min(), costs[alive].max())
        for arch in (low, high):
            assert all(space.by_name[n].index(o) in live[n] for n, o in arch.items())


@pytest.mark.parametrize("name", SUPERNETS)
def test_no_random_network_is_outside_the_extremes(name):
    space, rng = supernet_space(name), np.random.default_rng(7)
    for metric in METRICS:
        table = CostTable.build(space, metric)
        low, high = (table.of(arch) for arch in table.extremes())
        assert all(low <= table.of(random_arch(space, rng)) <= high for _ in range(100))
        assert float(table.expected(random_probabilities(space, rng))) < high


def gone_with(space, prefix):
    """All decisions of a layer but whether it stays, as when it was removed."""
    return {d.name for d in space.decisions if d.name.startswith(prefix) and not d.name.endswith("/keep")}


@pytest.mark.parametrize("metric", METRICS)
def test_without_removed_blocks_costs_what_is_left(metric):
    space, rng = supernet_space("prunet"), np.random.default_rng(8)
    table, p = CostTable.build(space, metric), random_probabilities(space, rng)
    choice = space.by_name["stage1/1/block"]
    removed = choice.options[2]
    mid = f"stage1/1/{removed}/mid"
    p[choice.name][2] = 0  # a removed block is never drawn
    less = table.without({mid})
    assert float(less.expected(p)) == pytest.approx(float(table.expected(p)), rel=1e-12)
    del p[mid]
    assert float(less.expected(p)) > 0
    # Without the decisions of a whole layer, which is dropped for certain.
    p["stage2/1/keep"] = torch.tensor([1.0, 0.0], dtype=torch.float64)
    gone = gone_with(space, "stage2/1/")
    assert len(gone) > 5
    full = float(less.expected(p))
    rest = {n: v for n, v in p.items() if n not in gone}
    assert float(less.without(gone).expected(rest)) == pytest.approx(full, rel=1e-12)
    answers = {d.name: d.options[rng.integers(len(d.options))] for d in space.decisions}
    arch = space.complete(answers | {"stage2/1/keep": DROP, choice.name: choice.options[0]})
    assert less.without(gone).of(arch) == table.of(arch)
    assert table.without(set()).of(arch) == table.of(arch)


def test_without_a_removed_layer_that_had_a_depthwise_separable_candidate():
    space, rng = space_of(small_macro()), np.random.default_rng(9)
    table, p = CostTable.build(space, "macs"), random_probabilities(space, rng)
    p["stage1/1/keep"] = torch.tensor([1.0, 0.0], dtype=torch.float64)
    gone = gone_with(space, "stage1/1/")
    rest = {n: v for n, v in p.items() if n not in gone}
    assert float(table.without(gone).expected(rest)) == pytest.approx(float(table.expected(p)), rel=1e-12)


def test_the_macros_of_these_tests_hold_what_they_say():
    for macro in (small_macro(), tiny_macro()):
        space = space_of(macro)
        assert {site.op for site in space.sites} == set(CLOSED_FORMS["macs"]) - {"channels"}
        assert any(site.fixed.get("se") for site in space.sites)
        assert any(site.fixed.get("size_in", 0) > site.fixed["size"] for site in space.sites if site.fixed)
        assert dataclasses.replace(macro, name="other").stages == macro.stages
