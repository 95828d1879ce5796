"""A network of timm's as a search space: its description, the widths of its groups of channels, and their costs."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pickle import UnpicklingError
from typing import Any

import timm
import torch
from timm.models import get_pretrained_cfg
from torch import nn

from dnas.nets.channels import Channels
from dnas.nets.own_base import OwnBase
from dnas.nets.residual_blocks import when_inside
from dnas.spec.checks import UserError, first_line, near_names
from dnas.spec.image_size import ImgSize, plain_size, sides
from dnas.spec.space import DROP, KEEP, Decision, Site, Space, When
from dnas.training.weights import read_weights

# Arguments that dnas itself passes to timm, or that would load or download something when an arch file is read.
RESERVED = {
    *("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "num_classes"),
    *("in_chans", "features_only", "scriptable", "exportable", "no_jit"),
}


# What timm raises where it cannot build a network with the given arguments.
BUILD_ERRORS = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, ZeroDivisionError)


def check_kwargs(kwargs: Mapping[str, Any]) -> None:
    """Raise UserError unless ``kwargs`` may be arguments of a base.

    Names in `RESERVED` are not allowed. Values must be plain data that is the same in JSON and in Python.
    """

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


def is_timms_own(name: str) -> bool:
    """Whether timm has a network of this name that nobody else has registered: only these can be exported."""
    return timm.is_model(name) and timm.models.model_entrypoint(name).__module__.startswith("timm.models.")


@dataclass(frozen=True)
class TimmBase:
    """A network of timm's, which is the widest net of a space.

    All widths of a grid below the widest are multiples of ``divisor``. A grid has at most ``most_widths`` widths. Each
    of ``ties`` is a text of shell patterns with commas between them: all groups of channels with a matching name share
    one width. Modules whose names match one of the patterns ``keep`` write as many channels as in the base.
    Each of ``divisors`` and ``min_widths`` is "PATTERN=N": the divisor of groups with a matching name, and their least
    width. Of several that match, the last one counts. If ``depth``, residual blocks may be dropped
    (`dnas.nets.residual_blocks`), but for those with a module that ``keep`` protects.
    """

    name: str
    num_classes: int
    in_chans: int = 3
    img_size: ImgSize = 224
    divisor: int = 8
    kwargs: Mapping[str, Any] = field(default_factory=dict)  # more arguments of timm.create_model
    ties: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    divisors: tuple[str, ...] = ()
    min_widths: tuple[str, ...] = ()
    most_widths: int = 32
    depth: bool = False

    def __str__(self) -> str:
        given = {k: v for k, v in self.kwargs.items() if k != "img_size" or v != plain_size(self.img_size)}  # `sized`
        return f"--model {self.name}" + (f" --model-kwargs {given}" if given else "")

    def create(self, pretrained: bool = False, checkpoint: str | None = None, device: str = "cpu") -> nn.Module:
        """The network, with timm's weights if ``pretrained``, or with the weights of the file ``checkpoint``.

        Raises UserError if timm has no model of this name, if arguments are not allowed, or if the weights cannot be
        loaded or do not fit.
        """
        if not timm.is_model(self.name):
            raise UserError(f"--model {self.name!r} is no model of timm's; {near_names(self.name, timm.list_models())}")
        check_kwargs(self.kwargs)
        args = {"num_classes": self.num_classes, "in_chans": self.in_chans, **self.kwargs}
        given = f"--initial-checkpoint {checkpoint!r}" if checkpoint else f"--model {self.name} with {args}"
        try:
            if checkpoint:
                state = read_weights(checkpoint, "--initial-checkpoint")
                classifier = get_pretrained_cfg(self.name).classifier or ()
                heads = tuple(f"{c}." for c in ((classifier,) if isinstance(classifier, str) else classifier))
                needed = [n for n, _ in self.create(device="meta").named_parameters() if not n.startswith(heads)]
                if missing := [n for n in needed if n not in state]:
                    raise UserError(f"{given} has no weights for {missing[0]} and {len(missing) - 1} more tensors")
                # timm drops a classifier of another number of classes than its own weights have.
                fits = {len(state[f"{h}weight"]) for h in heads if f"{h}weight" in state} == {self.num_classes}
                classes = {"num_classes": self.num_classes} if fits else {}
                args["pretrained_cfg_overlay"] = {"state_dict": state} | classes
            with torch.device(device):
                return timm.create_model(self.name, pretrained=pretrained or bool(checkpoint), **args)
        except UserError:
            raise
        except (OSError, UnpicklingError, *BUILD_ERRORS) as error:
            reason = first_line(error) or type(error).__name__
            raise UserError(f"{given} cannot be used: {reason}") from None


def sized(base: TimmBase) -> TimmBase:
    """The base with timm's argument ``img_size``, if timm builds this network for one size of images (transformers).

    Where timm cannot build it for this size, it is the base as it is: some such networks run at a few other sizes, too.
    """
    try:
        cfg = get_pretrained_cfg(base.name) if timm.is_model(base.name) else None
    except RuntimeError:  # no weights of this name, which `TimmBase.create` says
        return base
    if cfg is None or not cfg.fixed_input_size or "img_size" in base.kwargs:
        return base
    if sides(base.img_size) == tuple(cfg.input_size[1:]):
        return base
    built = replace(base, kwargs={**base.kwargs, "img_size": plain_size(base.img_size)})
    try:
        built.create(device="meta")
    except UserError:
        return base
    return built


Base = TimmBase | OwnBase


def protected(channels: Channels, model: nn.Module, patterns: Sequence[str]) -> Channels:
    """The channels without the groups that modules with a matching name write.

    Raises UserError if a pattern matches no module.
    """
    kept: set[str] = set()
    modules = [name for name, _ in model.named_modules() if name]
    for pattern in patterns:
        names = {name for name in modules if fnmatchcase(name, pattern)}
        if not names:
            raise UserError(f"--keep {pattern!r} matches no module; {near_names(pattern, modules)}")
        for group in channels.groups:
            writers = (op.module for op in channels.ops if op.writes in group.places)
            if any(fnmatchcase(own, pattern) for own in writers):
                kept.add(group.name)
    return channels.without([g.name for g in channels.groups if g.name in kept], "--keep")


def channel_grid(top: int, step: int, divisor: int, most: int, least: int = 1) -> tuple[int, ...]:
    """The ascending grid of widths up to ``top``: at most ``most`` widths, down to a tenth of ``top`` or to ``least``.

    All widths below ``top`` are multiples of ``divisor`` and ``step``.
    """
    unit = math.lcm(step, divisor)
    unit *= math.ceil(top / (unit * most))
    return (*(w for w in range(unit, top, unit) if w >= max(least, top / 10)), top)


def numbers_of(names: Sequence[str], rules: Sequence[str], flag: str, default: int) -> dict[str, int]:
    """Group -> its number, by rules "PATTERN=N" of which the last that matches counts.

    Raises UserError if a rule is none, or matches no group.
    """
    found = dict.fromkeys(names, default)
    for rule in rules:
        pattern, _, number = rule.rpartition("=")
        if not (pattern and number.isdecimal() and 1 <= int(number) <= 16384):
            raise UserError(f"{flag} {rule!r}: NAME=NUMBER is expected, with a number from 1 to 16384")
        matching = [name for name in names if fnmatchcase(name, pattern)]
        if not matching:
            raise UserError(f"{flag} {rule!r} matches no group of channels; {near_names(pattern, names)}")
        found |= dict.fromkeys(matching, int(number))
    return found


def tied(groups: Mapping[str, tuple[int, ...]], ties: Sequence[str]) -> dict[str, str]:
    """Group -> the first group of its tie, or itself. ``groups`` maps each group to its widths.

    Raises UserError if a tie has fewer than two groups, groups with different widths, or a group of another tie.
    """
    found, tie_of = {name: name for name in groups}, dict[str, str]()
    for tie in ties:
        patterns = tie.split(",")
        names = [name for name in groups if any(fnmatchcase(name, pattern) for pattern in patterns)]
        if len(names) < 2:
            count = f"{len(names)} groups of channels, not two or more"
            raise UserError(f"--tie {tie!r} matches {count}; {near_names(patterns[0], groups)}")
        for name in names:
            if groups[name] != groups[names[0]]:
                a, b = (f"{n} has the widths {_shown(groups[n])}" for n in (names[0], name))
                raise UserError(f"--tie {tie!r}: {a}, and {b}: groups with the same widths are expected")
            if name in tie_of:
                raise UserError(f"--tie {tie!r}: {name} is in --tie {tie_of[name]!r}, too: one tie a group is allowed")
            found[name], tie_of[name] = names[0], tie
    return found


def _shown(widths: Sequence[int]) -> str:
    return ", ".join(map(str, widths)) if len(widths) < 4 else f"{widths[0]}, {widths[1]}, ... {widths[-1]}"


def space_of_channels(
    channels: Channels,
    shapes: Mapping[str, torch.Size],
    filters: Mapping[str, torch.Size],
    base: Base,
    blocks: Sequence[str] = (),
) -> tuple[Space, dict[str, str]]:
    """A width decision for every group (or tie of groups) with more than one width, and the sites of all layers.

    There is a decision on each of the ``blocks``, too: whether it stays.

    Returns the space and {group: its decision}. ``shapes`` has the shapes of all parameters, ``filters`` those of
    buffers that convolve (BlurPool2d). The cost of a site is a product of widths. So a layer that reads several groups
    side by side (a concatenation) has one site for each pair of a group that it reads and a group that it writes.
    """
    names = [g.name for g in channels.groups]
    divisors = numbers_of(names, base.divisors, "--divisor-of", base.divisor)
    least = numbers_of(names, base.min_widths, "--min-width", 1)
    grids = {
        g.name: channel_grid(g.size * g.step, g.step, divisors[g.name], base.most_widths, least[g.name])
        for g in channels.groups
    }
    grids = {name: grid for name, grid in grids.items() if len(grid) > 1}
    decision_of = tied(grids, base.ties)
    open_groups = [g for g in channels.groups if g.name in grids]
    around: dict[str, set[When]] = {}  # decision -> the blocks around its channels
    for g in open_groups:
        around.setdefault(decision_of[g.name], set()).update(when_inside(axis[0], blocks) for axis in g.places)
    decisions = [Decision(f"{block}/keep", (DROP, KEEP), KEEP, layer=block) for block in blocks]
    for n in (n for n in grids if decision_of[n] == n):
        when = next(iter(around[n])) if len(around[n]) == 1 else ()
        decisions.append(Decision(n, grids[n], grids[n][-1], when))

    def parts(axis: tuple[str, int] | None, length: int) -> dict[str | None, tuple[int, int]]:
        """Group -> (channels of a unit, its step) on an axis. None -> (number of channels that stay, 1)."""
        at = {g.name: (g.places[axis].shape[1], g.step, g.size) for g in open_groups if axis in g.places}
        rest = length - sum(n * size for n, _, size in at.values())
        found: dict[str | None, tuple[int, int]] = {name: (n, step) for name, (n, step, _) in at.items()}
        return found | ({None: (rest, 1)} if rest else {})

    sites = []

    def add(name: str, macs: int, params: int, ins: tuple, outs: tuple) -> None:
        (group_in, (n_in, step_in)), (group_out, (n_out, step_out)) = ins, outs
        fixed = {"macs": macs * n_in * n_out, "params": params * n_in * n_out, "step_in": step_in, "step_out": step_out}
        layer = name.partition(":")[0]
        widths = {"in": decision_of.get(group_in, 1), "out": decision_of.get(group_out, 1)}
        sites.append(Site(name, "channels", widths, fixed, when_inside(layer, blocks), layer))

    counted = set()
    for op in channels.ops:
        weight = op.writes[0]
        shape = {**filters, **shapes}[weight]
        out, length, area = shape[op.writes[1]], shape[1 - op.writes[1]], math.prod(shape[2:])
        reads = parts(op.reads, length) if op.reads else {None: (length, 1)}
        for ins in reads.items():
            for outs in parts(op.writes, out).items():
                add(f"{op.name}:{ins[0]}:{outs[0]}", area * op.positions, area * (weight in shapes), ins, outs)
        counted.add(weight)
    for name, shape in shapes.items():
        if name not in counted:
            axes = {axis for g in open_groups for axis in g.places if axis[0] == name}
            axis = next(iter(axes), (name, 0))
            other = math.prod(shape) // shape[axis[1]] if shape else 1
            for outs in parts(axis, shape[axis[1]] if shape else 1).items():
                add(f"{name}:{outs[0]}", 0, other, (None, (1, 1)), outs)
    for k, product in enumerate(channels.products):
        own = {g.name: (product.own[g.name], g.step) for g in open_groups if g.name in product.own}
        rest = product.parts - sum(n * g.size for g in open_groups for n in [product.own.get(g.name, 0)])
        for outs in (own | ({None: (rest, 1)} if rest else {})).items():
            add(f"{product.module}:product{k}:{outs[0]}", product.macs, 0, (None, (1, 1)), outs)
    return Space(tuple(decisions), tuple(sites)), decision_of
