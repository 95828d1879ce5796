"""Surgery on a training supernet: what is cut off was dead weight, for the outputs and for every step that follows."""

import copy
import math
import random

import pytest
import torch
from timm.optim import create_optimizer_v2
from torch import nn
from torch.nn import functional as F

from dnas.arch import DROP, KEEP
from dnas.cost import CostTable
from dnas.export import build_net, count_params
from dnas.gates import MarkovGate
from dnas.prunode import PairGate, Prunode
from dnas.stochastic import ChoiceGate, SkipGate
from dnas.supernet import Candidate, Macro, Stage, Supernet, net_of
from dnas.surgery import (
    cut_width,
    extract,
    fit,
    move_pair,
    plain_state,
    remove_block,
    remove_layer,
    resize_module,
    shrink,
)
from supernets import SUPERNETS

CLASSES, IMG = 4, 12
FEW = {"move_above": 2.0, "block_below": 0.0, "layer_below": 0.0, "width_below": 0.0, "patience": 1}  # nothing happens


def macro_of(bipath):
    """Every kind of block, with and without squeeze-excite, in four layers, two of which may go."""
    candidates = (Candidate("ir", 3, 4, 4), Candidate("ir", 5, 4, 4, se=0.25), Candidate("er", 3, 2, 2, se=0.25))
    candidates += (Candidate("ds", 3, se=0.25),)
    stages = (Stage(16, 1, 1, (Candidate("ds", 3),)), Stage(16, 3, 2, candidates, droppable=True))
    return Macro("small", 16, 1, stages, 32, "hard_swish", bipath, CLASSES, 3, IMG, 4)


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=3e-3, weight_decay=0.05),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, nesterov=True, weight_decay=1e-4),
}
both_optimizers = pytest.mark.parametrize("opt", OPTIMIZERS)
both_kinds = pytest.mark.parametrize("bipath", [True, False], ids=["bipath", "markov"])


def batch(seed, size=16):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(size, 3, IMG, IMG, generator=g), torch.randint(CLASSES, (size,), generator=g)


def weight_step(net, optimizer, answers, seed):
    x, y = batch(seed)
    logits = net.train()(x, answers)
    loss = F.cross_entropy(logits, y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return logits.detach(), float(loss.detach())


def gate_step(net, optimizer, generator):
    x, y = batch(int(torch.randint(10_000, (), generator=generator)))
    optimizer.zero_grad()
    F.cross_entropy(net.train()(x, net.soft(generator)), y).backward()
    optimizer.step()


def trained(opt="adamw", bipath=True, open_skips=False, steps=6, seed=0):
    """(net, [weight optimizer, gate optimizer]) after a few steps of both, on the widest and on random nets."""
    torch.manual_seed(seed)
    net = Supernet(macro_of(bipath))
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
            ys.append(net.train(training)(batch(999)[0], given))
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
    assert worst[0] <= 1e-4 and worst[1] <= 1e-3, worst
    print(f"20 steps: losses within {worst[0]:.1e}, logits within {worst[1]:.1e}")
    for answers in schedule:
        masked = answers if of_before is None else answers | of_before
        same_outputs(before[0], after[0], answers, 1e-3, masked)


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


# Single cuts.


@both_kinds
@both_optimizers
def test_cutting_widths_changes_nothing_for_narrower_nets_then_or_later(opt, bipath):
    net, optimizers = trained(opt, bipath)
    cuts = {"stem": 8, "stage0/width": 12, "stage1/width": 8, "head": 20}
    if not bipath:
        cuts |= {"stage1/0/ir-k3/mid": 24, "stage1/1/ir-k5-se/mid": 32, "stage1/2/er-k3-se/mid": 16}
    before = copy.deepcopy((net, optimizers))
    for name, width in cuts.items():
        cut_width(net, name, width, optimizers)
    fit(net, optimizers)
    consistent(net, optimizers)
    assert count(net) < count(before[0]) and net.conv_stem.out_channels == 8 and net.classifier.in_features == 20
    schedule = schedule_of(net)
    for answers in schedule:
        assert all(answers[name] <= width for name, width in cuts.items())
        print(f"masked against cut: {same_outputs(before[0], net, answers):.1e}")
    train_alike(before, (net, optimizers), schedule)
    gate_step(net, optimizers[1], torch.Generator().manual_seed(0))
    for name, width in cuts.items():
        gate, options = net.gates()[name], net.space.by_name[name].options
        assert gate.widths[-1] == width and len(gate.alpha) == len(gate.widths) - 1
        p = gate.probabilities()
        assert len(p) == len(options) and not p[options.index(width) + 1 :].any()
        assert math.isclose(float(p.sum().detach()), 1, rel_tol=1e-5)
        assert net.live_options()[name] == list(range(options.index(width) + 1))
    with pytest.raises(ValueError, match="live widths"):
        cut_width(net, "stem", 16)


def count(net):
    return sum(p.numel() for p in net.weight_parameters())


@both_kinds
@both_optimizers
def test_removing_a_layer_is_dropping_it_for_good(opt, bipath):
    net, optimizers = trained(opt, bipath, open_skips=True)
    before = copy.deepcopy((net, optimizers))
    gone = net.layers[2]
    gone.skip.kappa.data.fill_(-5.0)
    events = shrink(net, optimizers, lambda options: True, **FEW | {"layer_below": 0.1})
    assert events == [{"layer": "stage1/1"}] and not len(gone.blocks) and gone.skip.best() == DROP
    consistent(net, optimizers)
    assert not [n for n in net.gates() if n.startswith("stage1/1/") and not n.endswith("/keep")]
    assert net.gates()["stage1/1/keep"].probabilities().tolist() == [1, 0]
    schedule = [net.widest() | {n: KEEP for n in net.gates() if n == "stage1/2/keep"}, *schedule_of(net)]
    filler = before[0].widest() | {"stage1/1/keep": DROP}  # the masked net wants an answer to everything
    for answers in schedule:
        assert answers["stage1/1/keep"] == DROP
        same_outputs(before[0], net, answers, of_before=filler | answers)
    train_alike(before, (net, optimizers), [filler | a for a in schedule])
    gate_step(net, optimizers[1], torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="cannot be dropped"):
        remove_layer(net.layers[0])


@both_kinds
@both_optimizers
def test_removing_blocks_changes_nothing_for_the_others(opt, bipath):
    net, optimizers = trained(opt, bipath)
    layer = net.layers[1]
    gates_before = {n: g.logits.detach().clone() for n, g in net.gates().items() if isinstance(g, ChoiceGate)}
    layer.choice.logits.data.copy_(torch.tensor([0.3, -6.0, 0.1, -7.0]))
    optimizers[1].state[layer.choice.logits]["exp_avg"].copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    before = copy.deepcopy((net, optimizers))
    gone = list(layer.blocks["ir-k5-se"].block.se.parameters()) + list(layer.blocks["ds-k3-se"].parameters())
    events = shrink(net, optimizers, lambda options: True, **FEW | {"block_below": 0.05})
    assert events == [{"block": "stage1/0/ds-k3-se"}, {"block": "stage1/0/ir-k5-se"}]  # the less likely first
    consistent(net, optimizers)
    alive = {id(p) for p in net.parameters()}
    assert gone and all(id(p) not in alive and all(p not in o.state for o in optimizers) for p in gone)
    assert layer.choice.live == [0, 2] and layer.choice.logits.tolist() == pytest.approx([0.3, 0.1])
    assert optimizers[1].state[layer.choice.logits]["exp_avg"].tolist() == [1.0, 3.0]
    p = layer.choice.probabilities().tolist()
    assert p[1] == p[3] == 0 and math.isclose(p[0] / p[2], math.exp(0.2), rel_tol=1e-4)
    assert all(torch.equal(net.gates()[n].logits, v) for n, v in gates_before.items() if n != "stage1/0/block")
    schedule = schedule_of(net) + [net.widest() | {"stage1/0/block": b} for b in ("ir-k3", "er-k3-se")]
    for answers in schedule:
        same_outputs(before[0], net, answers)
    train_alike(before, (net, optimizers), schedule)
    gate_step(net, optimizers[1], torch.Generator().manual_seed(0))
    remove_block(layer, "ir-k3", optimizers)
    assert layer.only == "er-k3-se" and net.soft()["stage1/0/block"] == "er-k3-se"
    with pytest.raises(ValueError, match="only block left"):
        remove_block(layer, "er-k3-se", optimizers)


# Pairs. (where from, where to): grid indices; kept: which old copy lives on, as which new one.

PAIR_MOVES = {
    "the large one wins, wide gap": ((2, 14), (8, 14), ("large", "large")),
    "the small one wins, wide gap": ((2, 14), (2, 8), ("small", "small")),
    "slide down": ((6, 7), (5, 6), ("small", "large")),
    "slide up": ((6, 7), (7, 8), ("large", "small")),
    "to the small one alone": ((2, 14), (2, 2), ("small", "large")),
    "to the large one alone": ((2, 14), (14, 14), ("large", "large")),
}


@pytest.mark.parametrize("move, opt", [*((m, "adamw") for m in PAIR_MOVES), ("slide down", "sgd"), ("slide up", "sgd")])
def test_a_moved_pair_goes_on_from_the_copy_that_it_keeps(move, opt):
    start, end, (kept, becomes) = PAIR_MOVES[move]
    net, optimizers = trained(opt, steps=2)
    mids = [n for n, g in net.gates().items() if isinstance(g, PairGate) and len(g.widths) == 15]
    blocks = {b.mid: b for layer in net.layers for b in layer.blocks.values() if b.mid in mids}
    assert len(blocks) == 6
    if start != (2, 14):
        for block in blocks.values():
            move_pair(block, *start, optimizers)
        fit(net, optimizers)
        picks = [{f"{layer.name}/block": c for layer in net.layers if layer.choice} for c in ("ir-k3", "ir-k5-se")]
        for k in range(8):  # the copies and their momenta part
            pair = {m: (b.gate.small, b.gate.large)[k % 2] for m, b in blocks.items()}
            weight_step(net, optimizers[0], net.widest() | picks[k // 2 % 2] | pair, 300 + k)
        optimizers[0].zero_grad()
    assert all((b.gate.low, b.gate.high) == start for b in blocks.values())
    before = copy.deepcopy((net, optimizers))
    for block in blocks.values():
        last = block.block.bn3
        assert not torch.equal(last.running_mean, block.norm_small.running_mean)
        move_pair(block, *end, optimizers)
        assert optimizers[1].state.get(block.gate.logits) is None and not block.gate.logits.any()
        assert float(block.gate.p_large) == 0.5
    fit(net, optimizers)
    consistent(net, optimizers)
    schedule, of_before = [], {}
    for seed, answers in enumerate(schedule_of(net)):
        picks = {n: ("ir-k3", "ir-k5-se")[seed % 2] for n in answers if n.endswith("/block")}
        schedule.append(answers | picks | {m: getattr(b.gate, becomes) for m, b in blocks.items()})
    of_before = {m: getattr(before[0].gates()[m], kept) for m in blocks}
    assert all(schedule[0][m] == of_before[m] for m in blocks)  # one width, under its old and its new name
    for answers in schedule:
        same_outputs(before[0], net, answers)
    train_alike(before, (net, optimizers), schedule)


@both_optimizers
@pytest.mark.parametrize("name", ["ir-k3", "ir-k5-se", "er-k3-se"])
def test_growing_by_one_step_changes_neither_copy_yet(name, opt):
    net, optimizers = trained(opt)
    layer = net.layers[1]
    for other in [n for n in layer.blocks if n != name]:  # a bank of its own: no other candidate's columns to grow into
        remove_block(layer, other)
    block = layer.blocks[layer.only]
    move_pair(block, 1, 4)
    fit(net)
    optimizers = [OPTIMIZERS[opt](net.weight_parameters())]
    answers = net.widest() | {n: KEEP for n in net.gates() if n.endswith("/keep")}
    for k in range(4):
        weight_step(net, optimizers[0], answers | {block.mid: (block.gate.small, block.gate.large)[k % 2]}, k)
    optimizers[0].zero_grad()
    before = copy.deepcopy(net)
    small, large = block.gate.small, block.gate.large
    move_pair(block, 1, 5, optimizers)
    fit(net, optimizers)
    assert (block.gate.small, block.gate.large) == (small, large + 4) == (small, block.block.conv_pwl.in_channels)
    for p, state in optimizers[0].state.items():
        assert all(v.shape == p.shape for v in state.values() if isinstance(v, torch.Tensor) and v.dim())
    same_outputs(before, net, answers | {block.mid: small}, 1e-6)
    same_outputs(before, net, answers | {block.mid: large + 4}, 1e-6, answers | {block.mid: large})
    with torch.no_grad():
        x, q = torch.randn(2, 16, 8, 8), torch.tensor([0.4, 0.6])
        torch.testing.assert_close(block.eval()(x, q), before.layers[1].blocks[name].eval()(x, q), rtol=1e-5, atol=1e-5)
    # It is not stuck there: the new channels differ from one another, and what reads them gets a gradient.
    first = block.block.conv_exp if name.startswith("er") else block.block.conv_pw
    assert len({tuple(row.flatten().tolist()) for row in first.weight[-4:].detach()}) == 4
    assert not block.block.conv_pwl.weight[:, -4:].any()
    for k in range(2):
        weight_step(net, optimizers[0], answers | {block.mid: large + 4}, 70 + k)
    assert bool((block.block.conv_pwl.weight[:, -4:] != 0).all()) and bool((first.weight.grad[-4:] != 0).any())


def test_a_shared_bank_is_as_wide_as_the_neediest_candidate():
    net, optimizers = trained()
    layer = net.layers[1]
    three, five, fused = (layer.blocks[n] for n in ("ir-k3", "ir-k5-se", "er-k3-se"))
    assert three.block.conv_pw is five.block.conv_pw and three.block.conv_pwl is fused.block.conv_pwl
    move_pair(three, 2, 9, optimizers)
    move_pair(five, 2, 5, optimizers)
    fit(net, optimizers)
    assert three.block.conv_pw.out_channels == three.gate.large == 44 == five.block.bn1.num_features
    assert three.block.conv_dw.groups == 44 and five.block.conv_dw.groups == five.gate.large == 28
    assert five.block.se.conv_reduce.in_channels == 28
    assert fused.block.conv_exp.out_channels == fused.gate.large == 32 and fused.block.conv_pwl.in_channels == 44
    before = copy.deepcopy((net, optimizers))
    layer.choice.logits.data[0] = -9.0
    shrink(net, optimizers, lambda options: True, **FEW | {"block_below": 0.01})
    assert "ir-k3" not in layer.blocks
    consistent(net, optimizers)
    assert five.block.conv_pw.out_channels == five.block.bn1.num_features == five.block.conv_dw.groups == 28
    assert five.block.conv_pwl.in_channels == fused.block.conv_pwl.in_channels == 32  # the fused one needs it still
    picks = [{"stage1/0/block": b, five.mid: m} for b, m in (("ir-k5-se", 28), ("ir-k5-se", 16), ("er-k3-se", 24))]
    schedule = [net.widest() | pick for pick in picks]
    for answers in schedule:
        same_outputs(before[0], net, answers)
    train_alike(before, (net, optimizers), schedule)
    layer.choice.logits.data[1] = -9.0
    shrink(net, optimizers, lambda options: True, **FEW | {"block_below": 0.01})
    assert set(layer.blocks) == {"ir-k5-se", "ds-k3-se"} and five.block.conv_pwl.in_channels == 28


# Extraction.


@pytest.mark.parametrize("name", [*SUPERNETS, "bipath", "markov"])
def test_an_extracted_architecture_loads_strictly_and_is_the_masked_one(name):
    if name in SUPERNETS:
        torch.manual_seed(0)
        net = Supernet(SUPERNETS[name](num_classes=CLASSES, img_size=IMG, width_mult=0.25))
        with torch.no_grad():
            for k in range(2):
                net.train()(batch(k)[0], net.widest())
    else:
        net, _ = trained(bipath=name == "bipath")
    start = {n: t.clone() for n, t in net.state_dict().items()}
    x = batch(5)[0]
    for seed in range(2 if name in SUPERNETS else 4):
        rng = random.Random(seed)
        arch = net.space.complete({d.name: rng.choice(d.options) for d in net.space.decisions})
        cut = extract(net, arch)
        assert all(torch.equal(t, start[n]) for n, t in net.state_dict().items())  # the supernet is left alone
        model = build_net(net_of(net.macro, arch), num_classes=CLASSES)
        result = model.load_state_dict(plain_state(net, arch), strict=True)
        assert not result.missing_keys and not result.unexpected_keys
        # Nothing but the architecture is left in it, and the last norms of the small copies.
        spare = [b.norm_small for layer in cut.layers for b in layer.blocks.values() if isinstance(b, Prunode)]
        spare = sum(p.numel() for m in spare for p in m.parameters())
        assert count(cut) - spare == count_params(model)
        assert all(len(layer.blocks) == (arch.get(f"{layer.name}/keep") != DROP) for layer in cut.layers)
        with torch.no_grad():
            for training in (False, True):
                want = model.train(training)(x)
                for supernet in (cut, copy.deepcopy(net)):
                    y = supernet.train(training)(x, arch)
                    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-4 if training else 1e-5)


def test_an_extracted_pair_is_certain_of_its_width():
    net, _ = trained()
    arch = net.space.complete({d.name: d.options[-1] for d in net.space.decisions})
    for seed in range(3):
        rng = random.Random(seed)
        arch = net.space.complete(
            {d.name: rng.choice(d.options) for d in net.space.decisions} | {"stage1/1/keep": KEEP}
        )
        for name, gate in extract(net, arch).gates().items():
            if isinstance(gate, PairGate):
                assert gate.draw() == gate.best() == gate.large == gate.small == arch[name]
                certain = [float(option == arch[name]) for option in net.space.by_name[name].options]
                assert gate.probabilities().tolist() == certain


# Shrinking by thresholds.


def gates_of(net, kind):
    return {n: g for n, g in net.gates().items() if isinstance(g, kind)}


def test_thresholds_on_blocks_and_layers_are_kept_to():
    net, optimizers = trained(open_skips=True)
    first, second = net.layers[1], net.layers[2]
    for layer, p in ((first, (0.5, 0.28, 0.12, 0.1)), (second, (0.25, 0.25, 0.25, 0.25))):
        layer.choice.logits.data.copy_(torch.tensor(p).log())
    set_coefficient(net.layers[2].skip, 0.31)
    set_coefficient(net.layers[3].skip, 0.29)

    def always(options):
        return True

    assert shrink(net, optimizers, always, **FEW | {"block_below": 0.09, "layer_below": 0.28}) == []
    events = shrink(net, optimizers, always, **FEW | {"block_below": 0.11, "layer_below": 0.30})
    assert events == [{"block": "stage1/0/ds-k3-se"}, {"layer": "stage1/2"}]
    # The rest of a layer's blocks share what the removed one had: 0.12 became 0.133.
    assert shrink(net, optimizers, always, **FEW | {"block_below": 0.13}) == []
    events = shrink(net, optimizers, always, **FEW | {"block_below": 0.9})
    assert [e["block"] for e in events if "stage1/0" in e["block"]] == ["stage1/0/er-k3-se", "stage1/0/ir-k5-se"]
    assert first.only == "ir-k3" and len(second.blocks) == 1  # the best one stays, whatever the threshold
    assert shrink(net, optimizers, always, **FEW | {"block_below": 1.0}) == []
    consistent(net, optimizers)


def test_a_closed_skip_is_never_taken():
    net, optimizers = trained(open_skips=False)
    for gate in gates_of(net, SkipGate).values():
        gate.kappa.data.fill_(-9.0)
        assert gate.best() == KEEP and gate.soft() == KEEP and gate.probabilities().tolist() == [0, 1]
    assert shrink(net, optimizers, lambda options: True, **FEW | {"layer_below": 1.0}) == []


@both_kinds
def test_widths_go_after_patience_steps_under_the_threshold(bipath):
    net, optimizers = trained(bipath=bipath)
    gate = net.widths["head"]
    options = gate.widths
    high, low = torch.logit(torch.tensor(0.99)), torch.logit(torch.tensor(0.01))

    def step(patience=3):
        return shrink(net, optimizers, lambda options: True, **FEW | {"width_below": 0.05, "patience": patience})

    gate.alpha.data.fill_(high)
    assert step() == []
    gate.alpha.data[-2] = low  # the last two groups are dead
    assert step() == step() == []
    gate.alpha.data[-2] = high  # and come back
    assert step() == []
    gate.alpha.data[-2] = low
    assert step() == step() == []
    events = step()
    assert events == [{"width": "head", "channels": options[-3]}] and gate.widths == options[:-2]
    assert net.classifier.in_features == net.bn2.num_features == options[-3]
    consistent(net, optimizers)
    gate.alpha.data.fill_(low)  # all but the first group
    assert step() == step() == []
    assert step() == [{"width": "head", "channels": options[0]}] and gate.widths == options[:1]
    assert net.soft()["head"] == options[0] == net.draw()["head"]  # nothing is left to decide
    assert [step() for _ in range(4)] == [[]] * 4
    net(batch(0)[0], net.soft())


def unleash(net, seed, spread=4.0):
    """Random logits in every gate, every skip open."""
    g = torch.Generator().manual_seed(seed)
    for gate in net.gates().values():
        if isinstance(gate, SkipGate):
            gate.is_open = True
        for p in gate.parameters():
            p.data.copy_(torch.randn(p.shape, generator=g) * spread)


def test_a_guard_that_says_no_leaves_only_the_moves_of_pairs():
    net, optimizers = trained(open_skips=True)
    asked, events = [], []
    start = {n: list(v) for n, v in net.live_options().items()}

    def no(options):
        asked.append(options)
        return False

    for seed in range(12):
        unleash(net, seed)
        harsh = {"move_above": 0.6, "block_below": 0.5, "layer_below": 0.9, "width_below": 0.9, "patience": 1}
        events += shrink(net, optimizers, no, **harsh)
        assert net.live_options() == start
    assert events and all(event.keys() == {"pair", "widths"} for event in events)
    # It was asked about every kind of cut, with the options that would be left and all others as they are.
    kinds = set()
    for options in asked:
        (name,) = [n for n in start if options[n] != start[n]]
        assert set(options[name]) < set(start[name]) and len(options[name])
        kinds.add(name.split("/")[-1])
    assert {"block", "keep", "stem", "width", "head"} <= kinds
    consistent(net, optimizers)


@pytest.mark.parametrize("share", [0.15, 0.6])
@both_kinds
def test_under_the_real_guard_the_budget_stays_within_reach(bipath, share):
    net, optimizers = trained(bipath=bipath, open_skips=True)
    table = CostTable.build(net.space, "macs")
    limit = table.of(table.extremes()[1]) * share
    rng = random.Random(0)

    def may_end_with(options):
        low, high = (table.of(arch) for arch in table.extremes(options))
        return low <= limit <= high

    assert may_end_with(net.live_options())
    happened = set()
    for seed in range(12):
        unleash(net, 100 + seed)
        harsh = {"move_above": 0.6, "block_below": 0.3, "layer_below": 0.4, "width_below": 0.3, "patience": 2}
        for event in shrink(net, optimizers, may_end_with, **harsh):
            happened.add(next(iter(event)))
        live = net.live_options()
        low, high = (table.of(arch) for arch in table.extremes(live))
        assert low <= limit <= high
        for _ in range(20):  # the two ends are the ends, and hold what is live only
            options = {d.name: d.options[rng.choice(live[d.name])] for d in net.space.decisions}
            assert low <= table.of(net.space.complete(options)) <= high
        consistent(net, optimizers)
        draws = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            answers = net.draw(draws)
        weight_step(net, optimizers[0], answers, seed)
        gate_step(net, optimizers[1], draws)
        assert all(net.space.by_name[n].index(a) in live[n] for n, a in answers.items())
    allowed = {"pair", "width", "block", "layer"} if bipath else {"width", "block", "layer"}
    assert happened == allowed if share < 0.2 else happened <= allowed
    # After all that, what is left is still the plain net that it says it is.
    best = net.best()
    assert low <= table.of(best) <= high
    model = build_net(net_of(net.macro, best), num_classes=CLASSES)
    model.load_state_dict(plain_state(net, best))
    with torch.no_grad():
        torch.testing.assert_close(net.eval()(batch(1)[0], best), model.eval()(batch(1)[0]), rtol=1e-4, atol=1e-5)


def test_a_layer_that_the_budget_needs_goes_on_learning():
    """However low its coefficient: what it will be, if it must stay, is still to be decided."""
    net, optimizers = trained(open_skips=True)
    for gate in net.gates().values():
        if isinstance(gate, SkipGate):
            gate.kappa.data.fill_(-4.0)
        elif isinstance(gate, PairGate):
            gate.logits.data.copy_(torch.tensor([-4.0, 4.0]))
        elif isinstance(gate, ChoiceGate):
            gate.logits.data[0] = -9.0
    layers = {"stage1/0", "stage1/1", "stage1/2"}
    moved, removed = set(), set()
    for _ in range(10):
        keep_all = FEW | {"move_above": 0.7, "block_below": 0.01, "layer_below": 0.4}
        for event in shrink(net, optimizers, lambda options: not any(v == [0] for v in options.values()), **keep_all):
            moved |= {event["pair"].rpartition("/")[0].rpartition("/")[0]} if "pair" in event else set()
            removed |= {event["block"].rpartition("/")[0]} if "block" in event else set()
    assert moved == removed == layers


def test_drawing_and_shrinking_are_silent():
    """Torch warns, once a process, where a tensor that needs a gradient is read as a number."""
    net, optimizers = trained(open_skips=True)
    unleash(net, 0)
    always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        net.draw(torch.Generator().manual_seed(0))
        net.best()
        shrink(
            net, optimizers, lambda options: True, **FEW | {"layer_below": 0.5, "block_below": 0.2, "move_above": 0.5}
        )
    finally:
        torch.set_warn_always(always)


def test_pairs_bracket_and_then_slide_over_their_grid():
    gate = PairGate(list(range(8, 8 * 17, 8)))
    assert (gate.low, gate.high) == (3, 15)
    assert gate.update(0.6) is None  # undecided
    for winner, pair in ((1, (9, 15)), (0, (9, 12)), (1, (11, 12)), (1, (12, 13)), (0, (11, 12)), (0, (10, 11))):
        gate.logits.data.copy_(torch.tensor([6.0, 0.0] if winner == 0 else [0.0, 6.0]))
        moves = [gate.update(0.9) for _ in range(20)]
        assert moves[0] is None and moves[-1] == pair  # the average has to get there first
        gate.move(*pair)
        assert float(gate.p_large) == 0.5 and gate.update(0.6) is None
    for start, winner in (((0, 1), 0), ((14, 15), 1)):  # no further than the grid
        gate.move(*start)
        gate.logits.data[winner] = 6.0
        assert [gate.update(0.6) for _ in range(20)] == [None] * 20
    alone = PairGate([8])
    assert alone.update(0.0) is None and alone.soft() == alone.draw() == alone.best() == 8
    assert alone.probabilities().tolist() == [1.0]


def test_a_shrunken_net_is_cheaper_to_run():
    """The live cost of the net falls with every cut, and what is saved for the backward pass with it."""

    def saved(net):
        sizes = []

        def pack(t):
            sizes.append(t.numel())
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            net(batch(0)[0], net.soft(torch.Generator().manual_seed(0)))
        return sum(sizes)

    net, optimizers = trained(open_skips=True)
    before = saved(net)
    for gate in gates_of(net, MarkovGate).values():
        gate.alpha.data[len(gate.alpha) // 2 :] = -9.0
    for gate in gates_of(net, ChoiceGate).values():
        gate.logits.data.copy_(torch.tensor([5.0, 0.0, 0.0, 0.0]))
    net.layers[3].skip.kappa.data.fill_(-5.0)
    shrink(net, optimizers, lambda options: True, **FEW | {"block_below": 0.1, "layer_below": 0.1, "width_below": 0.05})
    assert saved(net) < 0.35 * before


def test_statistics_that_cannot_be_cut_start_anew():
    """Adafactor keeps row and column means of a matrix: none has the matrix's shape."""
    conv = nn.Conv2d(16, 32, 1, bias=False)
    optimizer = create_optimizer_v2(conv, opt="adafactor", lr=1e-3)
    for width in (32, 8):
        resize_module(conv, "out", width, [optimizer])
        conv(torch.randn(2, 16, 4, 4)).square().mean().backward()
        optimizer.step()
    sizes = {n for v in optimizer.state[conv.weight].values() if isinstance(v, torch.Tensor) for n in v.shape}
    assert 8 in sizes and 32 not in sizes
