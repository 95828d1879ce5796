"""The parts of the networks of a search space, as they run when they are deployed. A latency table is measured on them.

The parts of a macro are those that timm's EfficientNet runs as one: the stem with its norm, a whole block, the head
with its norm and pooling, the classifier. A part of any other network of timm's is a convolution or linear layer with
all operations after it, up to the next such layer. Together the parts are the whole network, each operation once.
"""

import copy
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from timm.models import EfficientNet
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dnas.export import native
from dnas.nets.channels import Group, Op
from dnas.nets.cut_tensors import remove_channels
from dnas.nets.layer_supernet import space_of, squeeze_width
from dnas.nets.residual_blocks import when_inside
from dnas.nets.supernet import Supernet
from dnas.nets.timm_supernet import TimmSupernet
from dnas.spec.checks import UserError
from dnas.spec.image_size import ImgSize, sides, size_text, strided
from dnas.spec.layer_space import EfficientNetSpace, layers_of
from dnas.spec.space import Option, Site, Space

Widths = Mapping[str, int]
Built = tuple[nn.Module, tuple[Tensor, ...]]  # a module in eval mode, and inputs for it: on the CPU, float32
Build = Callable[[Widths, int], Built]  # from widths by slot, and a number of images


@dataclass(frozen=True)
class Part:
    """A part: ``site`` has the name of its unit in a latency table (``op``) and its widths; ``build`` makes the unit.

    ``build(widths, batch)`` returns a module and its inputs. ``more`` has widths that are worth measuring in addition
    to those of the space, by slot.
    """

    site: Site
    build: Build
    more: Mapping[str, tuple[int, ...]]

    def options(self, space: Space) -> dict[str, tuple[int, ...]]:
        """Slot -> all widths that it may have, ascending."""
        found = {}
        for slot, width in self.site.widths.items():
            own = space.by_name[width].options if isinstance(width, str) else (width,)
            found[slot] = tuple(sorted({*map(int, own), *self.more.get(slot, ())}))
        return found


RUN = "run"  # the unit of a run that computes nothing: its time is the time to start a run


def parts_of(net: Supernet) -> tuple[Part, ...]:
    """The parts of all networks of a supernet. The first part is `RUN`.

    Raises:
        UserError: a layer reads or writes several widths side by side (a concatenation); a unit has only one.
    """
    run = Part(Site(RUN, RUN, {}, {}), lambda widths, batch: (nn.Identity(), (torch.rand(1),)), {})
    return run, *(_timm_parts(net) if isinstance(net, TimmSupernet) else _macro_parts(net.outline))


# Macros.


def _macro_parts(macro: EfficientNetSpace) -> tuple[Part, ...]:
    sites = {site.name: site for site in space_of(macro).sites}
    last, size = f"stage{len(macro.stages) - 1}/width", macro.img_size
    parts = []

    def add(name: str, unit: str, widths: Mapping[str, Option], build: Build, **more: tuple[int, ...]) -> None:
        parts.append(Part(Site(name, unit, widths, {}, sites[name].when, sites[name].layer), build, more))

    stem = {"in": macro.in_chans, "out": "stem"}
    add(
        "conv_stem",
        f"stem k3/{macro.stem_stride} {macro.act} {size_text(macro.img_size)}px",
        stem,
        partial(_stem, macro),
    )
    tops = {"stem": macro.stem} | {f"stage{s}/width": stage.width for s, stage in enumerate(macro.stages)}
    for name, _, i, stage, before, width, stride, size_in in layers_of(macro):
        size = strided(size_in, stride)
        for c in stage.candidates:
            se, skip = squeeze_width(macro, c, tops[before]), i > 0
            widths = {"out": width} if skip else {"in": before, "out": width}  # with a shortcut both widths are one
            if c.kind != "ds":
                widths["mid"] = f"{name}/{c.name}/mid"
            row = {"kind": c.kind, "kernel": c.kernel, "stride": stride, "se": se, "skip": skip}
            unit = f"{c.kind} k{c.kernel}/{stride} se{se} {macro.act} {size_text(size_in)}px" + " skip" * skip
            add(f"{name}/{c.name}", unit, widths, partial(_block, macro.act, row, size_in))
    head = {"in": last, "out": "head"}
    add("conv_head", f"head {macro.act} {size_text(size)}px", head, partial(_head, macro.act, size))
    classes = {"in": "head", "out": macro.num_classes}
    add("classifier", "classifier", classes, _classifier, out=(10, 100, 1000))
    return tuple(parts)


def _native(
    act: str, in_width: int, row: Mapping[str, Any] | None = None, in_chans: int = 1, **given: Any
) -> EfficientNet:
    """An EfficientNet of one block (of any kind). A part is taken out of it, so that timm itself makes this part."""
    row = row or {"kind": "ds", "kernel": 1, "stride": 1, "mid": in_width, "out": in_width, "se": 0, "skip": False}
    net = {"act": act, "stem": {"width": in_width, "stride": 1}, "stages": [[row]], "head": 8, **given}
    return native.network(net, num_classes=1, in_chans=in_chans).eval()


def _stem(macro: EfficientNetSpace, widths: Widths, batch: int) -> Built:
    stem = {"width": widths["out"], "stride": macro.stem_stride}
    net = _native(macro.act, widths["out"], stem=stem, in_chans=widths["in"])
    return nn.Sequential(net.conv_stem, net.bn1), (torch.rand(batch, widths["in"], *sides(macro.img_size)),)


def _block(act: str, row: Mapping[str, Any], size: ImgSize, widths: Widths, batch: int) -> Built:
    in_width = widths.get("in", widths["out"])
    net = _native(act, in_width, {**row, "mid": widths.get("mid", in_width), "out": widths["out"]})
    return net.blocks[0][0], (torch.rand(batch, in_width, *sides(size)),)


def _head(act: str, size: ImgSize, widths: Widths, batch: int) -> Built:
    net = _native(act, widths["in"], head=widths["out"])
    return nn.Sequential(net.conv_head, net.bn2, net.global_pool), (torch.rand(batch, widths["in"], *sides(size)),)


def _classifier(widths: Widths, batch: int) -> Built:
    return nn.Linear(widths["in"], widths["out"]).eval(), (torch.rand(batch, widths["in"]),)


# Other networks of timm's.


def _timm_parts(net: TimmSupernet) -> tuple[Part, ...]:
    base, parts = net.outline, []
    told = "#" + hashlib.sha256(json.dumps(dict(base.kwargs), sort_keys=True).encode()).hexdigest()[:8]
    prefix = f"{base.name}{told if base.kwargs else ''} {base.in_chans}x{size_text(base.img_size)}px"
    found: dict[tuple, tuple[str, dict[str, Option]]] = {}
    plain = base.create(device="meta").eval()
    calls = _calls(net, plain, {}, 1)
    for op in net.whole.ops:
        slots = _slots(net, op)
        # Equal layers of a stage are one unit: the same calls on the same shapes, with the same dependence on widths.
        key = (_ways(net, op, [*slots.values()]), *(call.signature() for call in calls[op.module]))
        first, widths = found.setdefault(key, (op.module, slots))
        unit, build = f"{prefix} {first}", partial(_slice, net, plain, first, widths)
        when = when_inside(op.module, net.droppable)
        parts.append(Part(Site(op.module, unit, slots, {}, when), build, {}))
    return tuple(parts)


def _groups(net: TimmSupernet, op: Op) -> dict[str, Group]:
    """Slot -> the group of channels of one layer, if the group may get narrower. Raises UserError for two groups."""
    groups = {}
    for slot, axis in (("in", op.reads), ("out", op.writes)):
        found = [g for g in net.whole.groups if g.name in net.decision_of and axis in g.places]
        if len(found) > 1:
            raise UserError(
                f"{net.outline}: {op.module} has {len(found)} widths side by side (a concatenation), "
                "and a latency table can tell one only"
            )
        if found:
            groups[slot] = found[0]
    return groups


def _slots(net: TimmSupernet, op: Op) -> dict[str, Option]:
    """Slot -> width decision of one layer; only one slot if the layer reads and writes channels of one width."""
    slots: dict[str, Option] = {}
    for slot, group in _groups(net, op).items():
        if (decision := net.decision_of[group.name]) not in slots.values():
            slots[slot] = decision
    return slots


def _ways(net: TimmSupernet, op: Op, decisions: Sequence[Option]) -> tuple[tuple, ...]:
    """How the channels of a layer depend on widths.

    For each slot: its name, the index of its decision, the step and size of its group, the number of channels of a
    unit.
    """
    ways = []
    for slot, group in _groups(net, op).items():
        axis = op.reads if slot == "in" else op.writes
        which = decisions.index(net.decision_of[group.name])
        ways.append((slot, which, group.step, group.size, group.places[axis].shape[1] if axis else 0))
    return tuple(ways)


@dataclass(frozen=True)
class _Call:
    """A call of a torch function, with its arguments and its result."""

    func: Callable[..., Any]
    args: tuple
    kwargs: dict[str, Any]
    out: Any

    def signature(self) -> str:
        """A text that is the same for all calls that do the same work."""
        told = torch.utils._pytree.tree_map(
            lambda v: (tuple(v.shape), v.dtype) if isinstance(v, Tensor) else v, (self.args, self.kwargs)
        )
        return f"{self.func.__name__} {told}"


class _Recorder(TorchFunctionMode):
    """Records all calls that make tensors of tensors, under the layer that started last.

    Calls before all layers are recorded under the layer ``first``.
    """

    def __init__(self, first: str) -> None:
        super().__init__()
        self.running = first
        self.calls: dict[str, list[_Call]] = {}

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if _tensors((args, kwargs)) and _tensors(out):
            self.calls.setdefault(self.running, []).append(_Call(func, args, kwargs or {}, out))
        return out


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _calls(net: TimmSupernet, plain: nn.Module, widths: Mapping[str, int], batch: int) -> dict[str, list[_Call]]:
    """Layer -> the calls of its part, recorded on ``meta``.

    The network has these widths; all other widths are at their widest.
    """
    base, ops, model = net.outline, net.whole.ops, copy.deepcopy(plain)
    remove_channels(model, net.whole.cut(net.sizes(widths))[1])
    recorder = _Recorder(ops[0].module)

    def enter(name: str, *_: Any) -> None:
        recorder.running = name

    for op in ops:
        model.get_submodule(op.module).register_forward_pre_hook(partial(enter, op.module))
    with torch.no_grad(), recorder:
        model(torch.zeros(batch, base.in_chans, *sides(base.img_size), device="meta"))
    return recorder.calls


def _slice(
    net: TimmSupernet, plain: nn.Module, module: str, slots: Mapping[str, Option], widths: Widths, batch: int
) -> Built:
    sizes = {str(slots[slot]): width for slot, width in widths.items()}
    part = Slice(_calls(net, plain, sizes, batch)[module])
    return part.eval(), tuple(torch.rand(t.shape) for t in part.given)


class Slice(nn.Module):
    """Recorded calls of a network, in their order, on weights of their own.

    Its inputs are the maps that other parts of the network have made before.
    """

    def __init__(self, calls: Sequence[_Call]) -> None:
        super().__init__()
        self.given: list[Tensor] = []
        names: dict[int, str] = {}
        made: dict[int, tuple[int, int]] = {}

        def refer(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if id(value) in made:
                return _Made(*made[id(value)])
            if isinstance(value, nn.Parameter) or not value.is_floating_point() or value.ndim < 2:
                if id(value) not in names:
                    names[id(value)] = f"w{len(names)}"
                    own = torch.rand(value.shape) * 0.1 + 0.05 if value.is_floating_point() else value.new_zeros(
                        value.shape, device="cpu"
                    )  # fmt: skip
                    self.register_buffer(names[id(value)], own)
                return _Own(names[id(value)])
            for k, t in enumerate(self.given):
                if t is value:
                    return _Given(k)
            self.given.append(value)
            return _Given(len(self.given) - 1)

        self.steps = []
        for k, call in enumerate(calls):
            args, kwargs = torch.utils._pytree.tree_map(refer, (call.args, call.kwargs))
            self.steps.append((call.func, args, kwargs))
            made |= {id(t): (k, j) for j, t in enumerate(_tensors(call.out))}

    def forward(self, *given: Tensor) -> Tensor:
        """The maps of `given`, in order -> the first result of the last call."""
        made: list[list[Tensor]] = []

        def resolve(value: Any) -> Any:
            if isinstance(value, _Made):
                return made[value.step][value.index]
            if isinstance(value, _Own):
                return getattr(self, value.name)
            return given[value.index] if isinstance(value, _Given) else value

        for func, args, kwargs in self.steps:
            made.append(_tensors(func(*_resolved(args, resolve), **_resolved(kwargs, resolve))))
        return made[-1][0]


@dataclass(frozen=True)
class _Made:
    step: int
    index: int


@dataclass(frozen=True)
class _Own:
    name: str


@dataclass(frozen=True)
class _Given:
    index: int


def _resolved(value: Any, resolve: Callable[[Any], Any]) -> Any:
    """``value`` with references replaced by their tensors. It has to be fast, because it runs while time is taken."""
    if isinstance(value, dict):
        return {k: _resolved(v, resolve) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([_resolved(v, resolve) for v in value])
    return resolve(value)
