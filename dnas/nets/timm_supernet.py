"""A supernet around any convolutional network of timm's: a width gate on every group of channels that may get narrower.

Nothing is added to the network. A gate acts where its channels are read: the factor of a channel scales the weights of
the convolutions and linear layers that read it, ``conv(x * f, w) = conv(x, w * f)``, which costs a product of weights
instead of feature maps, applies each gate exactly once on every path, and leaves no norm behind it that could undo it.
"""

import copy
import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import timm
import torch
from timm.models import get_pretrained_cfg, load_state_dict
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

from dnas.nets.bipath_block import prefix_mask
from dnas.nets.channels import Axis, ChannelAxis, Channels
from dnas.nets.cut_tensors import remove_channels
from dnas.nets.layer_choice import Answers
from dnas.nets.markov_gate import MarkovGate
from dnas.nets.supernet import Gate, Supernet
from dnas.nets.tracing import trace
from dnas.spec.checks import UserError
from dnas.spec.space import Decision, Option, Site, Space

# What dnas itself tells timm, and what would make reading an arch file load or fetch something.
RESERVED = {
    *("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "num_classes"),
    *("in_chans", "features_only", "scriptable", "exportable", "no_jit"),
}


def check_kwargs(kwargs: Mapping[str, Any]) -> None:
    """Raise UserError unless these may be arguments of a base: plain data that says the same in JSON and in Python."""

    def is_plain(value: Any) -> bool:
        if isinstance(value, list):
            return all(map(is_plain, value))
        if isinstance(value, str):
            return re.fullmatch(r"[A-Za-z0-9._-]{0,64}", value) is not None
        return value is None or type(value) in (bool, int) or (type(value) is float and math.isfinite(value))

    for key, value in kwargs.items():
        if key in RESERVED or not key.isidentifier():
            others = ", ".join(sorted(RESERVED - {key}))
            raise UserError(f"model argument {key!r} may not be given, nor may {others}")
        if not is_plain(value):
            shown = " ".join(repr(value).split())[:60]
            allowed = "numbers, booleans, None, words of letters, digits and . _ -, or [lists] of these"
            raise UserError(f"model argument {key}={shown} is not one of {allowed}")


@dataclass(frozen=True)
class TimmBase:
    """A network of timm's, the widest of a space. ``divisor`` is the step of the width grids."""

    name: str
    num_classes: int
    in_chans: int = 3
    img_size: int = 224
    divisor: int = 8
    kwargs: Mapping[str, Any] = field(default_factory=dict)  # more arguments of timm.create_model

    def __str__(self) -> str:
        return f"--model {self.name}" + (f" --model-kwargs {dict(self.kwargs)}" if self.kwargs else "")

    def create(self, pretrained: bool = False, checkpoint: str | None = None, device: str = "cpu") -> nn.Module:
        """The network itself, with weights of timm's or from a file if asked for.

        Raises UserError if timm has no model of this name, or its weights cannot be had or do not fit.
        """
        if not timm.is_model(self.name):
            near = difflib.get_close_matches(self.name, timm.list_models(), 4, 0.4)
            raise UserError(f"--model {self.name!r} is no model of timm's; near are {', '.join(near) or 'none'}")
        check_kwargs(self.kwargs)
        if checkpoint and not Path(checkpoint).is_file():
            raise UserError(f"--initial-checkpoint {checkpoint!r} is no file")
        args = {"num_classes": self.num_classes, "in_chans": self.in_chans, **self.kwargs}
        given = f"--initial-checkpoint {checkpoint!r}" if checkpoint else f"--model {self.name} with {args}"
        try:
            if checkpoint:
                state = load_state_dict(checkpoint, weights_only=True)
                classifier = get_pretrained_cfg(self.name).classifier or ()
                heads = tuple(f"{c}." for c in ((classifier,) if isinstance(classifier, str) else classifier))
                needed = [n for n, _ in self.create(device="meta").named_parameters() if not n.startswith(heads)]
                if missing := [n for n in needed if n not in state]:
                    raise UserError(f"{given} has no weights for {missing[0]} and {len(missing) - 1} more tensors")
                args["pretrained_cfg_overlay"] = {"state_dict": state}
            with torch.device(device):
                return timm.create_model(self.name, pretrained=pretrained or bool(checkpoint), **args)
        except UserError:
            raise
        except (RuntimeError, OSError, ValueError, KeyError, TypeError, UnpicklingError) as error:
            raise UserError(f"{given} cannot be used: {str(error).splitlines()[0]}") from None


def channel_grid(top: int, step: int, divisor: int, most: int = 32) -> tuple[int, ...]:
    """``top``, and below it at most ``most`` multiples of ``divisor`` and ``step``, down to a tenth of it."""
    unit = math.lcm(step, divisor)
    unit *= math.ceil(top / (unit * most))
    return (*(w for w in range(unit, top, unit) if w >= top / 10), top)


def space_of_channels(
    channels: Channels, shapes: Mapping[str, torch.Size], filters: Mapping[str, torch.Size], divisor: int
) -> Space:
    """A width decision for every group with more than one width, and the costs of all layers.

    ``shapes`` are those of all parameters, ``filters`` those of buffers that convolve (BlurPool2d). Costs are products
    of widths, so that a layer that reads several groups side by side (a concatenation) is a site for each pair of a
    group that it reads and one that it writes.
    """
    grids = {g.name: channel_grid(g.size * g.step, g.step, divisor) for g in channels.groups}
    decisions = tuple(Decision(name, grid, grid[-1]) for name, grid in grids.items() if len(grid) > 1)
    open_groups = [g for g in channels.groups if len(grids[g.name]) > 1]

    def parts(axis: tuple[str, int] | None, length: int) -> dict[str | None, tuple[int, int]]:
        """Group -> (channels of a unit, its step) on an axis; None -> the channels that stay."""
        at = {g.name: (g.places[axis].shape[1], g.step, g.size) for g in open_groups if axis in g.places}
        rest = length - sum(n * size for n, _, size in at.values())
        found: dict[str | None, tuple[int, int]] = {name: (n, step) for name, (n, step, _) in at.items()}
        return found | ({None: (rest, 1)} if rest else {})

    sites = []

    def add(name: str, macs: int, params: int, ins: tuple, outs: tuple) -> None:
        (group_in, (n_in, step_in)), (group_out, (n_out, step_out)) = ins, outs
        fixed = {"macs": macs * n_in * n_out, "params": params * n_in * n_out, "step_in": step_in, "step_out": step_out}
        layer = name.partition(":")[0]
        sites.append(Site(name, "channels", {"in": group_in or 1, "out": group_out or 1}, fixed, (), layer))

    counted = set()
    for op in channels.ops:
        weight = op.writes[0]
        out, length, *kernel = {**filters, **shapes}[weight]
        area = math.prod(kernel)
        reads = parts(op.reads, length) if op.reads else {None: (length, 1)}
        for ins in reads.items():
            for outs in parts(op.writes, out).items():
                add(f"{op.module}:{ins[0]}:{outs[0]}", area * op.positions, area * (weight in shapes), ins, outs)
        counted.add(weight)
    for name, shape in shapes.items():
        if name not in counted:
            axes = {axis for g in open_groups for axis in g.places if axis[0] == name}
            axis = next(iter(axes), (name, 0))
            other = math.prod(shape) // shape[axis[1]] if shape else 1
            for outs in parts(axis, shape[axis[1]] if shape else 1).items():
                add(f"{name}:{outs[0]}", 0, other, (None, (1, 1)), outs)
    if channels.products:
        add("products", channels.products, 0, (None, (1, 1)), (None, (1, 1)))
    return Space(decisions, tuple(sites))


Factors = Mapping[str, Tensor]  # group -> the factor of each of its units
Reads = Mapping[Axis, tuple[frozenset[str], Tensor]]  # what reads -> its groups; where each channel finds its factor


def read_by(model: nn.Module, channels: Channels) -> Reads:
    """For every weight that reads channels and every layer norm: the factor's place among 1 and those of all units."""
    ends = np.cumsum([1, *(g.size for g in channels.groups)])
    starts = {g.name: end for g, end in zip(channels.groups, ends[:-1], strict=True)}
    found: dict[Axis, tuple[frozenset[str], Tensor]] = {}
    for name, dim in [op.reads for op in channels.ops if op.reads] + [(f"{n}.weight", 0) for n in channels.norms]:
        weight = model.get_parameter(name)
        index = np.zeros(weight.shape[dim], dtype=np.int64)
        groups = [g for g in channels.groups if (name, dim) in g.places]
        for g in groups:
            index[g.places[name, dim]] = starts[g.name] + np.arange(g.size)[:, None]
        if groups:
            found[name, dim] = frozenset(g.name for g in groups), torch.from_numpy(index).to(weight.device)
    return found


def gated(model: nn.Module, channels: Channels, reads: Reads, factors: Factors, x: Tensor) -> Tensor:
    """``model(x)`` with every channel scaled by the factor of its unit wherever it is read."""
    if not factors:
        return model(x)
    scaled, norms, like = {}, {}, next(model.parameters())
    every = torch.cat(
        [like.new_ones(1), *(factors[g.name] if g.name in factors else like.new_ones(g.size) for g in channels.groups)]
    )
    for (name, dim), (groups, index) in reads.items():
        if groups.isdisjoint(factors):
            continue
        weight, factor = model.get_parameter(name), every[index]
        if dim == 1:
            spread = factor.reshape(-1, *[1] * (weight.ndim - 2))
            if name.rpartition(".")[0] in channels.standardised:  # such a convolution subtracts means and scales by
                mean = (weight * spread).mean((1, 2, 3), keepdim=True) / spread.mean()  # deviations: those of what it
                scaled[name] = (weight - mean) * spread / spread.mean().sqrt()  # reads only, as a narrower one would
            else:
                scaled[name] = weight * spread
        else:
            norms[id(weight)] = factor
    with _WeightedNorms(norms) if norms else nullcontext():
        return functional_call(model, scaled, (x,))


class _WeightedNorms(TorchFunctionMode):
    """Within it, layer norms with these weights (by identity) count channels as much as their factors say."""

    def __init__(self, factors: Mapping[int, Tensor]) -> None:
        super().__init__()
        self.factors = factors

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        given = kwargs or {}  # torch's layer_norm names all but the first two
        factor = self.factors.get(id(given.get("weight"))) if func is nn.functional.layer_norm else None
        if factor is None:
            return func(*args, **given)
        share = factor / factor.sum()  # means over channels as products with a vector: one pass each
        x = args[0] - (args[0] @ share)[..., None]
        x = x * torch.rsqrt(x.square() @ share + given["eps"])[..., None]
        return torch.addcmul(given["bias"], x, given["weight"])


def safe_channels(model: nn.Module, image: Sequence[int]) -> Channels:
    """The channels of ``model`` without those groups that it cannot do with fewer of.

    What a network does with numbers that it has computed or kept elsewhere cannot be seen in one pass. So all groups
    are cut, and the logits are compared with those of the masked network, in double precision and with norms that
    hide nothing; where they differ or the network fails, the groups are tried in halves, and those that break it stay.
    """
    channels = trace(model, image)
    model = copy.deepcopy(model).double().eval()
    draws = torch.Generator().manual_seed(0)
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        if t.ndim == 1 and t.is_floating_point():  # at the start many are 0 or 1, and a branch times 0 shows nothing
            low = 0.5 if "var" in name or "weight" in name or "gamma" in name else -0.5
            t.data.copy_(torch.rand(t.shape, generator=draws) + low)
    x = torch.randn(1, *image, generator=draws, dtype=torch.double)

    def fails(names: Sequence[str]) -> str:
        """Why the network does not work with half of the channels of these groups; empty if it does."""
        sizes = {g.name: (g.size + 1) // 2 for g in channels.groups if g.name in names}
        factors = {g.name: (torch.arange(g.size) < sizes[g.name]).double() for g in channels.groups if g.name in names}
        masked, cut = gated(model, channels, read_by(model, channels), factors, x), copy.deepcopy(model)
        remove_channels(cut, channels.cut(sizes)[1])
        try:
            error = (cut(x) - masked).abs().max() / masked.abs().max()
        except Exception as problem:  # whatever the network's own code runs into
            return str(problem).splitlines()[0][:100]
        return "" if float(error) < 1e-9 else f"the logits differ by {float(error):.1e}"

    with torch.no_grad():
        good: list[str] = []

        def sort_out(names: list[str]) -> None:
            nonlocal channels
            if why := fails([*good, *names]):
                if len(names) == 1:
                    channels = channels.without(names, why)
                    return
                sort_out(names[: len(names) // 2])
                sort_out(names[len(names) // 2 :])
            else:
                good.extend(names)

        sort_out([g.name for g in channels.groups])
    return channels


class TimmSupernet(Supernet):
    """All narrower versions of a network of timm's.

    Args:
        base: the network, which is the widest of the space.
        pretrained, checkpoint: start from timm's weights, or from those in a file (with or without its classifier).
    """

    def __init__(self, base: TimmBase, pretrained: bool = False, checkpoint: str | None = None) -> None:
        super().__init__()
        self.outline, self.layers = base, nn.ModuleList()
        self.model = base.create(pretrained, checkpoint)
        image = (base.in_chans, base.img_size, base.img_size)
        try:
            self.channels = self.whole = safe_channels(self.model, image)
        except (RuntimeError, ValueError, TypeError, AssertionError, AttributeError) as error:
            why = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"{base} cannot be run on an image of {' x '.join(map(str, image))}: {why}") from None
        if not self.channels.groups:
            why = "; ".join(self.channels.fixed[:2]) or "it has no convolutions one after the other"
            raise UserError(f"{base} has no channels that can be cut: {why}")
        shapes = {name: p.shape for name, p in self.model.named_parameters()}
        filters = {name: b.shape for name, b in self.model.named_buffers() if b.ndim == 4}
        self.space = space_of_channels(self.channels, shapes, filters, base.divisor)
        self.widths = nn.ModuleList(MarkovGate(d.options) for d in self.space.decisions)
        self.steps = {g.name: g.step for g in self.channels.groups if g.name in self.space.by_name}
        self.reads: Reads = {}

    def forward(self, x: Tensor, answers: Answers) -> Tensor:
        """[B, in_chans, H, W] -> [B, num_classes]."""
        like, factors = next(self.model.parameters()), {}
        if not self.reads or next(iter(self.reads.values()))[1].device != like.device:
            self.reads = read_by(self.model, self.channels)
        for name, gate in self.gates().items():
            answer, step, widest = answers[name], self.steps[name], gate.widest()
            if isinstance(answer, Tensor):
                factors[name] = answer[::step]
            elif answer < widest:
                factors[name] = prefix_mask(widest // step, answer // step, like)
        return gated(self.model, self.channels, self.reads, factors, x)

    def gates(self) -> dict[str, Gate]:
        """Decision -> its gate."""
        gates: Iterable[Any] = self.widths
        return {d.name: gate for d, gate in zip(self.space.decisions, gates, strict=True)}

    def fit(self, optimizers: Sequence[Optimizer] = ()) -> None:
        """Cut every module to what the live gates need."""
        sizes = {name: gate.widest() // self.steps[name] for name, gate in self.gates().items()}
        self.channels, goes = self.channels.cut(sizes)
        remove_channels(self.model, goes, optimizers)
        self.reads = {}  # found anew in the next step

    def channel_axes(self) -> dict[str, list[ChannelAxis]]:
        """Width decision -> the tensor axes that hold its channels."""
        writes, reads = {op.writes for op in self.channels.ops}, {op.reads for op in self.channels.ops}
        axes: dict[str, list[ChannelAxis]] = {}
        for group in self.channels.groups:
            if group.name not in self.space.by_name:
                continue
            own = axes.setdefault(group.name, [])
            for (full, dim), index in group.places.items():
                path, _, name = full.rpartition(".")
                module = self.model.get_submodule(path)
                if isinstance(getattr(module, name), nn.Parameter):  # modules keep numbers of channels, too
                    role = "out" if (full, dim) in writes else "in" if (full, dim) in reads else "norm"
                    own.append(ChannelAxis(module, name, dim, role, index))
        return axes

    def net_of(self, arch: Mapping[str, Option]) -> dict[str, Any]:
        """The network as `dnas.export.narrowed.build` reads it: the base, and what is narrower in each module."""
        goes = self.whole.cut({name: int(width) // self.steps[name] for name, width in arch.items()})[1]
        return narrowed_net(self.outline, goes)

    def plain_state(self) -> dict[str, Tensor]:
        """The weights under the names of the plain network."""
        return self.model.state_dict()


def narrowed_net(base: TimmBase, goes: Mapping[Axis, np.ndarray]) -> dict[str, Any]:
    """A network as data, measured on a copy without memory: its new sizes by module, and what timm says about it."""
    plain = base.create(device="meta")
    before = measure(plain, base.in_chans, base.img_size)
    remove_channels(plain, goes)
    after = measure(plain, base.in_chans, base.img_size)
    modules: dict[str, dict[str, Any]] = {}
    for full, index in goes:
        path, _, name = full.rpartition(".")
        value, sizes = getattr(plain.get_submodule(path), name), modules.setdefault(path, {})
        if isinstance(value, (int, float)):
            sizes[name] = value
        else:
            lengths = value.shape if isinstance(value, Tensor) else value
            sizes.setdefault(name, [None] * len(lengths))[index] = lengths[index]
    # The numbers that timm reports or builds a new head from.
    heads = [(path, m) for path, m in plain.named_modules() if any(c is plain.get_classifier() for c in m.children())]
    for path, module in dict([("", plain), *heads]).items():
        for name in ("num_features", "in_features", "head_hidden_size", "hidden_size"):
            value = getattr(module, name, None)
            # num_features are the channels of the last map to a network, and what its classifier reads to a head.
            first = name == "in_features" or (module is plain and name == "num_features")
            keys = ("num_features", "head_hidden_size") if first else ("head_hidden_size", "num_features")
            key = next((k for k in keys if type(value) is int and value == before[k]), None)
            if key and name not in modules.get(path, {}):
                modules.setdefault(path, {})[name] = after[key]
    return {"base": base.name, "kwargs": dict(base.kwargs), "features": after["features"], "modules": modules}


def measure(model: nn.Module, in_chans: int, img_size: int) -> dict[str, Any]:
    """What timm says about a network, measured on one that is on ``meta``.

    Channels of all ``features`` levels; ``num_features``, channels of the last map, whose height and width are
    ``pool_size``; ``head_hidden_size``, what the classifier reads.
    """
    x = torch.zeros(1, in_chans, img_size, img_size, device="meta")
    with torch.no_grad():
        levels = model.eval().forward_intermediates(x, intermediates_only=True)
        last = model.forward_features(x)
        hidden = model.forward_head(last, pre_logits=True)
    if getattr(model, "output_fmt", "NCHW") != "NCHW":
        last = last.movedim(-1, 1)
    sizes = {"num_features": last.shape[1], "head_hidden_size": hidden.shape[1], "pool_size": tuple(last.shape[2:])}
    return {"features": [level.shape[1] for level in levels], **sizes}
