"""Supernets with nontrivial norms and statistics, and the plain nets in them; for the tests of supernets."""

import random

import pytest
import torch
from torch import nn

from dnas.export.model_file import build_net
from dnas.nets.layer_supernet import MacroSupernet, net_of
from dnas.nets.shrink import plain_state
from dnas.spec.layer_space import Candidate, EfficientNetSpace, Stage
from supernets import SUPERNETS

CLASSES = 5


def mixed(bipath, *, in_chans=2, img_size=16):
    """Few layers with everything in them: residual and strided, all kinds, squeeze-excite, layers that may go."""
    ds = (Candidate("ds", 3), Candidate("ds", 5, se=0.25))
    plain = (Candidate("ir", 3, 4, 4), Candidate("ir", 5, 4, 2, se=0.25))
    fused = (Candidate("er", 3, 2, 2), Candidate("er", 5, 1, 1, se=0.25))
    stages = (Stage(16, 2, 1, ds, droppable=True), Stage(24, 3, 2, plain + fused, droppable=True))
    stages += (Stage(32, 2, 1, (plain[1], ds[0])), Stage(40, 1, 2, plain[:1]))
    return EfficientNetSpace("mixed", 24, 1, stages, 48, "hard_swish", bipath, CLASSES, in_chans, img_size, 8)


SMALL = {"num_classes": CLASSES, "img_size": 16, "width_mult": 0.25}
MACROS = {
    "prunet": lambda: SUPERNETS["prunet"](**SMALL),
    "mobilenet_v2": lambda: SUPERNETS["mobilenet_v2"](**SMALL | {"width_mult": 0.5}),
    "toy": lambda: SUPERNETS["toy"](num_classes=CLASSES, img_size=8),
    "mixed-bipath": lambda: mixed(True),
    "mixed-markov": lambda: mixed(False),
}
every_macro = pytest.mark.parametrize("name", MACROS)


def every_answer(space, seed):
    """A random option for every decision, those without effect included."""
    rng = random.Random(seed)
    return {d.name: rng.choice(d.options) for d in space.decisions}


def random_arch(space, seed):
    return space.complete(every_answer(space, seed))


def images(macro, seed=0, batch=4):
    shape = (batch, macro.in_chans, macro.img_size, macro.img_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def unsettle(module, seed=0):
    """Give every norm an affine part and statistics of its own, and every other bias a value."""
    g = torch.Generator().manual_seed(seed)
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            for t, low in ((m.weight, 0.5), (m.running_var, 0.5), (m.bias, -0.3), (m.running_mean, -0.3)):
                t.copy_(low + torch.rand(t.shape, generator=g) * (1 if low > 0 else 0.6))
        elif getattr(m, "bias", None) is not None:
            m.bias.copy_(torch.randn(m.bias.shape, generator=g) * 0.3)
    return module


@torch.no_grad()
def settled(macro, seed=0):
    """A supernet that has seen a few batches in training mode, with nontrivial norms."""
    torch.manual_seed(seed)
    net = unsettle(MacroSupernet(macro), seed).train()
    for k in range(4):
        net(images(macro, 100 + k, 8), net.widest() if k % 2 else random_arch(net.space, k))
    return net


def plain(net, arch):
    """The timm net of ``arch`` with the supernet's weights."""
    model = build_net(net_of(net.outline, arch), num_classes=net.outline.num_classes, in_chans=net.outline.in_chans)
    model.load_state_dict(plain_state(net, arch))
    return model


def close(a, b, tolerance=1e-5):
    """Within ``tolerance`` of the larger of 1 and the greatest magnitude."""
    gap = float((a - b).abs().max().detach())
    assert gap <= tolerance * max(1.0, float(b.abs().max().detach())), gap
    return gap
