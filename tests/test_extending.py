"""The extension points of CONTRIBUTING.md: a new space, a new cost, a new gate, each from outside and all the way."""

import runpy
from pathlib import Path

import pytest
import torch
from code_blocks import blocks_of
from timm.utils import random_seed
from torch import nn

import dnas.nets.supernet
from dnas.export.model_file import build_net, count_macs
from dnas.methods.derive import derive, gate_likelihood
from dnas.methods.gates import GATES
from dnas.methods.loop import search
from dnas.methods.method import Task
from dnas.methods.rules import random_arch, uniform_arch
from dnas.methods.settings import GatesConfig
from dnas.nets.bipath_block import GatedBlock
from dnas.nets.gate import Gate
from dnas.nets.layer_supernet import MacroSupernet
from dnas.spec.budget import parse_budget
from dnas.spec.cost import CLOSED_FORMS, CostTable, resolve_budgets
from dnas.spec.recipe import Recipe
from dnas.training.data import load_data
from supernets import SUPERNETS

ROOT = Path(__file__).parents[1]


def search_all_the_way(net, budget="50%", img_size=8):
    """Search, derive; the exported net has the MACs that the cost table says. Returns (arch, history)."""
    data = load_data("digits", img_size=img_size, in_chans=net.outline.in_chans)
    tables = {metric: CostTable.build(net.space, metric) for metric in ("macs", "params")}
    budgets, rows = resolve_budgets(tables, parse_budget(budget)), []
    recipe = Recipe(epochs=1, batch_size=96)
    search(GATES, net, Task(tables, budgets, data, recipe, GatesConfig(gate_every=1), 0), on_row=rows.append)
    arch = derive(net.space, tables, budgets, gate_likelihood(net))
    assert 0.98 * budgets[0].limit <= tables["macs"].of(arch) <= budgets[0].limit
    model = build_net(net.net_of(arch), num_classes=data.num_classes, in_chans=data.in_chans)
    assert count_macs(model, data.in_chans, img_size) == tables["macs"].of(arch)
    return arch, rows


def test_a_new_space_as_documented(tmp_path):
    (source,) = [b.text for b in blocks_of(ROOT / "docs" / "spaces.md") if "def kernels" in b.text]
    assert len(source.splitlines()) <= 60
    (tmp_path / "kernels.py").write_text(source)
    kernels = runpy.run_path(str(tmp_path / "kernels.py"))["kernels"]
    random_seed(0)
    net = MacroSupernet(kernels(num_classes=10, img_size=8, width_mult=0.5))
    arch, _ = search_all_the_way(net)
    chosen = {name for name, answer in arch.items() if str(answer).startswith("ir-k")}
    assert chosen >= {"stage0/0/block", "stage2/0/block"}


# Numbers that convolutions and linear layers write: what moves through memory, roughly.


def squeezed(mid, se):
    return (se + mid) * (se > 0)


WRITES = {
    "conv": lambda *, kernel, size, **width: width["out"] * size + 0 * width["in"],
    "linear": lambda **width: width["out"] + 0 * width["in"],
    "ds": lambda *, kernel, size, se, **w: (w["in"] + w["out"]) * size + squeezed(w["in"], se),
    "ir": lambda *, kernel, size, size_in, se, mid, **w: (
        mid * (size_in + size) + squeezed(mid, se) + w["out"] * size + 0 * w["in"]
    ),
    "er": lambda *, kernel, size, size_in, se, mid, **w: (mid + w["out"]) * size + squeezed(mid, se) + 0 * w["in"],
}


def count_writes(model, in_chans, img_size):
    """The same, counted by hooks on a network that runs."""
    written = []
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(lambda _, __, out: written.append(out.numel()))
    with torch.no_grad():
        model.eval()(torch.zeros(1, in_chans, img_size, img_size))
    return sum(written)


@pytest.mark.parametrize("name", list(SUPERNETS))
def test_a_new_cost(name, monkeypatch):
    monkeypatch.setitem(CLOSED_FORMS, "writes", WRITES)
    net = MacroSupernet(SUPERNETS[name](num_classes=10, img_size=32, width_mult=1.0 if name == "toy" else 0.5))
    tables = {metric: CostTable.build(net.space, metric) for metric in ("macs", "params", "writes")}
    budgets = resolve_budgets(tables, parse_budget("60%"))
    for arch in (uniform_arch(net.space, tables, budgets), random_arch(net.space, tables, budgets, seed=0)):
        hot = {}
        for d in net.space.decisions:
            hot[d.name] = torch.zeros(len(d.options), dtype=torch.float64)
            hot[d.name][d.index(arch[d.name]) if d.name in arch else 0] = 1
        counted = count_writes(build_net(net.net_of(arch), num_classes=10), 3, 32)
        assert counted == tables["writes"].of(arch) == float(tables["writes"].expected(hot))


class SoftmaxWidth(Gate):
    """A gate over inner widths with a logit each: what a Markov chain is not."""

    def __init__(self, widths):
        super().__init__()
        self.options = tuple(widths)
        self.logits = nn.Parameter(torch.zeros(len(widths)))

    def live(self):
        return list(range(len(self.options)))

    def probabilities(self, temperature=1.0):
        return torch.softmax(self.logits / temperature, 0)

    def soft(self, temperature=1.0, with_scale=False):
        reaches = self.probabilities(temperature).flip(0).cumsum(0).flip(0)  # P(width >= k)
        steps = torch.tensor([self.options[0], *(b - a for a, b in zip(self.options, self.options[1:], strict=False))])
        return torch.repeat_interleave(reaches, steps)


def test_a_new_gate(monkeypatch):
    monkeypatch.setitem(
        dnas.nets.supernet.DISTRIBUTIONS,
        SoftmaxWidth,
        lambda gates, temperature: [g.probabilities(temperature) for g in gates],
    )
    random_seed(0)
    net = MacroSupernet(SUPERNETS["mobilenet_v2"](num_classes=10, img_size=8, width_mult=0.25))
    blocks = [b for layer in net.layers for b in layer.blocks.values()]
    blocks = [b for b in blocks if isinstance(b, GatedBlock) and b.gate is not None]
    own = [d for d in net.space.decisions if d.name in {b.mid for b in blocks}]
    assert len(own) > 3
    for block in blocks:
        block.gate = SoftmaxWidth(net.space.by_name[block.mid].options)

    gate, generator = blocks[-1].gate, torch.Generator().manual_seed(0)
    gate.logits.data = torch.linspace(-1, 1, len(gate.options))
    drawn = torch.tensor([gate.draw(generator) for _ in range(4000)], dtype=torch.float64)
    mean = (gate.probabilities().detach().double() * torch.tensor(gate.options)).sum()
    assert float(mean) == pytest.approx(float(drawn.mean()), abs=4 * float(drawn.std()) / 4000**0.5)
    assert float(gate.soft().detach().sum()) == pytest.approx(float(mean), rel=1e-5)  # the expected width, too
    gate.logits.data.zero_()

    arch, rows = search_all_the_way(net)
    assert all((gate.logits != 0).all() and gate.logits.isfinite().all() for gate in (b.gate for b in blocks))
    shown = next(row["gates"] for row in reversed(rows) if "gates" in row)
    assert {d.name for d in own} <= arch.keys() & shown.keys()
