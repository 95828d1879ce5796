"""How channels of a network hang together (`dnas.nets.channels`), found by running it once.

Beside every tensor of one forward pass goes a second one of the same shape: the *unit* of each of its elements. A
convolution makes new units, an addition joins those of its terms, and whatever rearranges a tensor (views,
concatenation, splits, shuffles) is applied to the units themselves. No model class is known here. Units that enter an
operation which is not understood are joined with those that are fixed: in doubt a channel stays. The pass is on the
device ``meta``: no arithmetic, no memory.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from timm.layers import ScaledStdConv2d, ScaledStdConv2dSame
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dnas.nets.channels import Axis, Channels, Group, Op

FIXED = 0  # the unit of all that cannot be cut: images, logits, and what is not understood
MOST_WITHIN = 4  # a convolution of up to so many groups keeps their number: each group gets narrower


def trace(model: nn.Module, image: Sequence[int]) -> Channels:
    """The channels of ``model`` (which is not changed) for images of (channels, height, width)."""
    model = copy.deepcopy(model).to("meta").eval()
    tracer = _Tracer(model)
    for name, module in model.named_modules():
        module.register_forward_pre_hook(tracer.entering(name))
        module.register_forward_hook(tracer.leave)
    with torch.no_grad(), tracer:
        out = model(torch.zeros(1, *image, device="meta", dtype=next(model.parameters()).dtype))
    tracer.fix(tracer.units_of(out), "")
    return tracer.result()


class _Tracer(TorchDispatchMode):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.names = {id(t): name for name, t in (*model.named_parameters(), *model.named_buffers())}
        self.parent = [FIXED]  # of every unit: a forest of those that were joined
        self.units: dict[int, Tensor] = {}  # id of a tensor of the pass -> units of its elements
        self.held: list[Any] = []  # ids are unique only as long as their objects live
        self.transposed: dict[int, str] = {}  # id of weight.t() -> name of weight
        self.axes: dict[Axis, Tensor] = {}
        self.loose: dict[str, Tensor] = {}  # parameters that no known layer uses: layer scales and the like
        self.ops: dict[str, Op] = {}
        self.norms: list[str] = []
        self.standardised: list[str] = []
        self.products = 0
        self.reasons: list[str] = []
        self.inside: list[str] = []

    def entering(self, name: str) -> Callable[..., None]:
        return lambda module, args: self.inside.append(name)

    def leave(self, *_: Any) -> None:
        self.inside.pop()

    # Units.

    def find(self, unit: int) -> int:
        root = unit
        while self.parent[root] != root:
            root = self.parent[root]
        while self.parent[unit] != root:
            self.parent[unit], unit = root, self.parent[unit]
        return root

    def fresh(self, count: int) -> Tensor:
        start = len(self.parent)
        self.parent.extend(range(start, start + count))
        return torch.arange(start, start + count)

    def join(self, a: Tensor, b: Tensor) -> None:
        """Join the units of two tensors element by element; their shapes may be broadcast."""
        a, b = torch.broadcast_tensors(a, b)
        alike = [slice(0, 1) if not s and not t else slice(None) for s, t in zip(a.stride(), b.stride(), strict=True)]
        pairs = torch.stack([a[tuple(alike)].flatten(), b[tuple(alike)].flatten()])
        for one, two in torch.unique(pairs[:, pairs[0] != pairs[1]], dim=1).t().tolist():
            low, high = sorted((self.find(one), self.find(two)))
            self.parent[high] = low  # FIXED, the lowest, wins

    def meet(self, a: Tensor, b: Tensor) -> Tensor:
        """Units of what an element-wise operation makes of two tensors.

        An element that serves several channels (of a spatial map, or a lone number) stays, and they are free to go.
        """
        rank = max(a.ndim, b.ndim)
        a, b = (t.reshape([1] * (rank - t.ndim) + list(t.shape)) if t.ndim < rank else t for t in (a, b))
        for t, other in ((a, b), (b, a)):
            if any(t.shape[d] == 1 and _varies(other, d) for d in range(rank)):
                self.fix(t, "")
                return other
        self.join(a, b)
        return torch.maximum(a, b)

    def fix(self, units: Tensor, why: str) -> None:
        if bool((units != FIXED).any()):
            self.join(units, torch.zeros_like(units))
            if why:
                self.reasons.append(f"{self.inside[-1]}: {why}")

    def units_of(self, t: Tensor) -> Tensor:
        if id(t) in self.units:
            return self.units[id(t)]
        name = self.names.get(id(t))
        if name is None or t.numel() != max(t.shape, default=1) or t.numel() == 1:  # no parameter, or not one line
            return torch.zeros((), dtype=torch.long).expand(t.shape)
        if name not in self.loose:
            self.loose[name] = self.fresh(t.numel()).reshape(t.shape)
        return self.loose[name]

    def set(self, t: Tensor, units: Tensor) -> None:
        self.units[id(t)] = units.expand(t.shape)
        self.held.append(t)

    def along(self, t: Tensor, dim: int) -> Tensor:
        """Units along one dimension; what differs along the others is joined first."""
        units = self.units_of(t)
        line = _line(units, dim)
        self.join(units, line.reshape([-1 if d == dim % units.ndim else 1 for d in range(units.ndim)]))
        return line

    def axis(self, name: str, index: int, units: Tensor) -> None:
        """Say which units an axis of the network holds."""
        if (name, index) in self.axes:
            self.join(self.axes[name, index], units)
        self.axes[name, index] = units

    # Operations.

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        tensors = [a for a in _leaves((args, kwargs)) if isinstance(a, Tensor)]
        outs = [o for o in _leaves(out) if isinstance(o, Tensor)]
        self.held.append((tensors, outs))
        if name == "t" and id(args[0]) in self.names:
            self.transposed[id(out)] = self.names[id(args[0])]
        elif name == "convolution":
            self.convolution(out, *args)
        elif name in ("addmm", "mm") and id(args[-1]) in self.transposed:
            bias = args[0] if name == "addmm" else None
            self.layer(out, self.along(args[-2], 1), self.transposed[id(args[-1])], bias, 1)
        elif name in _BATCH_NORMS:
            self.batch_norm(outs[0], args)
        elif name == "native_group_norm" and args[6] > 1 and id(args[1]) in self.names:
            self.group_norm(out[0], *args)
        elif name == "native_layer_norm":
            self.layer_norm(outs[0], *args)
        elif name in _SHAPES:
            self.rearrange(func, outs, args, kwargs)
        elif torch.Tag.pointwise in func.tags or name in _POINTWISE:
            total = self.units_of(tensors[0])
            for t in tensors[1:]:
                total = self.meet(total, self.units_of(t))
            self.set(outs[0], total)
        elif name in _SPATIAL:
            line = self.along(args[0], 1)
            if len(line) != outs[0].shape[1]:  # padded by channels
                self.fix(line, name)
            for o in outs:
                self.set(o, line[:, None, None] if len(line) == o.shape[1] else torch.zeros((), dtype=torch.long))
        elif name in _REDUCTIONS:
            self.reduce(outs[0], *args[:2])
        elif not (name == "as_strided_" and out.shape == args[0].shape):  # that is a change of memory format
            if name in ("bmm", "mm", "addmm", "baddbmm"):
                self.products += outs[0].numel() * args[-2].shape[-1]
            for t in tensors:
                self.fix(self.units_of(t), name)
        return out

    def layer(self, out: Tensor, line: Tensor, weight: str, bias: Tensor | None, groups: int) -> None:
        """A convolution or linear layer that reads the units ``line`` and writes dimension 1 of ``out``."""
        module, conv = weight.rpartition(".")[0], out.ndim > 2
        standard = hasattr(self.model.get_submodule(module), "out_channels" if conv else "out_features")
        made = self.axes[weight, 0] if (weight, 0) in self.axes else self.fresh(out.shape[1])
        reads: Axis | None = (weight, 1)
        if groups > 1:
            ins, outs = line.reshape(groups, -1), made.reshape(groups, -1)
            if groups <= MOST_WITHIN and groups < len(line):
                self.join(ins, ins[:1])
                self.join(outs, outs[:1])
                self.axis(weight, 1, ins[0])
            else:
                self.join(ins, ins[:, :1])
                self.join(outs, ins[:, :1])
                if standard:
                    self.axis(f"{module}.groups", 0, ins[:, 0])
                reads = None
        else:
            self.axis(weight, 1, line)
        self.axis(weight, 0, made)
        if standard:
            self.axis(f"{module}.{'in_channels' if conv else 'in_features'}", 0, line)
            self.axis(f"{module}.{'out_channels' if conv else 'out_features'}", 0, made)
        else:  # a module of timm's with numbers of its own (BlurPool2d)
            for numbers in ([line], [made]):
                self.sizes(numbers)
        if bias is not None:
            self.axis(self.names[id(bias)], 0, made)
        positions = out.shape[2:].numel() if conv else out.shape[0]
        before = self.ops[module].positions if module in self.ops else 0  # a layer may be used twice
        self.ops[module] = Op(module, before + positions, reads, (weight, 0))
        self.set(out, made.reshape(1, -1, *[1] * (out.ndim - 2)))

    def convolution(self, out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> None:
        line, transposed, groups = self.along(x, 1), rest[3], rest[5]
        name, running = self.names.get(id(weight)), self.inside[-1]
        module = self.model.get_submodule(running)
        whole = groups == 1 or groups > MOST_WITHIN
        if name is None and isinstance(module, (ScaledStdConv2d, ScaledStdConv2dSame)) and whole:
            name = f"{running}.weight"
            self.layer(out, line, name, bias, groups)
            self.axis(f"{running}.gain", 0, self.axes[name, 0])
            if groups == 1:
                self.axis(f"{running}.scale", 0, line)
                self.standardised.append(running)
        elif name is not None and not transposed:
            self.layer(out, line, name, bias, groups)
        else:
            self.fix(line, "")
            what = "a transposed convolution" if transposed else "a convolution whose weight is computed"
            self.reasons.append(f"{running}: {what}")
            self.products += (x if transposed else out).numel() * weight.shape[1:].numel()  # it costs all the same

    def batch_norm(self, out: Tensor, args: Sequence) -> None:
        line = self.along(args[0], 1)
        own = [self.names[id(t)] for t in args[1:5] if id(t) in self.names]
        if len(own) < sum(isinstance(t, Tensor) for t in args[1:5]):
            self.fix(line, "a batch norm whose weights are computed")
        for name in own:
            self.axis(name, 0, line)
            self.axis(f"{name.rpartition('.')[0]}.num_features", 0, line)
        self.set(out, line.reshape(1, -1, *[1] * (out.ndim - 2)))

    def group_norm(self, out: Tensor, x: Tensor, weight: Tensor, bias: Tensor, *rest: Any) -> None:
        """Groups that are normalised together stay or go whole."""
        line, module = self.along(x, 1), self.names[id(weight)].rpartition(".")[0]
        rows = line.reshape(rest[3], -1)
        self.join(rows, rows[:, :1])
        self.axis(f"{module}.num_groups", 0, rows[:, 0])
        self.axis(f"{module}.num_channels", 0, line)
        for t in (weight, bias):
            self.axis(self.names[id(t)], 0, line)
        self.set(out, line.reshape(1, -1, *[1] * (out.ndim - 2)))

    def layer_norm(self, out: Tensor, x: Tensor, shape: Sequence[int], *weights: Any) -> None:
        line, own = self.along(x, -1), [self.names[id(t)] for t in weights[:2] if id(t) in self.names]
        if len(shape) > 1 or len(own) < 2:
            self.fix(line, "a layer norm without weights of its own, or over several dimensions")
        else:
            module = own[0].rpartition(".")[0]
            self.axis(f"{module}.normalized_shape", 0, line)
            for name in own:
                self.axis(name, 0, line)
            self.norms.append(module)
        self.set(out, line)

    def rearrange(self, func: Any, outs: Sequence[Tensor], args: Sequence, kwargs: dict) -> None:
        """What only moves elements moves their units alike. Chunks of one size are cut alike."""
        name = func.overloadpacket.__name__
        if name in ("view", "_unsafe_view", "_reshape_alias"):
            func, args = torch.ops.aten.reshape.default, args[:2]  # units may lie otherwise in memory
        args = [[self.units_of(a) if isinstance(a, Tensor) else a for a in arg] if isinstance(arg, (list, tuple)) else
                self.units_of(arg) if isinstance(arg, Tensor) else arg for arg in args]  # fmt: skip
        kwargs = {k: v for k, v in kwargs.items() if k not in ("memory_format", "dtype", "device", "layout")}
        moved = func(*args, **kwargs)
        moved = list(moved) if isinstance(moved, (list, tuple)) else [moved]
        if name in ("split", "split_with_sizes"):
            dim = args[2] if len(args) > 2 else 0
            lines = [_line(part, dim) for part in moved]
            if name == "split" and len({*map(len, lines)}) == 1:
                for part in moved[1:]:
                    self.join(part, moved[0])
            for pieces in (lines, *([line] for line in lines), [torch.cat(lines)]):
                self.sizes(pieces)
        elif name == "slice" and len(args) > 2:
            line = _line(args[0], args[1])
            for bound in args[2:4]:
                if bound is not None and 0 < bound < len(line):
                    self.sizes([line[:bound]])
        for o, part in zip(outs, moved, strict=True):
            self.set(o, part)

    def sizes(self, lines: Sequence[Tensor]) -> None:
        """A tensor was split by numbers of channels: where the running module keeps them, they are cut as well."""
        wanted = [len(line) for line in lines]
        if bool((torch.cat([*lines]) != FIXED).any()):
            for attribute, value in vars(self.model.get_submodule(self.inside[-1])).items():
                if ([value] if type(value) is int else list(value) if type(value) in (list, tuple) else []) == wanted:
                    for k, line in enumerate(lines):
                        self.axis(f"{self.inside[-1]}.{attribute}", k, line)

    def reduce(self, out: Tensor, x: Tensor, dims: int | Sequence[int] | None = None) -> None:
        """Elements that are summed, averaged or compared stay or go together."""
        units = first = self.units_of(x)
        for d in [dims] if isinstance(dims, int) else dims or range(units.ndim):
            first = first.narrow(d, 0, 1)
        self.join(units, first)
        self.set(out, first.reshape(out.shape) if first.numel() == out.numel() else first)

    # From units to groups.

    def result(self) -> Channels:
        """Units that are found in the same axes, equally often in each, have one width."""
        for name, units in self.loose.items():
            self.axis(name, int(np.argmax(units.shape)), units.flatten())
        places: dict[int, dict[Axis, list[int]]] = {}
        for axis, units in self.axes.items():
            for position, unit in enumerate(units.tolist()):
                if (root := self.find(unit)) != FIXED:
                    places.setdefault(root, {}).setdefault(axis, []).append(position)
        alike: dict[tuple, list[dict[Axis, list[int]]]] = {}
        for at in places.values():
            alike.setdefault(tuple((axis, len(positions)) for axis, positions in at.items()), []).append(at)
        groups = []
        for signature, found in alike.items():
            written = [op.writes for op in self.ops.values() if op.writes in found[0]]
            if written and len(found) > 1:
                first = written[0]
                found.sort(key=lambda at: at[first][0])
                where = {axis: np.array([at[axis] for at in found]) for axis, _ in signature}
                name, own = first[0].rpartition(".")[0], where[first]
                if own.size < len(self.axes[first]):  # a part of what this layer writes
                    name += f"[{own.min()}:{own.max() + 1}]"
                groups.append(Group(name, len(found), own.shape[1], where))
        ops, reasons = tuple(self.ops.values()), tuple(dict.fromkeys(self.reasons))
        return Channels(tuple(groups), ops, tuple(self.norms), tuple(self.standardised), self.products, fixed=reasons)


def _varies(units: Tensor, dim: int) -> bool:
    return units.shape[dim] > 1 and units.stride(dim) != 0 and bool((units != units.narrow(dim, 0, 1)).any())


def _line(units: Tensor, dim: int) -> Tensor:
    """Units along one dimension, at the start of all others."""
    line = units.movedim(dim, 0)
    while line.ndim > 1:
        line = line[:, 0]
    return line


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        value = list(value.values())
    return [leaf for v in value for leaf in _leaves(v)] if isinstance(value, (list, tuple)) else [value]


# Operations of torch by what they do to channels. Those that torch itself calls pointwise are not listed.
_BATCH_NORMS = {
    *("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training"),
    *("_batch_norm_no_update", "cudnn_batch_norm"),
}
_SHAPES = {
    *("view", "_unsafe_view", "reshape", "_reshape_alias", "permute", "transpose", "t", "unsqueeze", "squeeze"),
    *("expand", "slice", "select", "split", "split_with_sizes", "unbind", "cat", "stack", "clone", "contiguous"),
    *("flip", "roll", "repeat", "detach", "alias", "_to_copy", "lift_fresh"),
}
_POINTWISE = {"hardswish", "hardswish_", "native_dropout"}
_SPATIAL = {
    *("avg_pool2d", "max_pool2d_with_indices", "_adaptive_avg_pool2d", "adaptive_max_pool2d"),
    *("constant_pad_nd", "reflection_pad2d", "upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d"),
}
_REDUCTIONS = {"mean", "sum", "amax", "_softmax"}
