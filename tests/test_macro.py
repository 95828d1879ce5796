"""Search spaces as plain data: grids of widths, strides for small images, the size for a budget."""

import math
import random

import pytest

from dnas.nets.layer_supernet import size_to, space_of
from dnas.spec.budget import Budget
from dnas.spec.cost import CostTable
from dnas.spec.layer_space import fit_strides, round_width, width_grid
from supernets import SUPERNETS


def test_width_grids_step_evenly_from_a_tenth_to_the_top():
    rng = random.Random(0)
    for _ in range(300):
        divisor = rng.choice((1, 2, 4, 8, 16))
        most = rng.choice((4, 8, 32))
        top = divisor * rng.randint(1, 200)
        grid = width_grid(top, divisor, most)
        steps = {b - a for a, b in zip(grid, grid[1:], strict=False)}
        assert grid[-1] == top and 1 <= len(grid) <= most and len(steps) <= 1
        step = steps.pop() if steps else divisor
        assert step > 0 and step % divisor == 0 and all(w % divisor == 0 for w in grid if step == divisor)
        assert grid[0] >= max(divisor, top / 10)
        if len(grid) > 1:
            assert grid[0] - step < max(divisor, top / 10)  # down to a tenth
        if top // divisor <= most:
            assert step == divisor  # as fine as the divisor where that is not too many
    assert width_grid(80, 8) == (8, 16, 24, 32, 40, 48, 56, 64, 72, 80)
    assert width_grid(8, 8) == (8,)


def test_round_width_is_the_nearest_multiple_and_never_zero():
    for divisor in (1, 4, 8):
        for tenth in range(1, 1000, 7):
            w = round_width(tenth / 10, divisor)
            assert w % divisor == 0 and w >= divisor
            assert w == divisor or abs(w - tenth / 10) <= divisor / 2


@pytest.mark.parametrize("strides", [(2, 1, 2, 2, 2, 2), (2, 1, 2, 2, 2, 1, 2, 1), (1, 2, 2), (1, 1)])
def test_small_images_keep_a_last_map_of_four(strides):
    for img_size in range(4, 65):
        fitted = fit_strides(img_size, strides)
        side = img_size
        for s in fitted:
            side = math.ceil(side / s)
        assert len(fitted) == len(strides) and all(f in (1, s) for f, s in zip(fitted, strides, strict=True))
        assert side >= 4
        dropped = [k for k, (f, s) in enumerate(zip(fitted, strides, strict=True)) if f != s]
        kept = [k for k, f in enumerate(fitted) if f == 2]
        assert not dropped or not kept or max(dropped) < min(kept)  # the earliest go
        assert not dropped or side <= 8  # and no more of them than need be
    for img_size in (65, 96, 224):
        assert fit_strides(img_size, strides) == strides


@pytest.mark.parametrize("name", ["prunet", "mobilenet_v2"])
@pytest.mark.parametrize(
    "budget",
    [
        (Budget("macs", 8e6),),
        (Budget("macs", 3e7),),
        (Budget("params", 1e6),),
        (Budget("macs", 3e7), Budget("params", 2e5)),
    ],
    ids=str,
)
def test_a_supernet_is_sized_to_twice_the_budget(name, budget):
    macro = size_to(lambda mult: SUPERNETS[name](num_classes=10, img_size=32, width_mult=mult), budget)
    space = space_of(macro)
    widest = []
    for b in budget:
        table = CostTable.build(space, b.metric)
        widest.append(table.of(table.extremes()[1]) / b.limit)
    print(name, [str(b) for b in budget], [round(w, 3) for w in widest])
    assert 2 <= max(widest) <= 2.5


def test_sizing_stops_at_the_ends_of_its_multiplier():
    mults = []

    def outline(mult):
        mults.append(mult)
        return SUPERNETS["mobilenet_v2"](num_classes=10, img_size=32, width_mult=mult)

    for limit, end in ((1.0, 1 / 4), (1e15, 16)):
        size_to(outline, (Budget("macs", limit),))
        assert math.isclose(mults[-1], end, rel_tol=0.01)
        assert all(0.249 <= m <= 16.1 for m in mults)
