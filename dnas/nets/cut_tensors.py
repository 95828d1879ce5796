"""Make tensors and modules narrower (or wider) in place, together with their optimizer state.

A parameter stays the same object: only ``param.data`` is replaced, so that optimizers and gates need not be rebuilt.
Every optimizer buffer with the shape of the parameter is cut in the same way.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dnas.nets.channels import Axis

# side of a module -> attributes that hold the width, and tensor name -> dimension that is cut
SIDES: dict[str, tuple[tuple[str, ...], dict[str, int]]] = {
    "out": (("out_channels", "out_features"), {"weight": 0, "bias": 0}),
    "in": (("in_channels", "in_features"), {"weight": 1}),
    "depthwise": (("in_channels", "out_channels", "groups"), {"weight": 0, "bias": 0}),
    "norm": (("num_features",), {"weight": 0, "bias": 0, "running_mean": 0, "running_var": 0}),
}


def _resized(old: Tensor, dim: int, width: int, fill: float | None) -> Tensor:
    """The first ``width`` slices of ``old`` along ``dim``. New slices are ``fill``.

    If ``fill`` is None, they are random, with the standard deviation of ``old``.
    """
    if width <= old.shape[dim]:
        return old.narrow(dim, 0, width).clone(memory_format=torch.preserve_format)
    shape = (*old.shape[:dim], width - old.shape[dim], *old.shape[dim + 1 :])
    if fill is None:
        return torch.cat([old, torch.randn(shape, dtype=old.dtype, device=old.device) * old.std()], dim)
    return torch.cat([old, old.new_full(shape, fill)], dim)


def _kept(old: Tensor, dim: int, index: Tensor) -> Tensor:
    like = torch.channels_last if old.ndim == 4 and old.is_contiguous(memory_format=torch.channels_last) else None
    return old.index_select(dim, index).contiguous(memory_format=like or torch.contiguous_format)


@torch.no_grad()
def _replace(
    owner: nn.Module,
    name: str,
    value: Callable[[Tensor], Tensor],
    state: Callable[[Tensor], Tensor],
    optimizers: Iterable[Optimizer],
) -> None:
    """Replace a parameter or buffer t by ``value(t)``, and each of its optimizer buffers b by ``state(b)``."""
    tensor = getattr(owner, name)
    if not isinstance(tensor, nn.Parameter):
        setattr(owner, name, value(tensor))
        return
    shape = tensor.shape
    tensor.data, tensor.grad = value(tensor.data), None
    for optimizer in optimizers:
        found = optimizer.state.get(tensor, {})
        if any(isinstance(v, Tensor) and v.ndim and v.shape != shape for v in found.values()):
            del optimizer.state[tensor]  # factored statistics (adafactor) cannot be cut: they start again
            continue
        found.update({k: state(v) for k, v in found.items() if isinstance(v, Tensor) and v.ndim})


def resize_tensor(
    owner: nn.Module, name: str, dim: int, width: int, optimizers: Iterable[Optimizer] = (), fill: float | None = 0.0
) -> None:
    """Cut or lengthen one parameter or buffer of ``owner`` along ``dim``, together with its optimizer buffers.

    New entries are as in `_resized`; those of optimizer buffers are zero.
    """
    tensor = getattr(owner, name)
    if tensor is not None and tensor.shape[dim] != width:
        value = partial(_resized, dim=dim, width=width, fill=fill)
        _replace(owner, name, value, partial(_resized, dim=dim, width=width, fill=0.0), optimizers)


def remove_channels(model: nn.Module, goes: Mapping[Axis, np.ndarray], optimizers: Iterable[Optimizer] = ()) -> None:
    """Remove positions from tensors, and reduce the numbers of channels that modules keep (see `Channels.cut`).

    A number that is a float is timm's ``scale`` of a weight, which is proportional to 1 / sqrt(channels read).
    """
    places = []
    for (full, index), gone in goes.items():
        path, _, name = full.rpartition(".")
        places.append((model.get_submodule(path), name, index, gone))
    # Scales come first, while the weights still have all the channels that they read.
    places.sort(key=lambda place: not isinstance(getattr(*place[:2]), float))
    for owner, name, index, gone in places:
        value = getattr(owner, name)
        if isinstance(value, Tensor):
            stay = np.setdiff1d(np.arange(value.shape[index]), gone)
            keep = partial(_kept, dim=index, index=torch.from_numpy(stay).to(value.device))
            _replace(owner, name, keep, keep, optimizers)
        elif isinstance(value, int):
            setattr(owner, name, value - len(gone))
        elif isinstance(value, float):
            length = owner.weight.shape[1]
            setattr(owner, name, value * math.sqrt(length / (length - len(gone))))
        else:
            numbers = list(value)
            numbers[index] -= len(gone)
            setattr(owner, name, type(value)(numbers))


def resize_module(module: nn.Module, side: str, width: int, optimizers: Iterable[Optimizer] = ()) -> None:
    """Give one side of a convolution, linear layer or norm ``width`` channels: the first channels stay.

    There are new channels if a pair of inner widths slides up. They start so that they change nothing yet: the ``in``
    side has zero weights, the other sides have random weights like the old ones, and a norm is the identity.
    """
    attributes, tensors = SIDES[side]
    for name in attributes:
        if hasattr(module, name):
            setattr(module, name, width)
    for name, dim in tensors.items():
        ones = side == "norm" and name in ("weight", "running_var")
        fill = None if name == "weight" and side in ("out", "depthwise") else float(ones)
        if getattr(module, name, None) is not None:
            resize_tensor(module, name, dim, width, optimizers, fill)
