"""Find which channels of a network must share a width (`dnas.nets.channels`) by one forward pass.

The pass keeps the units of every tensor (`dnas.nets.channel_units`). Each operation of torch has a rule that says how
it changes units: a convolution makes new units, an addition joins the units of its terms, a view or a concatenation
moves them. The rules know operations and no model classes, except norms and timm's weight-standardised convolutions.
If no rule understands an operation, then the units that enter it are fixed: in doubt a channel stays. The pass runs on
the device ``meta``, which needs no arithmetic and no memory.
"""

import copy
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from timm.layers import RmsNorm
from timm.layers.grn import GlobalResponseNorm
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dnas.nets.channel_units import FIXED, Record, channels_of
from dnas.nets.channels import Channels
from dnas.nets.layer_rules import (
    Call,
    batch_norm,
    batched_product,
    convolution,
    group_norm,
    layer_norm,
    matrix_product,
    not_understood,
)
from dnas.spec.checks import UserError, first_line

NORMS = (RmsNorm, nn.RMSNorm, GlobalResponseNorm)  # their means over channels are those of `weighted_norms`


def trace(model: nn.Module, image: Sequence[int], tied: Collection[str] = ()) -> Channels:
    """The channels of ``model`` (which is not changed) for images of (channels, height, width).

    Modules ``tied`` give a tensor the number of channels that they read: what they reshape to it shares its width.
    """
    model = on_meta(model).eval()
    record = Record(model)

    def entering(name: str) -> Callable[..., None]:
        def enter(module: nn.Module, args: tuple) -> None:
            record.inside.append(name)
            record.read.append(args[0] if name in tied else None)

        return enter

    def leave(*_: Any) -> None:
        record.inside.pop()
        record.read.pop()

    for name, module in model.named_modules():
        module.register_forward_pre_hook(entering(name))
        module.register_forward_hook(leave)
    with torch.no_grad(), _Tracer(record):
        out = model(torch.zeros(1, *image, device="meta", dtype=next(model.parameters()).dtype))
    for result in leaves(out):
        if isinstance(result, Tensor):
            record.units.fix(record.units_of(result))
    return channels_of(record)


def copied(model: nn.Module) -> nn.Module:
    """A copy of a network. Raises UserError if torch cannot copy it, as one with its old ``weight_norm``."""
    try:
        return copy.deepcopy(model)
    except RuntimeError as error:
        hint = "torch.nn.utils.parametrizations has norms of weights that can be copied"
        raise UserError(f"{type(model).__name__} cannot be copied ({first_line(error)}): {hint}") from None


def on_meta(model: nn.Module) -> nn.Module:
    """A copy on the device ``meta``, where modules that share a parameter still do (``Module.to`` makes them two)."""
    names: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    result = copied(model).to("meta")
    for first, *others in names.values():
        for name in others:
            path, _, own = name.rpartition(".")
            setattr(result.get_submodule(path), own, result.get_parameter(first))
    return result


class _Tracer(TorchDispatchMode):
    """Applies to each operation of a pass the rule of this operation."""

    def __init__(self, record: Record) -> None:
        super().__init__()
        self.record = record
        self.held: list[Any] = []  # keeps tensors alive: the record uses their ids, unique only while they live

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        tensors = [a for a in leaves((args, kwargs)) if isinstance(a, Tensor)]
        outs = [o for o in leaves(out) if isinstance(o, Tensor)]
        self.held.append((tensors, outs))
        call = Call(func, func.overloadpacket.__name__, args, kwargs, tensors, outs)
        default = element_wise if torch.Tag.pointwise in func.tags else not_understood
        RULES.get(call.name, default)(self.record, call)
        return out


def leaves(value: Any) -> list[Any]:
    """What lists, tuples and dicts hold, in order, however deep; the value itself if it is none of them."""
    if isinstance(value, dict):
        value = list(value.values())
    return [leaf for v in value for leaf in leaves(v)] if isinstance(value, (list, tuple)) else [value]


# The rules. A rule gives units to the results of an operation. A result that gets none is fixed.


def change_of_memory_format(record: Record, call: Call) -> None:
    """The tensor is changed in place, and each of its elements keeps its unit."""


def element_wise(record: Record, call: Call) -> None:
    """The units of elements that meet are joined."""
    total = record.units_of(call.tensors[0])
    for t in call.tensors[1:]:
        total = record.meet(total, record.units_of(t))
    record.set_units(call.outs[0], total)


def spatial(record: Record, call: Call) -> None:
    """Pooling and resizing of maps: each channel keeps its unit."""
    if call.args[0].ndim < 4:  # no map: a matrix of attention, say
        return not_understood(record, call)
    line = record.units_along(call.args[0], 1)
    for o in call.outs:
        record.set_channels(o, line)


def padding(record: Record, call: Call) -> None:
    """What is added along a dimension has the units of the other positions. If these differ, they are fixed."""
    units, out = record.units_of(call.args[0]), call.outs[0]
    for d in [d for d, length in enumerate(units.shape) if length != out.shape[d]]:
        if record.units.varies(units, d):
            return not_understood(record, call)
        units = units.narrow(d, 0, 1)
    record.set_units(out, units)


def reduction(record: Record, call: Call) -> None:
    """Elements that are summed, averaged or compared stay or go together."""
    at = 2 if call.name == "linalg_vector_norm" else 1
    out, dims = call.outs[0], call.args[at] if len(call.args) > at else None
    units = first = record.units_of(call.args[0])
    for d in [dims] if isinstance(dims, int) else dims or range(units.ndim):
        first = first.narrow(d, 0, 1)
    record.units.join(units, first)
    record.set_units(out, first.reshape(out.shape) if first.numel() == out.numel() else first)


def mean(record: Record, call: Call) -> None:
    """Norms over channels may have fewer channels, unless the channels are those inside of a head."""
    x, *dims = call.args[:2]
    norm = isinstance(record.running, NORMS) and dims and len(dims[0]) == 1
    if norm and not record.of_one_layer(record.units_of(x).select(dims[0][0], 0)):
        line, module = record.units_along(x, dims[0][0]), record.inside[-1]
        if hasattr(record.running, "normalized_shape"):
            record.add_axis(f"{module}.normalized_shape", 0, line)
        if isinstance(getattr(record.running, "weight", None), nn.Parameter):
            record.norms.append(module)
    else:
        reduction(record, call)


# Operations that only move elements are applied to the units as well.


def rearrangement(record: Record, call: Call) -> None:
    """Units move as their elements do."""
    _moved(record, call)


def view(record: Record, call: Call) -> None:
    """A view is a reshape here: units may lie in memory in another order than the elements."""
    (units,) = _moved(record, call._replace(func=torch.ops.aten.reshape.default, args=call.args[:2]))
    dims = [(units, dim) for dim in range(units.ndim)]
    for sizes in (*([dim] for dim in dims), dims):  # the module may keep numbers of the new shape, or all of them
        record.add_sizes(*sizes)
    read = record.read[-1]
    if read is not None and read.shape[-1] == units.shape[-1]:
        record.units.join(record.units_along(call.outs[0], -1), record.units_along(read, -1))


def expansion(record: Record, call: Call) -> None:
    """A constant that is repeated along one dimension, such as a mask for all heads, may be repeated less often."""
    (units,) = _moved(record, call)
    repeated = [d for d in range(units.ndim) if units.shape[d] > 1 and call.args[0].shape[d - units.ndim] == 1]
    if len(repeated) == 1 and call.args[0].ndim == units.ndim and not bool((units != FIXED).any()):
        made = record.units.fresh(units.shape[repeated[0]])
        record.set_units(call.outs[0], made.reshape([-1 if d in repeated else 1 for d in range(units.ndim)]))


def gathering(record: Record, call: Call) -> None:
    """The indices are not known here. So all positions that they may take stay or go together."""
    units, first = record.units_of(call.args[0]), [_zeros(arg) for arg in call.args[1:]]
    dims = [d for d, i in enumerate(first[0]) if i is not None] if call.name == "index" else first[:1]
    for d in dims:
        record.units.join(units, units.narrow(d, 0, 1))
    record.set_units(call.outs[0], call.func(units, *first))


def _zeros(arg: Any) -> Any:
    """An argument with zeros in the place of indices."""
    if isinstance(arg, (list, tuple)):
        return [_zeros(a) for a in arg]
    return torch.zeros(arg.shape, dtype=torch.long) if isinstance(arg, Tensor) else arg


def transposition(record: Record, call: Call) -> None:
    """A linear layer transposes its weight first; the name of the weight is kept for `matrix_product`."""
    if id(call.args[0]) in record.names:
        record.transposed[id(call.outs[0])] = record.names[id(call.args[0])]
    else:
        rearrangement(record, call)


def split(record: Record, call: Call) -> None:
    """Parts of the same size are cut alike, because the module knows only this size."""
    parts = _moved(record, call)
    dim = call.args[2] if len(call.args) > 2 else 0
    if call.name == "split" and len({part.shape[dim] for part in parts}) == 1:
        for part in parts[1:]:
            record.units.join(part, parts[0])
    for pieces in (parts, *([part] for part in parts), [torch.cat(parts, dim)]):
        record.add_sizes(*((piece, dim) for piece in pieces))


def slicing(record: Record, call: Call) -> None:
    """The bounds of a slice may be numbers that the module keeps."""
    _moved(record, call)
    if len(call.args) > 2:
        units, dim = record.units_of(call.args[0]), call.args[1]
        for bound in call.args[2:4]:
            if bound is not None and 0 < bound < units.shape[dim]:
                record.add_sizes((units.narrow(dim, 0, bound), dim))


def _moved(record: Record, call: Call) -> list[Tensor]:
    """Apply the operation to units, give the results to its outputs, and return them."""
    args = [_units_for(record, arg) for arg in call.args]
    kwargs = {k: v for k, v in call.kwargs.items() if k not in ("memory_format", "dtype", "device", "layout")}
    moved = call.func(*args, **kwargs)
    moved = list(moved) if isinstance(moved, (list, tuple)) else [moved]
    for o, units in zip(call.outs, moved, strict=True):
        record.set_units(o, units)
    return moved


def _units_for(record: Record, arg: Any) -> Any:
    """An argument with units in the place of tensors."""
    if isinstance(arg, (list, tuple)):
        return [_units_for(record, a) for a in arg]
    return record.units_of(arg) if isinstance(arg, Tensor) else arg


# The rule of each operation. An operation that is not here is `element_wise` if torch tags it as pointwise, otherwise
# `not_understood`.
RULES: dict[str, Callable[[Record, Call], None]] = {
    "convolution": convolution,
    "mm": matrix_product,
    "addmm": matrix_product,
    "bmm": batched_product,
    "baddbmm": batched_product,
    "native_batch_norm": batch_norm,
    "_native_batch_norm_legit": batch_norm,
    "_native_batch_norm_legit_no_training": batch_norm,
    "_batch_norm_no_update": batch_norm,
    "cudnn_batch_norm": batch_norm,
    "native_group_norm": group_norm,
    "native_layer_norm": layer_norm,
    "t": transposition,
    "split": split,
    "split_with_sizes": split,
    "slice": slicing,
    "view": view,
    "_unsafe_view": view,
    "_reshape_alias": view,
    "permute": rearrangement,
    "transpose": rearrangement,
    "unsqueeze": rearrangement,
    "squeeze": rearrangement,
    "expand": expansion,
    "repeat": rearrangement,
    "select": rearrangement,
    "unbind": rearrangement,
    "cat": rearrangement,
    "stack": rearrangement,
    "flip": rearrangement,
    "roll": rearrangement,
    "clone": rearrangement,
    "contiguous": rearrangement,
    "detach": rearrangement,
    "alias": rearrangement,
    "_to_copy": rearrangement,
    "lift_fresh": rearrangement,
    "avg_pool2d": spatial,
    "_adaptive_avg_pool2d": spatial,
    "max_pool2d_with_indices": spatial,
    "max_pool3d_with_indices": spatial,
    "avg_pool3d": spatial,
    "_adaptive_avg_pool3d": spatial,
    "upsample_trilinear3d": spatial,
    "adaptive_max_pool2d": spatial,
    "upsample_nearest2d": spatial,
    "upsample_bilinear2d": spatial,
    "upsample_bicubic2d": spatial,
    "_upsample_bilinear2d_aa": spatial,
    "_upsample_bicubic2d_aa": spatial,
    "constant_pad_nd": padding,
    "reflection_pad2d": spatial,
    "mean": mean,
    "sum": reduction,
    "amax": reduction,
    "_softmax": reduction,
    "_safe_softmax": reduction,
    "linalg_vector_norm": reduction,
    "index": gathering,
    "index_select": gathering,
    "gather": gathering,
    "hardswish": element_wise,  # torch does not tag these three
    "hardswish_": element_wise,
    "native_dropout": element_wise,
    "as_strided_": change_of_memory_format,
}
