"""Rules of `dnas.nets.tracing` for layers with weights and for products: which units each axis of a weight holds."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from timm.layers import ScaledStdConv2d, ScaledStdConv2dSame
from torch import Tensor

from dnas.nets.channel_units import Record
from dnas.nets.channels import Axis, Op

MOST_WITHIN = 4  # a convolution with at most this many groups keeps all of them, and each group gets narrower


class Call(NamedTuple):
    """One operation of torch that has just run."""

    func: Any
    name: str
    args: Sequence
    kwargs: dict
    tensors: list[Tensor]  # all tensors among the arguments
    outs: list[Tensor]


def not_understood(record: Record, call: Call) -> None:
    """All units that enter are fixed."""
    for t in call.tensors:
        record.fix(record.units_of(t), call.name)


def convolution(record: Record, call: Call) -> None:
    """A convolution by a parameter, or by a weight that timm standardises first. No other weight is understood."""
    x, weight, bias, _, _, _, transposed, _, groups = call.args
    out, line = call.outs[0], record.units_along(x, 1)
    name, running = record.names.get(id(weight)), record.inside[-1]
    whole = groups == 1 or groups > MOST_WITHIN  # no group gets narrower
    if name is None and isinstance(record.running, (ScaledStdConv2d, ScaledStdConv2dSame)) and whole:
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
        macs = (x if transposed else out).numel() * weight.shape[1:].numel()
        record.add_product(torch.zeros(1, dtype=torch.long), macs)  # its cost counts, too


def matrix_product(record: Record, call: Call) -> None:
    """A linear layer if the last factor is a transposed weight. A product of two computed matrices is fixed.

    A layer that mixes positions (tokens) keeps its widths, and each row that it reads and writes keeps its unit.
    """
    (*before, x, weight), out = call.args, call.outs[0]
    if id(weight) not in record.transposed:
        record.add_product(torch.zeros(1, dtype=torch.long), out.numel() * x.shape[-1])
        not_understood(record, call)
        return
    rows = record.units_of(x)
    if record.units.varies(rows, 0) and not record.units.varies(rows, 1):
        record.add_product(rows[:, 0], weight.numel())
        record.set_units(out, rows[:, :1])
        return
    bias = before[0] if before else None
    _layer(record, out, record.units_along(x, 1), record.transposed[id(weight)], bias, 1)


def batched_product(record: Record, call: Call) -> None:
    """Each matrix of the batch, such as a head of attention, is a part that stays or goes whole with its factors."""
    *added, a, b = call.args[:3]
    if len(a) == 1:  # nothing can go
        not_understood(record, call)
        record.add_product(torch.zeros(1, dtype=torch.long), call.outs[0].numel() * a.shape[2])
        return
    units = record.units_of(a)[:, :1, :1]
    for factor in (a, b):
        record.units.join(record.units_of(factor), units)
    record.add_product(units.flatten(), call.outs[0][0].numel() * a.shape[2])
    for term in added:
        units = record.meet(units.expand(call.outs[0].shape), record.units_of(term))
    record.set_units(call.outs[0], units)


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
        record.add_sizes((line, 0))
        record.add_sizes((made, 0))
    if bias is not None and id(bias) in record.names:
        record.add_axis(record.names[id(bias)], 0, made)
    elif bias is not None:  # computed, as a concatenation of parameters
        record.join(made, record.units_of(bias), "a bias that is computed")
    positions = (out if x is None else x).shape[2:].numel() if conv else out.shape[0]
    before = record.ops[weight].positions if weight in record.ops else 0  # a layer may be used twice
    record.ops[weight] = Op(module, before + positions, reads, writing)
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
    """Channels that are normalised together stay or go together. One group of all channels is a norm over channels."""
    x, weight, bias, _, _, _, groups, _ = call.args
    if any(id(t) not in record.names for t in (weight, *([bias] if bias is not None else []))):
        not_understood(record, call)
        return
    line, module = record.units_along(x, 1), record.names[id(weight)].rpartition(".")[0]
    if groups == 1:
        record.norms.append(module)
    else:
        rows = line.reshape(groups, -1)
        record.units.join(rows, rows[:, :1])
        record.add_axis(f"{module}.num_groups", 0, rows[:, 0])
    record.add_axis(f"{module}.num_channels", 0, line)
    for t in (weight, *([bias] if bias is not None else [])):
        record.add_axis(record.names[id(t)], 0, line)
    record.set_channels(call.outs[0], line)


def layer_norm(record: Record, call: Call) -> None:
    """Weight and bias have the units of the last dimension. In a norm inside each head, a head stays or goes whole."""
    x, shape, *weights = call.args
    units = record.units_of(x)
    if record.of_one_layer(units[..., 0]):  # the channels inside of a head are those of other heads, too
        record.units.join(units, units[..., :1])
        record.set_units(call.outs[0], units[..., :1])
        return
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
