"""A small supernet with every kind of block in training, and what must hold of it; for the tests of surgery."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dnas.nets.bipath_block import PairGate
from dnas.nets.layer_choice import SkipGate
from dnas.nets.layer_supernet import MacroSupernet
from dnas.spec.layer_space import Candidate, EfficientNetSpace, Stage

CLASSES, IMG = 4, 12
FEW = {"move_above": 2.0, "block_below": 0.0, "layer_below": 0.0, "width_below": 0.0, "patience": 1}  # nothing happens


def macro_of(bipath):
    """Every kind of block, with and without squeeze-excite, in four layers, two of which may go."""
    candidates = (Candidate("ir", 3, 4, 4), Candidate("ir", 5, 4, 4, se=0.25), Candidate("er", 3, 2, 2, se=0.25))
    candidates += (Candidate("ds", 3, se=0.25),)
    stages = (Stage(16, 1, 1, (Candidate("ds", 3),)), Stage(16, 3, 2, candidates, droppable=True))
    return EfficientNetSpace("small", 16, 1, stages, 32, "hard_swish", bipath, CLASSES, 3, IMG, 4)


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=3e-3, weight_decay=0.05),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, nesterov=True, weight_decay=1e-4),
}
both_optimizers = pytest.mark.parametrize("opt", OPTIMIZERS)
both_kinds = pytest.mark.parametrize("bipath", [True, False], ids=["bipath", "markov"])


def batch(net, seed, size=16):
    """In the precision of the net."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 3, IMG, IMG, generator=g).to(next(net.parameters()).dtype)
    return x, torch.randint(CLASSES, (size,), generator=g)


def weight_step(net, optimizer, answers, seed):
    return step_on(net, optimizer, answers, *batch(net, seed))


def step_on(net, optimizer, answers, x, y):
    logits = net.train()(x, answers)
    loss = F.cross_entropy(logits, y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return logits.detach(), float(loss.detach())


def gate_step(net, optimizer, generator):
    x, y = batch(net, int(torch.randint(10_000, (), generator=generator)))
    optimizer.zero_grad()
    F.cross_entropy(net.train()(x, net.soft(generator)), y).backward()
    optimizer.step()


def trained(opt="adamw", bipath=True, open_skips=False, steps=6, seed=0):
    """(net, [weight optimizer, gate optimizer]) after a few steps of both, on the widest and on random nets."""
    torch.manual_seed(seed)
    # In double precision: before a batch norm a bias has no gradient but rounding, which Adam makes into whole steps.
    net = MacroSupernet(macro_of(bipath)).double()
    optimizers = [OPTIMIZERS[opt](net.weight_parameters()), torch.optim.Adam(net.gate_parameters(), lr=0.01)]
    draws = torch.Generator().manual_seed(seed)
    for gate in net.gates().values():
        if isinstance(gate, SkipGate):
            gate.is_open = open_skips
    for k in range(steps):
        with torch.no_grad():
            answers = net.widest(draws) if k % 2 else net.draw(draws, uniform=True)
        weight_step(net, optimizers[0], answers, k)
        if k % 3 == 0:
            gate_step(net, optimizers[1], draws)
    for candidate in next(layer for layer in net.layers if layer.choice).blocks:  # so that all of them have state
        picks = {f"{layer.name}/block": candidate for layer in net.layers if layer.choice}
        for size in range(2 if bipath else 1):
            pairs = {n: (g.small, g.large)[size] for n, g in net.gates().items() if isinstance(g, PairGate)}
            weight_step(net, optimizers[0], net.widest() | picks | pairs, 50 + size)
    optimizers[0].zero_grad()
    return net, optimizers


def consistent(net, optimizers):
    """Optimizers hold exactly the net's parameters, and buffers of their shapes."""
    alive = {id(p) for p in net.parameters()}
    for optimizer in optimizers:
        held = [p for group in optimizer.param_groups for p in group["params"]]
        assert {id(p) for p in held} <= alive
        assert {id(p) for p in optimizer.state} <= {id(p) for p in held}
        for p, state in optimizer.state.items():
            for key, value in state.items():
                if isinstance(value, torch.Tensor):
                    assert value.shape == (p.shape if key != "step" else ()), key
            assert p.grad is None or p.grad.shape == p.shape
    held = {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}
    assert held == alive
    for m in net.modules():  # what modules say of themselves is true
        if isinstance(m, nn.Conv2d):
            assert m.weight.shape[:2] == (m.out_channels, m.in_channels // m.groups)
        elif isinstance(m, nn.BatchNorm2d):
            assert len(m.weight) == len(m.bias) == len(m.running_mean) == len(m.running_var) == m.num_features
        elif isinstance(m, nn.Linear):
            assert m.weight.shape == (m.out_features, m.in_features)


@torch.no_grad()
def same_outputs(before, after, answers, tolerance=1e-5, of_before=None):
    """Eval and train mode; the statistics that train mode changes are put back."""
    gaps = []
    for training in (False, True):
        ys = []
        for net, given in ((before, of_before or answers), (after, answers)):
            buffers = {n: b.clone() for n, b in net.named_buffers()}
            ys.append(net.train(training)(batch(net, 999)[0], given))
            for n, b in net.named_buffers():
                b.copy_(buffers[n])
        gaps.append(float((ys[0] - ys[1]).abs().max()) / max(1.0, float(ys[0].abs().max())))
    assert max(gaps) <= tolerance, gaps
    return max(gaps)


def train_alike(before, after, schedule, of_before=None, steps=20):
    """The same batches through the masked and the shrunken net: the same losses, logits and, at the end, outputs."""
    worst = [0.0, 0.0]
    for k in range(steps):
        answers = schedule[k % len(schedule)]
        masked = answers if of_before is None else answers | of_before
        (a, loss_a), (b, loss_b) = (
            weight_step(net, optimizers[0], given, 1000 + k)
            for (net, optimizers), given in ((before, masked), (after, answers))
        )
        worst[0] = max(worst[0], abs(loss_a - loss_b) / abs(loss_a))
        worst[1] = max(worst[1], float((a - b).abs().max()) / max(1.0, float(a.abs().max())))
    assert max(worst) <= 1e-9, worst
    print(f"20 steps: losses within {worst[0]:.1e}, logits within {worst[1]:.1e}")
    for answers in schedule:
        masked = answers if of_before is None else answers | of_before
        same_outputs(before[0], after[0], answers, 1e-9, masked)


def schedule_of(net, count=5, seed=0, **fixed):
    """Hard nets that ``net`` can run, the widest among them."""
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        drawn = [net.draw(draws, uniform=True) for _ in range(count - 1)]
        return [dict(a) | fixed for a in [net.widest(draws), *drawn]]


@torch.no_grad()
def set_coefficient(skip, s):
    """Give a skip the coefficient ``s``, whatever the slope of its sigmoid."""
    skip.kappa.fill_(1.0)
    skip.kappa.fill_(math.log(s / (1 - s)) / float(torch.logit(skip.coefficient())))
    assert math.isclose(float(skip.coefficient()), s, rel_tol=1e-4)
