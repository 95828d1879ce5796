"""Shrinking by thresholds while a supernet trains: what goes when, what the budget keeps, what pairs do."""

import random

import pytest
import torch
from small_nets import (
    CLASSES,
    FEW,
    batch,
    both_kinds,
    consistent,
    gate_step,
    set_coefficient,
    trained,
    weight_step,
)
from timm.optim import create_optimizer_v2
from torch import nn

from dnas.export.model_file import build_net
from dnas.methods.derive import gate_likelihood
from dnas.nets.bipath_block import PairGate, Prunode
from dnas.nets.cut_tensors import resize_module
from dnas.nets.layer_choice import ChoiceGate, SkipGate
from dnas.nets.layer_supernet import net_of
from dnas.nets.markov_gate import MarkovGate
from dnas.nets.shrink import has_weights_of, move_pair, plain_state, shrink
from dnas.spec.cost import CostTable
from dnas.spec.space import KEEP


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
        assert gate.best() == KEEP and gate.settled and gate.probabilities().tolist() == [0, 1]
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
    net(batch(net, 0)[0], net.soft())


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
    model = build_net(net_of(net.outline, best), num_classes=CLASSES).double()
    model.load_state_dict(plain_state(net, best))
    x = batch(net, 1)[0]
    with torch.no_grad():
        torch.testing.assert_close(net.eval()(x, best), model.eval()(x), rtol=1e-4, atol=1e-5)


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

    def update(threshold):
        return gate.update(float(torch.softmax(gate.logits.detach(), 0)[1]), threshold)

    assert update(0.6) is None  # undecided
    for winner, pair in ((1, (9, 15)), (0, (9, 12)), (1, (11, 12)), (1, (12, 13)), (0, (11, 12)), (0, (10, 11))):
        gate.logits.data.copy_(torch.tensor([6.0, 0.0] if winner == 0 else [0.0, 6.0]))
        moves = [update(0.9) for _ in range(20)]
        assert moves[0] is None and moves[-1] == pair  # the average has to get there first
        gate.move(*pair)
        assert gate.average == 0.5 and update(0.6) is None
    for start, winner in (((0, 1), 0), ((14, 15), 1)):  # no further than the grid
        gate.move(*start)
        gate.logits.data[winner] = 6.0
        assert [update(0.6) for _ in range(20)] == [None] * 20
    alone = PairGate([8])
    assert alone.update(1.0, 0.0) is None and alone.settled and alone.widest() == alone.draw() == alone.best() == 8
    assert alone.probabilities().tolist() == [1.0]


def test_a_shrunken_net_is_cheaper_to_run():
    """The live cost of the net falls with every cut, and what is saved for the backward pass with it."""

    def saved(net):
        sizes = []

        def pack(t):
            sizes.append(t.numel())
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            net(batch(net, 0)[0], net.soft(torch.Generator().manual_seed(0)))
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


def test_weights_are_there_for_what_is_physically_left():
    """A pair that has moved down has none for the widths above it, although it may still move there."""
    net, _ = trained(open_skips=True)
    prunode = next(b for layer in net.layers for b in layer.blocks.values() if isinstance(b, Prunode))
    d = net.space.by_name[prunode.mid]
    layer, name = next((la, n) for la in net.layers for n, b in la.blocks.items() if b is prunode)
    held = {f"{layer.name}/block": name, f"{layer.name}/keep": KEEP}
    archs = [
        net.space.complete({e.name: held.get(e.name, e.options[-1]) for e in net.space.decisions} | {d.name: w})
        for w in d.options
    ]
    assert all(has_weights_of(net, arch) for arch in archs)
    move_pair(prunode, 0, 1, [])
    assert [has_weights_of(net, arch) for arch in archs] == [w <= d.options[1] for w in d.options]
    for arch in archs[:2]:
        build_net(net.net_of(arch), num_classes=CLASSES).load_state_dict(plain_state(net, arch))
    like = gate_likelihood(net, only_present=True)[d.name]
    assert int(like.argmax()) <= 1 and all(like[2:] == -1000)
