"""Closed forms of cost against modules that are counted, and whole networks against published numbers."""

import itertools
import math
from functools import partial

import pytest
import torch
from timm.layers import BatchNormAct2d, create_conv2d
from timm.models._efficientnet_blocks import DepthwiseSeparableConv, EdgeResidual, InvertedResidual, SqueezeExcite
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dnas.spec.cost import CLOSED_FORMS, CostTable
from dnas.spec.space import Arch, Decision, Site, Space

METRICS = ("macs", "params")


# Closed forms against timm's modules, counted


def counted(module, *shape):
    """(MACs of convolution and linear layers, parameters) of a module on the meta device."""
    x = torch.empty(1, *shape, device="meta")
    with FlopCounterMode(display=False) as counter:
        module.eval()(x)
    flops = counter.get_total_flops()
    assert flops % 2 == 0
    return flops // 2, sum(p.numel() for p in module.parameters())


def closed_form(op, widths, fixed):
    space = Space((), (Site("it", op, widths, fixed),))
    return tuple(CostTable.build(space, metric).of(Arch({})) for metric in METRICS)


def grid(**choices):
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


@pytest.mark.parametrize("kernel, stride, side", list(itertools.product((1, 3, 5, 7), (1, 2), (8, 9))))
def test_a_convolution_with_its_norm(kernel, stride, side):
    with torch.device("meta"):
        module = nn.Sequential(create_conv2d(13, 22, kernel, stride=stride), BatchNormAct2d(22))
    fixed = {"kernel": kernel, "size": math.ceil(side / stride) ** 2}
    assert closed_form("conv", {"in": 13, "out": 22}, fixed) == counted(module, 13, side, side)


def test_a_linear_layer():
    with torch.device("meta"):
        module = nn.Linear(37, 11)
    assert closed_form("linear", {"in": 37, "out": 11}, {}) == counted(module, 37)


BLOCKS = grid(kernel=(3, 5, 7), stride=(1, 2), side=(8, 9), se=(0, 4, 6))


@pytest.mark.parametrize("kind", ["ds", "ir", "er"])
def test_timms_blocks(kind):
    chs_in, mid, chs_out = 20, 56, 28
    for case in BLOCKS:
        kernel, stride, side, se = case.values()
        squeeze = partial(SqueezeExcite, rd_channels=se) if se else None
        with torch.device("meta"):
            if kind == "ds":
                block = DepthwiseSeparableConv(chs_in, chs_out, kernel, stride=stride, se_layer=squeeze)
            else:
                make = InvertedResidual if kind == "ir" else EdgeResidual
                block = make(chs_in, chs_out, kernel, stride=stride, exp_ratio=mid / chs_in, se_layer=squeeze)
        assert isinstance(block.se, nn.Identity) == (se == 0)
        widths = {"in": chs_in, "out": chs_out} | ({} if kind == "ds" else {"mid": mid})
        fixed = {"kernel": kernel, "size": math.ceil(side / stride) ** 2, "se": se}
        if kind != "ds":
            assert block.conv_pwl.in_channels == mid
            fixed["size_in"] = side**2
        assert closed_form(kind, widths, fixed) == counted(block, chs_in, side, side), case


def test_a_whole_table_is_its_closed_form_at_every_width():
    widths = {"in": "in", "mid": "mid", "out": "out"}
    fixed = {"kernel": 3, "size": 16, "size_in": 64, "se": 2}
    grids = {"in": (3, 8), "mid": (2, 5, 9), "out": (1, 4, 6, 7)}
    space = Space(tuple(Decision(n, g, g[0]) for n, g in grids.items()), (Site("it", "ir", widths, fixed),))
    for metric in METRICS:
        table, form = CostTable.build(space, metric), CLOSED_FORMS[metric]["ir"]
        for values in itertools.product(*grids.values()):
            slots = dict(zip(grids, values, strict=True))
            assert table.of(slots) == form(**slots, **fixed)


def test_unknown_metrics_and_operations_are_key_errors():
    space = Space((), (Site("it", "attention", {"in": 1, "out": 1}, {}),))
    with pytest.raises(KeyError):
        CostTable.build(space, "macs")
    with pytest.raises(KeyError):
        CostTable.build(Space((), ()), "joules")


# Published numbers


def resnet50(pruned):
    """Sites of ResNet-50 at 224 pixels with the stride in the 3x3 convolutions; the options are (pruned, dense) widths.

    ``pruned`` is (stem, [per stage (stream, [(inner, inner) per block])]).
    """
    decisions, sites = [], []

    def width(name, narrow, wide):
        decisions.append(Decision(name, tuple(sorted({narrow, wide})), wide))
        return name

    def conv(name, chs_in, chs_out, kernel, side):
        sites.append(Site(name, "conv", {"in": chs_in, "out": chs_out}, {"kernel": kernel, "size": side**2}))

    stem, stages = pruned
    before, side = width("conv1", stem, 64), 56
    conv("conv1", 3, before, 7, 112)
    for k, (stream, blocks) in enumerate(stages, 1):
        after = width(f"layer{k}", stream, 128 * 2**k)
        for i, (first, second) in enumerate(blocks):
            name, side_in = f"layer{k}.{i}", side
            side = side // 2 if k > 1 and i == 0 else side
            a = width(f"{name}.conv1", first, 32 * 2**k)
            b = width(f"{name}.conv2", second, 32 * 2**k)
            conv(f"{name}.conv1", before, a, 1, side_in)
            conv(f"{name}.conv2", a, b, 3, side)
            conv(f"{name}.conv3", b, after, 1, side)
            if i == 0:
                conv(f"{name}.downsample", before, after, 1, side)
            before = after
    sites.append(Site("fc", "linear", {"in": before, "out": 1000}, {}))
    return Space(tuple(decisions), tuple(sites))


# The "2G" network of DMCP (Guo et al., CVPR 2020), as its authors published it: each residual stream has one width.
DMCP_2G = (
    52,
    [
        (106, [(22, 22), (16, 16), (40, 16)]),
        (155, [(68, 56), (32, 68), (56, 56), (80, 92)]),
        (1024, [(256, 256), (106, 106), (131, 256), (131, 256), (256, 256), (256, 256)]),
        (2048, [(512, 512), (512, 461), (512, 512)]),
    ],
)


@pytest.mark.parametrize("which, gmacs, mega_weights", [("narrow", 2.194, 21.92), ("wide", 4.089, 25.50)])
def test_dmcps_resnet50_and_the_dense_one(which, gmacs, mega_weights):
    space = resnet50(DMCP_2G)
    arch = Arch({d.name: d.options[0] if which == "narrow" else d.base for d in space.decisions})
    macs, params = (CostTable.build(space, metric).of(arch) for metric in METRICS)
    # The published count is of convolution and linear weights only. Ours has two more for each channel of a norm, one
    # after every convolution, and the classifier's bias: take both away.
    convs = [site for site in space.sites if site.op == "conv"]
    weights = params - 2 * sum(arch[site.widths["out"]] for site in convs) - 1000
    assert round(macs / 1e9, 3) == gmacs
    assert round(weights / 1e6, 2) == mega_weights
    if which == "wide":
        assert (macs, params) == (4_089_184_256, 25_557_032)  # torchvision's and timm's resnet50, to the unit
