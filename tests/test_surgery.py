"""Surgery on a training supernet: what is cut off was dead weight, for the outputs and for every step that follows."""

import copy
import math
import random

import pytest
import torch
from small_nets import (
    CLASSES,
    FEW,
    IMG,
    OPTIMIZERS,
    batch,
    both_kinds,
    both_optimizers,
    consistent,
    gate_step,
    same_outputs,
    schedule_of,
    train_alike,
    trained,
    weight_step,
)

from dnas.export.model_file import build_net, count_params
from dnas.nets.bipath_block import PairGate, Prunode
from dnas.nets.layer_choice import ChoiceGate
from dnas.nets.layer_supernet import MacroSupernet, net_of
from dnas.nets.shrink import cut_width, extract, move_pair, plain_state, remove_block, remove_layer, shrink
from dnas.spec.space import DROP, KEEP
from supernets import SUPERNETS

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
    net.fit(optimizers)
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
    assert layer.choice.live() == [0, 2] and layer.choice.logits.tolist() == pytest.approx([0.3, 0.1])
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
        net.fit(optimizers)
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
        assert block.gate.average == 0.5
    net.fit(optimizers)
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
    net.fit()
    optimizers = [OPTIMIZERS[opt](net.weight_parameters())]
    answers = net.widest() | {n: KEEP for n in net.gates() if n.endswith("/keep")}
    for k in range(4):
        weight_step(net, optimizers[0], answers | {block.mid: (block.gate.small, block.gate.large)[k % 2]}, k)
    optimizers[0].zero_grad()
    before = copy.deepcopy(net)
    small, large = block.gate.small, block.gate.large
    move_pair(block, 1, 5, optimizers)
    net.fit(optimizers)
    assert (block.gate.small, block.gate.large) == (small, large + 4) == (small, block.block.conv_pwl.in_channels)
    for p, state in optimizers[0].state.items():
        assert all(v.shape == p.shape for v in state.values() if isinstance(v, torch.Tensor) and v.dim())
    same_outputs(before, net, answers | {block.mid: small}, 1e-6)
    same_outputs(before, net, answers | {block.mid: large + 4}, 1e-6, answers | {block.mid: large})
    with torch.no_grad():
        x, q = torch.randn(2, 16, 8, 8).double(), torch.tensor([0.4, 0.6]).double()
        was = before.layers[1].blocks[name]
        torch.testing.assert_close(block.eval()(x, q, 16), was.eval()(x, q, 16), rtol=1e-5, atol=1e-5)
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
    net.fit(optimizers)
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
        net = MacroSupernet(SUPERNETS[name](num_classes=CLASSES, img_size=IMG, width_mult=0.25))
        with torch.no_grad():
            for k in range(2):
                net.train()(batch(net, k)[0], net.widest())
    else:
        net, _ = trained(bipath=name == "bipath")
    start = [t.clone() for t in net.tensors()]
    x = batch(net, 5)[0]
    for seed in range(2 if name in SUPERNETS else 4):
        rng = random.Random(seed)
        arch = net.space.complete({d.name: rng.choice(d.options) for d in net.space.decisions})
        cut = extract(net, arch)
        assert all(map(torch.equal, net.tensors(), start))  # the supernet is left alone
        model = build_net(net_of(net.outline, arch), num_classes=CLASSES).to(x.dtype)
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
