"""Which channels of a network must share a width, as plain data; `dnas.nets.tracing` finds it for any CNN.

A *unit* is a set of channels that can only stay or go together: those that an addition ties, a channel of a depthwise
convolution and the one that it reads, a whole group of a grouped convolution.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

Axis = tuple[str, int]  # a parameter, buffer or number of a module by its full name, and a dimension (or index) of it


@dataclass(frozen=True)
class Group:
    """Channels that share a width: ``size`` units, of which a narrower network keeps the first ones.

    ``places`` says for each axis where the units are, [size, positions of a unit]. ``step`` is the number of output
    channels of the layer ``name`` (or of a part of them, ``name[first:end]``) that a unit is.
    """

    name: str
    size: int
    step: int
    places: Mapping[Axis, np.ndarray]


class ChannelAxis(NamedTuple):
    """Where a parameter or buffer of a module holds channels of one width decision.

    ``role`` is "out" for the weight of a convolution or linear layer that writes them (a depthwise convolution, too),
    "in" for one that reads them, "norm" for everything that holds one number a channel. ``places`` is [units, positions
    of a unit] along ``dim``.
    """

    module: nn.Module
    name: str
    dim: int
    role: Literal["out", "in", "norm"]
    places: np.ndarray

    def slices(self, of_gradient: bool = False) -> Tensor:
        """What the tensor, or its gradient, holds of each unit, [units, numbers]."""
        tensor: Tensor = getattr(self.module, self.name)
        if of_gradient:
            tensor = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
        places = torch.from_numpy(self.places).to(tensor.device)
        return tensor.detach().movedim(self.dim, 0)[places].flatten(1)


@dataclass(frozen=True)
class Op:
    """A convolution or linear layer, which writes dimension 0 of its weight.

    ``positions`` is how often the weight is applied to one image. ``reads`` is dimension 1 of the weight, None where
    the layer works channel by channel (depthwise, or in groups that stay or go whole).
    """

    module: str
    positions: int
    reads: Axis | None
    writes: Axis


@dataclass(frozen=True)
class Channels:
    """What can be narrowed in a network, and how it hangs together.

    ``norms`` are the modules that normalise over channels (layer norms): in a narrower net they see fewer.
    ``standardised`` are convolutions whose weights are, over the channels that they read (timm's ScaledStdConv2d).
    ``products`` is the number of multiply-accumulates in which nothing is cut: of matrix products without weights
    (attention), and of convolutions that are not understood. ``fixed`` tells why channels stay: "module: operation".
    """

    groups: tuple[Group, ...]
    ops: tuple[Op, ...]
    norms: tuple[str, ...]
    standardised: tuple[str, ...]
    products: int
    fixed: tuple[str, ...]

    def cut(self, sizes: Mapping[str, int]) -> tuple["Channels", dict[Axis, np.ndarray]]:
        """What is left when groups keep their first units only, and for each axis the positions that go."""
        gone: dict[Axis, list[np.ndarray]] = {}
        for group in self.groups:
            for axis, at in group.places.items():
                gone.setdefault(axis, []).append(at[sizes.get(group.name, group.size) :].ravel())
        goes = {axis: np.sort(np.concatenate(parts)) for axis, parts in gone.items()}
        goes = {axis: positions for axis, positions in goes.items() if len(positions)}
        groups = []
        for group in self.groups:
            size = sizes.get(group.name, group.size)
            places = {axis: at[:size] for axis, at in group.places.items()}
            places = {a: at - np.searchsorted(goes[a], at) if a in goes else at for a, at in places.items()}
            groups.append(replace(group, size=size, places=places))
        return replace(self, groups=tuple(groups)), goes

    def without(self, names: Sequence[str], why: str) -> "Channels":
        """The same with some groups left as they are."""
        groups = tuple(g for g in self.groups if g.name not in names)
        return replace(self, groups=groups, fixed=(*self.fixed, *(f"{name}: {why}" for name in names)))
