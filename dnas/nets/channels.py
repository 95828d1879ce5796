"""Which channels of a network must share a width, as plain data. `dnas.nets.tracing` finds this.

A *unit* is a set of channels that can only stay or go together: channels that an addition ties; a channel of a
depthwise convolution and the channel that it reads; a whole group of a grouped convolution; a whole head of attention.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

Axis = tuple[str, int]  # full name of a parameter, buffer or number of a module; a dimension (or index) of it


def is_inside(name: str, module: str) -> bool:
    """Whether a module, or what a full name names in one, is ``module`` or a part of it."""
    return name == module or name.startswith(f"{module}.")


@dataclass(frozen=True)
class Group:
    """Channels that share a width: ``size`` units. A narrower network keeps the first units.

    ``places`` has the positions of the units on each axis, [size, positions of a unit]. ``name`` is the layer that
    writes the channels, or a part of its output channels (``name[first:end]``). ``step`` is the number of output
    channels of this layer in one unit.
    """

    name: str
    size: int
    step: int
    places: Mapping[Axis, np.ndarray]


class ChannelAxis(NamedTuple):
    """A dimension of a parameter or buffer that holds the channels of one width decision.

    ``role`` is "out" for the weight of a convolution or linear layer that writes the channels (also of a depthwise
    convolution), "in" for the weight of a layer that reads them, and "norm" for every other tensor: most have one
    number for each channel. ``places`` has the positions along ``dim``, [units, positions of a unit].
    """

    module: nn.Module
    name: str
    dim: int
    role: Literal["out", "in", "norm"]
    places: np.ndarray

    def slices(self, of_gradient: bool = False) -> Tensor:
        """The numbers of the tensor that belong to each unit, [units, numbers of a unit].

        If ``of_gradient``, the numbers of its gradient; a tensor without a gradient has zeros.
        """
        tensor: Tensor = getattr(self.module, self.name)
        if of_gradient:
            tensor = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
        places = torch.from_numpy(self.places).to(tensor.device)
        return tensor.movedim(self.dim, 0)[places].flatten(1)


def layer_name(weight: str) -> str:
    """What a layer is called by: the path of its module; that of its weight if this is not called "weight"."""
    module, _, leaf = weight.rpartition(".")
    return module if leaf == "weight" else weight


@dataclass(frozen=True)
class Op:
    """A convolution or linear layer. ``writes`` is dimension 0 of its weight, ``reads`` is dimension 1.

    In a transposed convolution it is the other way round.

    ``positions`` is how often the weight is applied to one image. ``reads`` is None if the layer works channel by
    channel: a depthwise convolution, or a convolution in groups that stay or go whole.
    """

    module: str
    positions: int
    reads: Axis | None
    writes: Axis

    @property
    def name(self) -> str:
        """That of the module, or of the weight where a module has several or calls it otherwise."""
        return layer_name(self.writes[0])


@dataclass(frozen=True)
class Product:
    """Multiply-accumulates without a weight that gets narrower: a number of ``parts``, each of ``macs``.

    A part is a matrix of a batch (a head of attention), or a row that a linear layer mixes (a channel of an MLP-Mixer).
    ``own`` is {group: parts of one of its units}. All other parts stay.
    """

    module: str
    macs: int
    parts: int
    own: Mapping[str, int]


@dataclass(frozen=True)
class Channels:
    """The groups of channels in a network that can get narrower, and the layers that hold these channels.

    ``norms`` are the modules that normalise over channels (layer norms): in a narrower net they normalise over fewer
    channels. ``standardised`` are the convolutions that standardise their weights over the channels that they read
    (timm's ScaledStdConv2d). ``products`` has the multiply-accumulates of the widest network that are not those of
    ``ops``. ``fixed`` gives the reasons why channels stay, as "module: operation".
    """

    groups: tuple[Group, ...]
    ops: tuple[Op, ...]
    norms: tuple[str, ...]
    standardised: tuple[str, ...]
    products: tuple[Product, ...]
    fixed: tuple[str, ...]

    def cut(self, sizes: Mapping[str, int]) -> tuple["Channels", dict[Axis, np.ndarray]]:
        """The channels if each group keeps its first ``sizes[name]`` units, and the positions that go on each axis.

        A group that is not in ``sizes`` keeps all its units.
        """
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

    def without_blocks(self, blocks: Collection[str]) -> "Channels":
        """The channels of the network without these modules: without their layers and the axes in them."""

        def stays(name: str) -> bool:
            return not any(is_inside(name, block) for block in blocks)

        groups = [replace(g, places={axis: at for axis, at in g.places.items() if stays(axis[0])}) for g in self.groups]
        return replace(
            self,
            groups=tuple(g for g in groups if g.places),
            ops=tuple(op for op in self.ops if stays(op.module)),
            norms=tuple(filter(stays, self.norms)),
            standardised=tuple(filter(stays, self.standardised)),
            products=tuple(p for p in self.products if stays(p.module)),
        )

    def products_of(self, names: Collection[str]) -> frozenset[str]:
        """The modules with products of which parts belong to the groups ``names``."""
        return frozenset(p.module for p in self.products if any(name in names for name in p.own))

    def without(self, names: Sequence[str], why: str) -> "Channels":
        """The same without the groups ``names``, whose widths stay for the reason ``why``."""
        groups = tuple(g for g in self.groups if g.name not in names)
        return replace(self, groups=groups, fixed=(*self.fixed, *(f"{name}: {why}" for name in names)))
