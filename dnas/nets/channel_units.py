"""Units: which channels of a network stay or go together, and how the groups of `dnas.nets.channels` follow from them.

Every element of every tensor in a forward pass belongs to a unit. A unit is a number, so the units of a tensor are a
second tensor of the same shape. `dnas.nets.tracing` runs the pass and decides which units are joined.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dnas.nets.channels import Axis, Channels, Group, Op, Product, layer_name

FIXED = 0  # the unit of everything that cannot be cut: images, logits, and tensors that no rule understands
MOST_ELEMENTS = 2**20  # of a parameter that gets a unit for each element


class Units:
    """Numbered units that can be joined (union-find)."""

    def __init__(self) -> None:
        self.parent = [FIXED]  # of every unit; a unit that is its own parent represents all units joined with it

    def find(self, unit: int) -> int:
        """The unit that represents all units joined with this one."""
        root = unit
        while self.parent[root] != root:
            root = self.parent[root]
        while self.parent[unit] != root:  # shorten the path for the next search
            self.parent[unit], unit = root, self.parent[unit]
        return root

    def fresh(self, count: int) -> Tensor:
        """``count`` new units, [count]."""
        start = len(self.parent)
        self.parent.extend(range(start, start + count))
        return torch.arange(start, start + count)

    def join(self, a: Tensor, b: Tensor) -> None:
        """Join the units of two tensors element by element. Their shapes are broadcast."""
        a, b = torch.broadcast_tensors(a, b)
        # If both tensors only repeat their elements along a dimension, the first position is enough.
        once = [slice(0, 1) if not s and not t else slice(None) for s, t in zip(a.stride(), b.stride(), strict=True)]
        pairs = torch.stack([a[tuple(once)].flatten(), b[tuple(once)].flatten()])
        for one, two in torch.unique(pairs[:, pairs[0] != pairs[1]], dim=1).t().tolist():
            low, high = sorted((self.find(one), self.find(two)))
            self.parent[high] = low  # FIXED is the lowest: units that are joined with it become fixed

    def fix(self, units: Tensor) -> bool:
        """Join these units with `FIXED`. Returns False if the tensor holds only `FIXED`."""
        if not bool((units != FIXED).any()):
            return False
        self.join(units, torch.zeros_like(units))
        return True

    def roots(self, units: Tensor) -> Tensor:
        """For each element the unit that represents it."""
        found, back = torch.unique(units, return_inverse=True)
        return torch.tensor([self.find(unit) for unit in found.tolist()])[back]

    def varies(self, units: Tensor, dim: int) -> bool:
        """Whether the units differ along a dimension."""
        if units.shape[dim] == 1 or units.stride(dim) == 0 or bool((units == units.narrow(dim, 0, 1)).all()):
            return False
        own = self.roots(units)
        return bool((own != own.narrow(dim, 0, 1)).any())


class Record:
    """The facts about a network that are collected while its forward pass runs."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.names = {id(t): name for name, t in (*model.named_parameters(), *model.named_buffers())}
        self.units = Units()
        self.of: dict[int, Tensor] = {}  # id of a tensor -> units of its elements
        self.transposed: dict[int, str] = {}  # id of weight.t() -> name of the weight
        self.axes: dict[Axis, Tensor] = {}  # the units that each axis of the network holds
        self.loose: dict[str, Tensor] = {}  # units of parameters outside the known layers, such as layer scales
        self.sizes: list[tuple[Axis, Tensor]] = []  # numbers that may count channels, and the units that they count
        self.ops: dict[str, Op] = {}  # by the name of the weight
        self.norms: list[str] = []
        self.standardised: list[str] = []
        self.products: dict[Axis, tuple[str, int]] = {}  # a place in ``axes`` -> module, MACs of each part
        self.reasons: list[str] = []
        self.inside: list[str] = []  # the modules that run now, the innermost last
        self.read: list[Tensor | None] = []  # the input of each, if a reshape to its width is to be tied to it

    def units_of(self, t: Tensor) -> Tensor:
        """The units of a tensor, in its shape.

        Each element of a parameter outside the known layers gets a new unit when the parameter is first used, and so
        does a buffer with only one dimension longer than 1. Any other tensor without known units is fixed.
        """
        if id(t) in self.of:
            return self.of[id(t)]
        name, line = self.names.get(id(t)), t.numel() == max(t.shape, default=1)
        table = isinstance(t, nn.Parameter) and t.numel() <= MOST_ELEMENTS and not self._is_weight(name or "")
        if name is None or t.numel() == 1 or not (line or table):
            return torch.zeros((), dtype=torch.long).expand(t.shape)
        if name not in self.loose:
            self.loose[name] = self.units.fresh(t.numel()).reshape(t.shape)
        return self.loose[name]

    @property
    def running(self) -> nn.Module:
        """The innermost module that runs now."""
        return self.model.get_submodule(self.inside[-1])

    def _is_weight(self, name: str) -> bool:
        module, _, own = name.rpartition(".")
        return own == "weight" and isinstance(self.model.get_submodule(module), (nn.modules.conv._ConvNd, nn.Linear))

    def set_units(self, t: Tensor, units: Tensor) -> None:
        """Store the units of a tensor. Their shape is broadcast."""
        self.of[id(t)] = units.expand(t.shape)

    def set_channels(self, t: Tensor, line: Tensor) -> None:
        """Store the units of a tensor along dimension 1."""
        self.set_units(t, line.reshape(1, -1, *[1] * (t.ndim - 2)))

    def units_along(self, t: Tensor, dim: int) -> Tensor:
        """The units of a tensor along one dimension. Elements at the same place of this dimension are joined first."""
        units = self.units_of(t)
        line = first_line(units, dim)
        self.units.join(units, line.reshape([-1 if d == dim % units.ndim else 1 for d in range(units.ndim)]))
        return line

    def fix(self, units: Tensor, why: str) -> None:
        """Fix these units. If any of them could have been cut, note the running module with the reason."""
        if self.units.fix(units):
            self.reasons.append(f"{self.inside[-1]}: {why}")

    def of_one_layer(self, units: Tensor) -> bool:
        """Whether two of these units are different channels that one layer writes.

        Otherwise they are those of one channel in several tensors, as in class tokens beside patches.
        """
        found = set(self.units.roots(units.flatten()).tolist()) - {FIXED}
        written = [self.axes[op.writes] for op in self.ops.values()] if len(found) > 1 else []
        return any(len(found & set(self.units.roots(made).tolist())) > 1 for made in written)

    def meet(self, a: Tensor, b: Tensor) -> Tensor:
        """The units of the result of an element-wise operation on two tensors.

        The units of elements that meet are joined. Exception: if one element of a tensor meets several channels of the
        other (a map of one channel, a single number, a weight for each channel inside of a head), then only this tensor
        is fixed. A join would tie all these channels.
        """
        rank = max(a.ndim, b.ndim)
        a, b = (t.reshape([1] * (rank - t.ndim) + list(t.shape)) if t.ndim < rank else t for t in (a, b))
        for t, other in ((a, b), (b, a)):
            met = [d for d in range(rank) if t.shape[d] == 1 and self.units.varies(other, d)]
            alone = met and not any(self.units.varies(t, d) for d in range(rank))
            if alone or any(self.of_one_layer(first_line(other, d)) for d in met):
                self.units.fix(t)
                return other
        self.units.join(a, b)
        return torch.minimum(a, b)

    def join(self, units: Tensor, others: Tensor, why: str) -> None:
        """Join two tensors of units. If one is fixed and the other could have been cut, note ``why``."""
        if not bool((others != FIXED).any()):
            self.fix(units, why)
        else:
            self.units.join(units, others)

    def add_axis(self, name: str, index: int, units: Tensor) -> None:
        """Store the units on an axis of the network. If the axis has units already, both are joined."""
        if (name, index) in self.axes:
            self.units.join(self.axes[name, index], units)
        self.axes[name, index] = units

    def add_sizes(self, *parts: tuple[Tensor, int]) -> None:
        """Note the numbers by which the running module may have split or reshaped a tensor: (units, dimension) of each.

        An attribute of the module that equals the lengths of these dimensions may be such a number (or list of
        numbers). `channels_of` takes it if each position along the dimension has one unit: then the number must be cut
        together with the channels.
        """
        wanted, running = [units.shape[dim] for units, dim in parts], self.inside[-1]
        if any(bool((units != FIXED).any()) for units, _ in parts):
            for attribute, value in vars(self.running).items():
                if _numbers(value) == wanted:
                    for k, (units, dim) in enumerate(parts):
                        rows = _once(units.movedim(dim, 0))
                        self.sizes.append(((f"{running}.{attribute}", k), rows.reshape(wanted[k], -1)))

    def add_product(self, units: Tensor, macs: int) -> None:
        """Note ``macs`` multiply-accumulates for each of these units, without a weight that gets narrower."""
        axis = self.inside[-1], len(self.products)
        self.products[axis] = self.inside[-1], macs
        self.add_axis(*axis, units)


def first_line(units: Tensor, dim: int) -> Tensor:
    """The units along one dimension, at the start of all other dimensions."""
    line = units.movedim(dim, 0)
    while line.ndim > 1:
        line = line[:, 0]
    return line


def _add_lines(record: Record) -> None:
    """Add the axes that only the whole pass shows: numbers that count channels, and the channels of parameters.

    A parameter has its channels along the dimension on which each position has one unit. If there is none, the units
    are fixed.
    """

    known = {*record.axes}  # numbers of layers, which the rules of the layers know better
    for axis, rows in record.sizes:
        own = record.units.roots(rows)
        if axis not in known and bool((own == own[:, :1]).all()) and bool((own != FIXED).any()):
            record.add_axis(*axis, own[:, 0])
    for name, units in record.loose.items():
        own = record.units.roots(units)
        lines = [own.movedim(d, 0).reshape(own.shape[d], -1) for d in range(own.ndim)]
        dims = [d for d, line in enumerate(lines) if len(line) > 1 and bool((line == line[:, :1]).all())]
        if dims:
            record.add_axis(name, dims[0], lines[dims[0]][:, 0])
        elif record.units.fix(own):
            record.reasons.append(f"{name}: no dimension holds its channels")


def channels_of(record: Record) -> Channels:
    """The channels that a pass has found. Units on the same axes, equally often on each, form a group."""
    _add_lines(record)
    places: dict[int, dict[Axis, list[int]]] = {}  # of each unit that can be cut
    for axis, units in record.axes.items():
        for position, unit in enumerate(units.tolist()):
            if (root := record.units.find(unit)) != FIXED:
                places.setdefault(root, {}).setdefault(axis, []).append(position)
    alike: dict[tuple, list[dict[Axis, list[int]]]] = {}  # (axis, number of positions) of all axes -> units
    for at in places.values():
        alike.setdefault(tuple((axis, len(positions)) for axis, positions in at.items()), []).append(at)
    groups, parts = [], {axis: dict[str, int]() for axis in record.products}
    for signature, found in alike.items():
        written = [op.writes for op in record.ops.values() if op.writes in found[0]]
        if written and len(found) > 1:
            first = written[0]
            found.sort(key=lambda at: at[first][0])
            where = {axis: np.array([at[axis] for at in found]) for axis, _ in signature if axis not in parts}
            name, own = layer_name(first[0]), where[first]
            if own.size < len(record.axes[first]):  # the group is a part of what this layer writes
                name += f"[{own.min()}:{own.max() + 1}]"
            groups.append(Group(name, len(found), own.shape[1], where))
            for axis, count in signature:
                if axis in parts:
                    parts[axis][name] = count
    return Channels(
        groups=tuple(groups),
        ops=tuple(record.ops.values()),
        norms=tuple(record.norms),
        standardised=tuple(record.standardised),
        products=tuple(
            Product(module, macs, len(record.axes[axis]), parts[axis])
            for axis, (module, macs) in record.products.items()
        ),
        fixed=tuple(dict.fromkeys(record.reasons)),
    )


def _once(units: Tensor) -> Tensor:
    """The first position of every dimension but 0 along which a tensor only repeats its units."""
    return units[tuple(slice(0, 1) if d and not stride else slice(None) for d, stride in enumerate(units.stride()))]


def _numbers(value: Any) -> list:
    if type(value) is int:
        return [value]
    return list(value) if type(value) in (list, tuple) else []
