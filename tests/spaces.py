"""Spaces for the tests of what is derived from them: small ones, enumerated, and those of the supernets."""

import numpy as np

from dnas.methods.derive import enumerate_archs
from dnas.nets.layer_supernet import space_of
from dnas.spec.cost import CostTable
from dnas.spec.layer_space import Candidate, EfficientNetSpace, Stage
from supernets import SUPERNETS

METRICS = ("macs", "params")


def ir(kernel, expand, se=0.0):
    return Candidate("ir", kernel, expand, expand, se)


# Spaces of up to 10^4 networks: widths alone; choices of block and depth; depth.
SMALL = {
    "widths": EfficientNetSpace(
        *("widths", 32, 1, (Stage(32, 1, 2, (ir(3, 2),)), Stage(40, 1, 1, (ir(3, 1),))), 32, "relu", False, 4),
        img_size=8,
    ),
    "blocks": EfficientNetSpace(
        *("blocks", 8, 1),
        (
            Stage(16, 2, 1, (ir(3, 2), ir(5, 1, 0.25), Candidate("er", 3, 1)), droppable=True),
            Stage(24, 2, 2, (ir(3, 1), Candidate("ds", 5)), droppable=True),
        ),
        *(16, "relu", True, 4),
        img_size=8,
    ),
    "depth": EfficientNetSpace(
        "depth", 8, 1, (Stage(16, 5, 1, (ir(3, 2),), droppable=True),), 8, "relu", True, 4, img_size=8
    ),
}
LARGE = [("mobilenet_v2", 0.5), ("mobilenet_v2", 1.0), ("prunet", 0.5), ("prunet", 1.0)]


def tables_of(space):
    return {metric: CostTable.build(space, metric) for metric in METRICS}


def widest_cost(table):
    return table.of(table.extremes()[1])


def large(name, width_mult):
    space = space_of(SUPERNETS[name](num_classes=10, img_size=32, width_mult=width_mult))
    return space, tables_of(space)


class Brute:
    """All networks of a small space: their costs, and their answers as one-hot rows, for every likelihood at once."""

    def __init__(self, name):
        self.space = space_of(SMALL[name])
        self.tables = tables_of(self.space)
        self.archs = list(enumerate_archs(self.space))
        self.costs = {m: np.array([t.of(a) for a in self.archs]) for m, t in self.tables.items()}
        column = {pair: k for k, pair in enumerate((d.name, o) for d in self.space.decisions for o in d.options)}
        self.answers = np.zeros((len(self.archs), len(column)))
        for row, arch in enumerate(self.archs):
            self.answers[row, [column[pair] for pair in arch.items()]] = 1

    def scores(self, like):
        """Log-likelihood of every network."""
        values = np.concatenate([like[d.name] for d in self.space.decisions])
        dead = np.isinf(values)
        return np.where(self.answers @ dead > 0, -np.inf, self.answers @ np.where(dead, 0, values))

    def score(self, like, arch):
        return sum(float(like[n][self.space.by_name[n].index(o)]) for n, o in arch.items())

    def band(self, budgets):
        """Which networks keep all budgets and reach 98 % of one."""
        ratios = np.max([self.costs[b.metric] / b.limit for b in budgets], axis=0)
        return (ratios >= 0.98) & (ratios <= 1)


def assert_in_band(tables, budgets, arch):
    ratios = [tables[b.metric].of(arch) / b.limit for b in budgets]
    assert max(ratios) <= 1.0 and max(ratios) >= 0.98
