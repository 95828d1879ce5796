"""Supernets made of layers: timm's own blocks at full width, several to a layer.

An `EfficientNetSpace` describes the space as plain data. The decisions and the rows of a found net follow from this
data alone, and the modules are built from it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
from timm.layers import BatchNormAct2d, SelectAdaptivePool2d, create_conv2d
from timm.models._efficientnet_blocks import DepthwiseSeparableConv, EdgeResidual, InvertedResidual, SqueezeExcite
from timm.models._efficientnet_builder import efficientnet_init_weights
from torch import Tensor, nn
from torch.optim import Optimizer

from dnas.nets.bipath_block import GatedBlock, PairGate, Prunode, TimmBlock, channel_factors, parts, scaled_norm, share
from dnas.nets.channels import ChannelAxis
from dnas.nets.cut_tensors import SIDES, resize_module
from dnas.nets.layer_choice import Answers, StochasticLayer
from dnas.nets.markov_gate import MarkovGate
from dnas.nets.supernet import Gate, Supernet
from dnas.spec.budget import Budget
from dnas.spec.cost import CostTable
from dnas.spec.image_size import pixels, strided
from dnas.spec.layer_space import Candidate, EfficientNetSpace, layers_of, nearest, round_width, width_grid
from dnas.spec.space import DROP, KEEP, Decision, Option, Site, Space

ACTS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "relu6": nn.ReLU6, "silu": nn.SiLU, "hard_swish": nn.Hardswish}


def squeeze_width(macro: EfficientNetSpace, candidate: Candidate, widest_in: int) -> int:
    """The number of squeeze channels, or 0. It is fixed for each layer.

    timm ties it to the input width, which is searched here.
    """
    return max(4, round(candidate.se * widest_in)) if candidate.se else 0


def hidden_top(candidate: Candidate, widest_in: int, divisor: int) -> int:
    """The widest hidden width: a multiple of ``divisor`` and of 8, as timm rounds it to multiples of 8."""
    return round_width(candidate.expand * widest_in, math.lcm(8, divisor))


def space_of(macro: EfficientNetSpace) -> Space:
    """All decisions and sites of a macro, without building a module."""
    tops = {"stem": macro.stem} | {f"stage{s}/width": stage.width for s, stage in enumerate(macro.stages)}
    grid_of = partial(width_grid, divisor=macro.divisor, most=macro.most_widths)
    decisions = [Decision(n, grid_of(top), top) for n, top in (tops | {"head": macro.head}).items()]
    size = strided(macro.img_size, macro.stem_stride)
    conv = {"in": macro.in_chans, "out": "stem"}
    sites = [Site("conv_stem", "conv", conv, {"kernel": 3, "size": pixels(size)})]
    for name, _, i, stage, before, width, stride, size_in in layers_of(macro):
        size = strided(size_in, stride)
        there: tuple[tuple[str, Option], ...] = ()
        if stage.droppable and i > 0:
            decisions.append(Decision(f"{name}/keep", (DROP, KEEP), KEEP, layer=name))
            there = ((f"{name}/keep", KEEP),)
        names = tuple(c.name for c in stage.candidates)
        if len(names) > 1:
            decisions.append(Decision(f"{name}/block", names, names[0], there, name))
        for c in stage.candidates:
            when = (*there, (f"{name}/block", c.name)) if len(names) > 1 else there
            fixed = {"kernel": c.kernel, "size": pixels(size), "se": squeeze_width(macro, c, tops[before])}
            widths: dict[str, Option] = {"in": before, "out": width}
            if c.kind != "ds":
                mid = f"{name}/{c.name}/mid"
                grid = grid_of(hidden_top(c, tops[before], macro.divisor))
                base = nearest(grid, c.base * tops[before])
                decisions.append(Decision(mid, grid, base, when, name))
                widths["mid"], fixed["size_in"] = mid, pixels(size_in)
            sites.append(Site(f"{name}/{c.name}", c.kind, widths, fixed, when, name))
    last = f"stage{len(macro.stages) - 1}/width"
    sites.append(Site("conv_head", "conv", {"in": last, "out": "head"}, {"kernel": 1, "size": pixels(size)}))
    sites.append(Site("classifier", "linear", {"in": "head", "out": macro.num_classes}, {}))
    return Space(tuple(decisions), tuple(sites))


def net_of(macro: EfficientNetSpace, arch: Mapping[str, Option]) -> dict:
    """One network as the data that `dnas.export.native.build` reads: its rows, stem, head and activation."""
    stages: list[list[dict]] = [[] for _ in macro.stages]
    tops = {"stem": macro.stem} | {f"stage{s}/width": stage.width for s, stage in enumerate(macro.stages)}
    for name, s, i, stage, before, width, stride, _ in layers_of(macro):
        if arch.get(f"{name}/keep") == DROP:
            continue
        chosen = arch.get(f"{name}/block", stage.candidates[0].name)
        c = next(c for c in stage.candidates if c.name == chosen)
        row = {"kind": c.kind, "kernel": c.kernel, "stride": stride}
        row |= {"mid": arch[before] if c.kind == "ds" else arch[f"{name}/{c.name}/mid"], "out": arch[width]}
        stages[s].append(row | {"se": squeeze_width(macro, c, tops[before]), "skip": i > 0})
    stem = {"width": arch["stem"], "stride": macro.stem_stride}
    return {"act": macro.act, "stem": stem, "stages": stages, "head": arch["head"]}


def size_to(
    outline: Callable[[float], EfficientNetSpace], budgets: Sequence[Budget], share: float = 0.5
) -> EfficientNetSpace:
    """The macro whose widest net costs about 1 / ``share`` times the tightest absolute budget.

    ``outline`` maps a width multiplier in [1/4, 16] to a macro. Bisection on the multiplier's logarithm finds the
    multiplier.
    """

    def too_big(mult: float) -> bool:
        space = space_of(outline(mult))
        tables = [CostTable.build(space, b.metric) for b in budgets]
        return any(t.of(t.extremes()[1]) * share > b.limit for t, b in zip(tables, budgets, strict=True))

    low, high = math.log(1 / 4), math.log(16)
    for _ in range(10):
        middle = (low + high) / 2
        low, high = (low, middle) if too_big(math.exp(middle)) else (middle, high)
    return outline(math.exp(high))


def _timm_block(
    c: Candidate, chs_in: int, mid: int, chs_out: int, stride: int, se: int, act: type[nn.Module]
) -> TimmBlock:
    squeeze = partial(SqueezeExcite, rd_channels=se) if se else None
    args = {"stride": stride, "noskip": True, "act_layer": act, "se_layer": squeeze}  # the layer adds the shortcut
    if c.kind == "ds":
        return DepthwiseSeparableConv(chs_in, chs_out, c.kernel, **args)
    if c.kind == "er":
        return EdgeResidual(chs_in, chs_out, c.kernel, exp_ratio=mid / chs_in, **args)
    return InvertedResidual(chs_in, chs_out, c.kernel, exp_ratio=mid / chs_in, **args)


class MacroSupernet(Supernet):
    """All networks of a macro's space: stem, layers of candidate blocks, head."""

    def __init__(self, macro: EfficientNetSpace) -> None:
        super().__init__()
        self.outline, self.space = macro, space_of(macro)
        act = ACTS[macro.act]
        by_name = self.space.by_name
        self.widths = nn.ModuleDict(
            {d: MarkovGate(by_name[d].options) for d in by_name if by_name[d].is_width and not d.endswith("/mid")}
        )
        top = {name: gate.widths[-1] for name, gate in self.widths.items()}
        self.conv_stem = create_conv2d(macro.in_chans, top["stem"], 3, stride=macro.stem_stride)
        self.bn1 = BatchNormAct2d(top["stem"], act_layer=act)
        layers, self._ins = [], []
        for name, _, i, stage, before, width, stride, _size in layers_of(macro):
            blocks: dict[str, Prunode | GatedBlock] = {}
            for c in stage.candidates:
                hidden, squeeze = hidden_top(c, top[before], macro.divisor), squeeze_width(macro, c, top[before])
                block = _timm_block(c, top[before], hidden, top[width], stride, squeeze, act)
                mid = before if c.kind == "ds" else f"{name}/{c.name}/mid"
                if c.kind == "ds":
                    blocks[c.name] = GatedBlock(block, mid)
                elif macro.bipath:
                    blocks[c.name] = Prunode(block, mid, PairGate(by_name[mid].options))
                else:
                    blocks[c.name] = GatedBlock(block, mid, MarkovGate(by_name[mid].options))
            layers.append(StochasticLayer(name, blocks, width, residual=i > 0, droppable=stage.droppable and i > 0))
            self._ins.append(before)
        self.layers = nn.ModuleList(layers)
        last = layers[-1].out
        self.conv_head = create_conv2d(top[last], top["head"], 1)
        self.bn2 = BatchNormAct2d(top["head"], act_layer=act)
        self.global_pool = SelectAdaptivePool2d(pool_type="avg", flatten=True)
        self.classifier = nn.Linear(top["head"], macro.num_classes)
        efficientnet_init_weights(self)
        for layer in self.layers:
            share([b.block for b in layer.blocks.values()])

    def forward(self, x: Tensor, answers: Answers) -> Tensor:
        """[B, in_chans, H, W] -> [B, num_classes]."""
        stem, head, first = answers["stem"], answers["head"], self.layers[0].blocks.values()
        x = self.conv_stem(x)
        if all(isinstance(b, GatedBlock) and b.mid == "stem" for b in first):
            x = self.bn1(x)  # a depthwise separable block applies the gate, after its own norm
        elif isinstance(stem, Tensor):
            x = self.bn1(x) * stem.to(x.dtype)[:, None, None]
        else:
            x = scaled_norm(self.bn1, x, stem)
        for layer in self.layers:
            x = layer(x, answers)
        x = self.global_pool(self.bn2(self.conv_head(x)))
        return self.classifier(x * channel_factors(head, x.shape[1], x).to(x.dtype))

    def gates(self) -> dict[str, Gate]:
        """Decision -> its gate, for every decision that is still part of the net."""
        found: dict[str, Any] = dict(self.widths.items())
        for layer in self.layers:
            if layer.skip is not None:
                found[f"{layer.name}/keep"] = layer.skip
            if layer.choice is not None:
                found[f"{layer.name}/block"] = layer.choice
            found |= {block.mid: block.gate for block in layer.blocks.values() if block.gate is not None}
        return found

    def fit(self, optimizers: Sequence[Optimizer] = ()) -> None:
        """Cut every module to the widths that the live gates need.

        A module that several blocks share keeps the widest of the widths that they need.
        """
        gates = self.gates()
        needs: dict[tuple[nn.Module, str], int] = {}
        for name, places in self.slices().items():
            width = int(gates[name].widest())
            for place in places:
                needs[place] = max(width, needs.get(place, 0))
        for (module, side), width in needs.items():
            resize_module(module, side, width, optimizers)

    def slices(self) -> dict[str, list[tuple[nn.Module, str]]]:
        """Width decision -> every (module, side) that has to be cut with it.

        Sides: ``out`` and ``in`` of a convolution or linear layer, ``depthwise`` (both at once), ``norm``.
        """
        cut: dict[str, list[tuple[nn.Module, str]]] = {"stem": [(self.conv_stem, "out"), (self.bn1, "norm")]}
        for before, layer in zip(self._ins, self.layers, strict=True):
            for block in layer.blocks.values():
                convs, last, norm = parts(block.block)
                inner = cut.setdefault(block.mid, [])
                if block.mid != before:
                    cut[before].append((convs[0][0], "in"))
                for conv, conv_norm in convs:
                    inner += [(conv, "depthwise" if conv.groups > 1 else "out"), (conv_norm, "norm")]
                if not isinstance(block.block.se, nn.Identity):
                    inner += [(block.block.se.conv_reduce, "in"), (block.block.se.conv_expand, "out")]
                inner.append((last, "in"))
                outer = cut.setdefault(layer.out, [])
                outer += [(last, "out"), (getattr(block.block, norm), "norm")]
                if isinstance(block, Prunode):
                    outer.append((block.norm_small, "norm"))
        cut[self.layers[-1].out].append((self.conv_head, "in"))
        cut["head"] = [(self.conv_head, "out"), (self.bn2, "norm"), (self.classifier, "in")]
        return cut

    def channel_axes(self) -> dict[str, list[ChannelAxis]]:
        """Width decision -> the tensor axes that hold its channels."""
        roles: dict[str, Literal["out", "in"]] = {"out": "out", "depthwise": "out", "in": "in"}
        axes: dict[str, list[ChannelAxis]] = {}
        for decision, places in self.slices().items():
            own = axes.setdefault(decision, [])
            for module, side in dict.fromkeys(places):  # candidates of a layer share modules
                for name, dim in SIDES[side][1].items():
                    if getattr(module, name) is not None:
                        index = np.arange(getattr(module, name).shape[dim])[:, None]
                        role = roles.get(side, "norm") if name == "weight" else "norm"
                        own.append(ChannelAxis(module, name, dim, role, index))
        return axes

    def net_of(self, arch: Mapping[str, Option]) -> dict[str, Any]:
        """One network as the data that `dnas.export.native.build` reads."""
        return net_of(self.outline, arch)

    def plain_state(self) -> dict[str, Tensor]:
        """The weights under the names of timm's EfficientNet. Every layer must have at most one block left."""
        outer = {"conv_stem", "bn1", "conv_head", "bn2", "classifier"}
        state = {n: t for n, t in self.state_dict().items() if n.split(".")[0] in outer}
        position: dict[str, int] = {}
        for layer in self.layers:
            if not len(layer.blocks):
                continue
            stage = layer.name.split("/")[0].removeprefix("stage")
            place = position[stage] = position.get(stage, -1) + 1
            block = layer.blocks[layer.only].block
            state |= {f"blocks.{stage}.{place}.{n}": t for n, t in block.state_dict().items()}
        return state
