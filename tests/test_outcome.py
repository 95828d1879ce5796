"""Guards against collapsed searches: they speak up for planted ones, and only then."""

import pytest
import torch

from dnas.methods.rules import uniform_arch
from dnas.nets.layer_supernet import MacroSupernet
from dnas.nets.timm_space import TimmBase
from dnas.nets.timm_supernet import TimmSupernet
from dnas.report.diagnosis import over_budget, signs_of_collapse
from dnas.spec.budget import Budget
from dnas.spec.cost import CostTable
from dnas.spec.space import Space
from supernets import SUPERNETS

NET = MacroSupernet(SUPERNETS["prunet"](num_classes=10, img_size=8, width_mult=0.4))
SPACE: Space = NET.space
TABLES = {"macs": CostTable.build(SPACE, "macs")}
UNIFORM = uniform_arch(SPACE, TABLES, (Budget("macs", 0.4 * TABLES["macs"].of(TABLES["macs"].extremes()[1])),))


def changed(**by_end):
    """The uniform net with all decisions that end so answered so (a function of the options)."""
    answers = {d.name: d.options[0] for d in SPACE.decisions} | dict(UNIFORM)
    for d in SPACE.decisions:
        for end, choose in by_end.items():
            if d.name.endswith(f"/{end}") or (end == "widths" and d.is_width):
                answers[d.name] = choose(d.options)
    return SPACE.complete(answers)


def sharp(arch):
    """Gates that are all but sure."""
    found = {}
    for d in SPACE.decisions:
        p = torch.full((len(d.options),), 0.01)
        p[d.index(arch[d.name]) if d.name in arch else 0] = 1
        found[d.name] = p / p.sum()
    return found


HALF = changed(widths=lambda o: o[len(o) // 2 :: len(o)][0])


@pytest.mark.parametrize("found, gates, said", [
    (HALF, sharp(HALF), []),
    (changed(keep=lambda o: "drop"), sharp(HALF), ["layers that may go are gone"]),
    (changed(widths=lambda o: o[0]), sharp(HALF), ["the narrowest of their grids"]),
    (HALF, {d.name: torch.full((len(d.options),), 1 / len(d.options)) for d in SPACE.decisions}, ["100 % of the most"]),
    (HALF, {d.name: torch.ones(1) for d in SPACE.decisions}, []),
])  # fmt: skip
def test_signs_of_collapse(found, gates, said):
    lines = signs_of_collapse(SPACE, found, UNIFORM, gates)
    assert len(lines) == len(said) and all(part in line for part, line in zip(said, lines, strict=True))
    assert all("; try a " in line for line in lines)


def test_a_search_for_widths_that_ends_at_the_uniform_net():
    net = TimmSupernet(TimmBase("resnet18", 10, 3, 16, divisor=8, kwargs={"channels": [32, 32, 64, 64]}))
    table = CostTable.build(net.space, "macs")
    uniform = uniform_arch(net.space, {"macs": table}, (Budget("macs", 0.4 * table.of(table.extremes()[1])),))
    sure = {d.name: torch.eye(len(d.options))[d.index(uniform[d.name])] for d in net.space.decisions}
    by_name = net.space.by_name
    first = next(iter(uniform))
    near = net.space.complete(dict(uniform) | {first: by_name[first].options[by_name[first].index(uniform[first]) + 1]})
    other = net.space.complete(dict(uniform) | {first: by_name[first].options[-1]})
    for found, count in ((uniform, 1), (near, 1), (other, 0)):
        lines = signs_of_collapse(net.space, found, uniform, sure)
        assert len(lines) == count and all("within a step of the uniform net" in line for line in lines)


def test_gates_that_end_over_the_budget():
    limits = {"macs": 8e6, "params": 1e5}
    assert over_budget({"macs": 8.3e6, "params": 5e4}, limits) == []
    (line,) = over_budget({"macs": 9e6, "params": 5e4}, limits)
    assert "at 9MFLOPs, over the budget of 8MFLOPs" in line and "; try a longer --search-epochs" in line
