"""Strided 1x1 convolutions in training: what is computed, and that memory stays whole where oneDNN's would not."""

import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace

import pytest
import timm
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from dnas.methods.gates import GATES
from dnas.methods.loop import search
from dnas.methods.method import Task
from dnas.methods.settings import GatesConfig
from dnas.nets.timm_space import TimmBase
from dnas.nets.timm_supernet import TimmSupernet
from dnas.spec.budget import parse_budget
from dnas.spec.cost import CostTable, resolve_budgets
from dnas.spec.recipe import Recipe
from dnas.training.criterion import make_criterion
from dnas.training.data import load_data
from dnas.training.from_scratch import time_step, train_from_scratch
from dnas.training.onednn_workaround import subsampled

# Without `subsampled` glibc ends this with "free(): invalid pointer" or the like, where oneDNN has AVX2 or AVX-512.
NARROW = """
import torch
from dnas.training.loop import Recipe, subsampled
conv = torch.nn.Conv2d(4, 16, 1, 2, bias=False).to(memory_format=torch.channels_last)
torch.set_num_threads(1)
for _ in range(300):
    x = torch.randn(64, 4, 8, 8).to(memory_format=torch.channels_last)
    with subsampled(conv, Recipe()):
        out = conv(x)
    out.sum().backward()
"""


def test_memory_stays_whole():
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", NARROW], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-300:]


@pytest.mark.parametrize("size", [8, 7])
@pytest.mark.parametrize("stride", [2, (1, 2), 3])
def test_same_function_and_gradients(size, stride):
    """Against a plain convolution, which in NCHW and with many channels is sound; others are left alone."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(32, 12, 3, 1, 1), nn.Conv2d(12, 16, 1, stride, groups=2), nn.Conv2d(16, 8, 3, 2, 1)]
    net = nn.Sequential(*layers, nn.Conv2d(8, 4, 1, 1)).double()
    x = torch.randn(2, 32, size, size, dtype=torch.float64)
    found = []
    for recipe in (Recipe(channels_last=False), Recipe()):
        net.zero_grad()
        with subsampled(net, recipe):
            out = net(x)
        out.square().sum().backward()
        found.append([out.detach(), *(p.grad.clone() for p in net.parameters())])
    torch.testing.assert_close(found[0], found[1])


class Seen(TorchFunctionMode):
    """Counts the narrow strided 1x1 convolutions that are computed as such and have a backward pass."""

    def __init__(self):
        super().__init__()
        self.convolutions, self.wrong = 0, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.conv2d:
            weight, stride = args[1], args[3]
            narrow = weight.shape[2:] == (1, 1) and weight.shape[1] < 16 and stride not in (1, (1, 1))
            self.convolutions += 1
            self.wrong += narrow and torch.is_grad_enabled()
        return func(*args, **(kwargs or {}))


RECIPE = Recipe(epochs=2, batch_size=64)
NETWORK = TimmBase("resnet18", 10, 3, 16, divisor=2, kwargs={"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8]})


def searched(recipe):
    net = TimmSupernet(NETWORK)
    tables = {"macs": CostTable.build(net.space, "macs")}
    data, config = load_data(img_size=16).take(300), GatesConfig(warmup=0.0, gate_every=1)
    budgets = resolve_budgets(tables, parse_budget("50%"))
    search(GATES, net, Task(tables, budgets, data, recipe, config, 0))


def trained(recipe):
    net = timm.create_model(NETWORK.name, num_classes=10, **NETWORK.kwargs)
    train_from_scratch(net, load_data(img_size=16).take(300), recipe, seed=0)


def timed(recipe):
    net = timm.create_model(NETWORK.name, num_classes=10, **NETWORK.kwargs)
    data = load_data(img_size=16).take(300)
    time_step(net, data, recipe, make_criterion(recipe, data))


@pytest.mark.parametrize("work", [searched, trained, timed])
def test_no_narrow_strided_convolution_is_left(work):
    """In NCHW they are sound, and are left."""
    for recipe, is_left in ((RECIPE, False), (replace(RECIPE, channels_last=False), True)):
        with Seen() as seen:
            work(recipe)
        assert seen.convolutions > 10 and (seen.wrong > 0) == is_left


def test_it_costs_nothing_where_it_is_not_needed():
    assert isinstance(subsampled(nn.Conv2d(3, 4, 3, 2), Recipe()), nullcontext)
    assert isinstance(subsampled(nn.Conv2d(3, 4, 1, 2), Recipe(channels_last=False)), nullcontext)
    with torch.device("meta"):
        assert isinstance(subsampled(nn.Conv2d(3, 4, 1, 2), Recipe()), nullcontext)
