"""Find which channels of a network must share a width (`dnas.nets.channels`) by one forward pass.

The pass keeps the units of every tensor (`dnas.nets.channel_units`). Each operation of torch has a rule that says how
it changes units: a convolution makes new units, an addition joins the units of its terms, a view or a concatenation
moves them. The rules know operations and no model classes, except timm's weight-standardised convolutions. If no rule
understands an operation, then the units that enter it are fixed: in doubt a channel stays. The pass runs on the device
``meta``, which needs no arithmetic and no memory.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from timm.layers import ScaledStdConv2d, ScaledStdConv2dSame
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dnas.nets.channel_units import Record, channels_of, first_line
from dnas.nets.channels import Axis, Channels, Op

MOST_WITHIN = 4  # a convolution with at most this many groups keeps all of them, and each group gets narrower


def trace(model: nn.Module, image: Sequence[int]) -> Channels:
    """The channels of ``model`` (which is not changed) for images of (channels, height, width)."""
    model = on_meta(model).eval()
    record = Record(model)

    def entering(name: str) -> Callable[..., None]:
        return lambda module, args: record.inside.append(name)

    def leave(*_: Any) -> None:
        record.inside.pop()

    for name, module in model.named_modules():
        module.register_forward_pre_hook(entering(name))
        module.register_forward_hook(leave)
    with torch.no_grad(), _Tracer(record):
        out = model(torch.zeros(1, *image, device="meta", dtype=next(model.parameters()).dtype))
    for result in leaves(out):
        if isinstance(result, Tensor):
            record.units.fix(record.units_of(result))
    return channels_of(record)


def on_meta(model: nn.Module) -> nn.Module:
    """A copy on the device ``meta``, where modules that share a parameter still do (``Module.to`` makes them two)."""
    names: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    copied = copy.deepcopy(model).to("meta")
    for first, *others in names.values():
        for name in others:
            path, _, own = name.rpartition(".")
            setattr(copied.get_submodule(path), own, copied.get_parameter(first))
    return copied


class Call(NamedTuple):
    """One operation of torch that has just run."""

    func: Any
    name: str
    args: Sequence
    kwargs: dict
    tensors: list[Tensor]  # all tensors among the arguments
    outs: list[Tensor]


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


def not_understood(record: Record, call: Call) -> None:
    """All units that enter are fixed."""
    for t in call.tensors:
        record.fix(record.units_of(t), call.name)


def change_of_memory_format(record: Record, call: Call) -> None:
    """The tensor is changed in place, and each of its elements keeps its unit."""


def element_wise(record: Record, call: Call) -> None:
    """The units of elements that meet are joined."""
    total = record.units_of(call.tensors[0])
    for t in call.tensors[1:]:
        total = record.units.meet(total, record.units_of(t))
    record.set_units(call.outs[0], total)


def spatial(record: Record, call: Call) -> None:
    """Pooling, padding and resizing of maps: each channel keeps its unit. Padding by channels fixes all of them."""
    if call.args[0].ndim < 4:  # no map: a matrix of attention, say
        return not_understood(record, call)
    line = record.units_along(call.args[0], 1)
    if len(line) != call.outs[0].shape[1]:  # padded by channels
        record.fix(line, call.name)
    for o in call.outs:
        if len(line) == o.shape[1]:
            record.set_channels(o, line)
        else:
            record.set_units(o, torch.zeros((), dtype=torch.long))


def reduction(record: Record, call: Call) -> None:
    """Elements that are summed, averaged or compared stay or go together."""
    out, dims = call.outs[0], call.args[1] if len(call.args) > 1 else None
    units = first = record.units_of(call.args[0])
    for d in [dims] if isinstance(dims, int) else dims or range(units.ndim):
        first = first.narrow(d, 0, 1)
    record.units.join(units, first)
    record.set_units(out, first.reshape(out.shape) if first.numel() == out.numel() else first)


# Operations that only move elements are applied to the units as well.


def rearrangement(record: Record, call: Call) -> None:
    """Units move as their elements do."""
    _moved(record, call)


def view(record: Record, call: Call) -> None:
    """A view is a reshape here: units may lie in memory in another order than the elements."""
    _moved(record, call._replace(func=torch.ops.aten.reshape.default, args=call.args[:2]))


def transposition(record: Record, call: Call) -> None:
    """A linear layer transposes its weight first; the name of the weight is kept for `matrix_product`."""
    if id(call.args[0]) in record.names:
        record.transposed[id(call.outs[0])] = record.names[id(call.args[0])]
    else:
        rearrangement(record, call)


def split(record: Record, call: Call) -> None:
    """Parts of the same size are cut alike, because the module knows only this size."""
    parts = _moved(record, call)
    lines = [first_line(part, call.args[2] if len(call.args) > 2 else 0) for part in parts]
    if call.name == "split" and len({*map(len, lines)}) == 1:
        for part in parts[1:]:
            record.units.join(part, parts[0])
    for pieces in (lines, *([line] for line in lines), [torch.cat(lines)]):
        record.add_sizes(pieces)


def slicing(record: Record, call: Call) -> None:
    """The bounds of a slice may be numbers that the module keeps."""
    _moved(record, call)
    if len(call.args) > 2:
        line = first_line(record.units_of(call.args[0]), call.args[1])
        for bound in call.args[2:4]:
            if bound is not None and 0 < bound < len(line):
                record.add_sizes([line[:bound]])


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


# Layers with weights say which units each axis of a weight holds.


def convolution(record: Record, call: Call) -> None:
    """A convolution by a parameter, or by a weight that timm standardises first. No other weight is understood."""
    x, weight, bias, _, _, _, transposed, _, groups = call.args
    out, line = call.outs[0], record.units_along(x, 1)
    name, running = record.names.get(id(weight)), record.inside[-1]
    module = record.model.get_submodule(running)
    whole = groups == 1 or groups > MOST_WITHIN  # no group gets narrower
    if name is None and isinstance(module, (ScaledStdConv2d, ScaledStdConv2dSame)) and whole:
        name = f"{running}.weight"
        _layer(record, out, line, name, bias, groups)
        record.add_axis(f"{running}.gain", 0, record.axes[name, 0])
        if groups == 1:
            record.add_axis(f"{running}.scale", 0, line)
            record.standardised.append(running)
    elif name is not None and not (transposed and groups > 1):
        _layer(record, out, line, name, bias, groups, x if transposed else None)
    else:
        record.units.fix(line)
        what = "a transposed convolution in groups" if transposed else "a convolution whose weight is computed"
        record.reasons.append(f"{running}: {what}")
        record.products += (x if transposed else out).numel() * weight.shape[1:].numel()  # its cost counts, too


def matrix_product(record: Record, call: Call) -> None:
    """A linear layer if the last factor is a transposed weight. A product of two computed matrices is fixed."""
    *before, x, weight = call.args
    if id(weight) in record.transposed:
        bias = before[0] if before else None
        _layer(record, call.outs[0], record.units_along(x, 1), record.transposed[id(weight)], bias, 1)
    else:
        record.products += call.outs[0].numel() * x.shape[-1]
        not_understood(record, call)


def _layer(
    record: Record, out: Tensor, line: Tensor, weight: str, bias: Tensor | None, groups: int, x: Tensor | None = None
) -> None:
    """A convolution or linear layer that reads the units ``line`` and writes dimension 1 of ``out``.

    ``x`` is what a transposed convolution reads: dimension 0 of its weight has the channels that it reads, and the
    weight is applied once for each position of ``x``.
    """
    writing, reading = ((weight, 0), (weight, 1)) if x is None else ((weight, 1), (weight, 0))
    module, conv = weight.rpartition(".")[0], out.ndim > 2
    inputs, outputs = ("in_channels", "out_channels") if conv else ("in_features", "out_features")
    standard = hasattr(record.model.get_submodule(module), outputs)
    made = record.axes[writing] if writing in record.axes else record.units.fresh(out.shape[1])
    reads: Axis | None = reading
    if groups == 1:
        record.add_axis(*reading, line)
    else:
        ins, outs = line.reshape(groups, -1), made.reshape(groups, -1)
        if groups <= MOST_WITHIN and groups < len(line):  # all groups are cut alike
            record.units.join(ins, ins[:1])
            record.units.join(outs, outs[:1])
            record.add_axis(weight, 1, ins[0])
        else:  # each group stays or goes whole
            record.units.join(ins, ins[:, :1])
            record.units.join(outs, ins[:, :1])
            if standard:
                record.add_axis(f"{module}.groups", 0, ins[:, 0])
            reads = None
    record.add_axis(*writing, made)
    if standard:
        record.add_axis(f"{module}.{inputs}", 0, line)
        record.add_axis(f"{module}.{outputs}", 0, made)
    else:  # a module of timm's with numbers of its own (BlurPool2d)
        record.add_sizes([line])
        record.add_sizes([made])
    if bias is not None and id(bias) in record.names:
        record.add_axis(record.names[id(bias)], 0, made)
    elif bias is not None:
        record.fix(made, "a bias that is computed")
    positions = (out if x is None else x).shape[2:].numel() if conv else out.shape[0]
    before = record.ops[module].positions if module in record.ops else 0  # a layer may be used twice
    record.ops[module] = Op(module, before + positions, reads, writing)
    record.set_channels(out, made)


def batch_norm(record: Record, call: Call) -> None:
    """Weights and statistics have the units of the channels."""
    line = record.units_along(call.args[0], 1)
    own = [record.names[id(t)] for t in call.args[1:5] if id(t) in record.names]
    if len(own) < sum(isinstance(t, Tensor) for t in call.args[1:5]):
        record.fix(line, "a batch norm whose weights are computed")
    for name in own:
        record.add_axis(name, 0, line)
        record.add_axis(f"{name.rpartition('.')[0]}.num_features", 0, line)
    record.set_channels(call.outs[0], line)


def group_norm(record: Record, call: Call) -> None:
    """Channels that are normalised together stay or go together. One group of all channels is not understood."""
    x, weight, bias, _, _, _, groups, _ = call.args
    if groups == 1 or id(weight) not in record.names:
        not_understood(record, call)
        return
    line, module = record.units_along(x, 1), record.names[id(weight)].rpartition(".")[0]
    rows = line.reshape(groups, -1)
    record.units.join(rows, rows[:, :1])
    record.add_axis(f"{module}.num_groups", 0, rows[:, 0])
    record.add_axis(f"{module}.num_channels", 0, line)
    for t in (weight, bias):
        record.add_axis(record.names[id(t)], 0, line)
    record.set_channels(call.outs[0], line)


def layer_norm(record: Record, call: Call) -> None:
    """Weight and bias have the units of the last dimension."""
    x, shape, *weights = call.args
    line, own = record.units_along(x, -1), [record.names[id(t)] for t in weights[:2] if id(t) in record.names]
    if len(shape) > 1 or len(own) < 2:
        record.fix(line, "a layer norm without weights of its own, or over several dimensions")
    else:
        module = own[0].rpartition(".")[0]
        record.add_axis(f"{module}.normalized_shape", 0, line)
        for name in own:
            record.add_axis(name, 0, line)
        record.norms.append(module)
    record.set_units(call.outs[0], line)


# The rule of each operation. An operation that is not here is `element_wise` if torch tags it as pointwise, otherwise
# `not_understood`.
RULES: dict[str, Callable[[Record, Call], None]] = {
    "convolution": convolution,
    "mm": matrix_product,
    "addmm": matrix_product,
    "bmm": matrix_product,
    "baddbmm": matrix_product,
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
    "reshape": rearrangement,
    "permute": rearrangement,
    "transpose": rearrangement,
    "unsqueeze": rearrangement,
    "squeeze": rearrangement,
    "expand": rearrangement,
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
    "constant_pad_nd": spatial,
    "reflection_pad2d": spatial,
    "mean": reduction,
    "sum": reduction,
    "amax": reduction,
    "_softmax": reduction,
    "hardswish": element_wise,  # torch does not tag these three
    "hardswish_": element_wise,
    "native_dropout": element_wise,
    "as_strided_": change_of_memory_format,
}
