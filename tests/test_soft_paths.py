"""What gates multiply by while they learn, against sums of plain timm blocks; memory; what candidates share."""

import copy
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from settled_nets import (
    CLASSES,
    MACROS,
    close,
    every_answer,
    images,
    mixed,
    plain,
    random_arch,
    settled,
    unsettle,
)
from timm.models._efficientnet_blocks import DepthwiseSeparableConv, EdgeResidual, InvertedResidual, SqueezeExcite
from torch import nn
from torch.nn import functional as F

from dnas.nets.bipath_block import GatedBlock, PairGate, Prunode
from dnas.nets.layer_choice import ChoiceGate
from dnas.nets.layer_supernet import MacroSupernet
from dnas.nets.markov_gate import MarkovGate
from dnas.nets.shrink import move_pair
from dnas.spec.layer_space import Candidate, EfficientNetSpace, Stage
from dnas.spec.space import DROP, KEEP

# The soft path of the bi-path block.


def timm_block(kind, chs_in, mid, chs_out, kernel, stride, se, act=nn.SiLU):
    squeeze = partial(SqueezeExcite, rd_channels=se) if se else None
    args = {"stride": stride, "noskip": True, "act_layer": act, "se_layer": squeeze}
    made = InvertedResidual if kind == "ir" else EdgeResidual
    return made(chs_in, chs_out, kernel, exp_ratio=mid / chs_in, **args)


def extracted(prunode, kind, mid, **shape):
    """A plain timm block of hidden width ``mid``: every tensor is a prefix of the bank's."""
    source = prunode.block.state_dict()
    last = "bn3" if kind == "ir" else "bn2"
    if mid == prunode.gate.small:
        source |= {f"{last}.{n}": t for n, t in prunode.norm_small.state_dict().items()}
    chs_in = source["conv_pw.weight" if kind == "ir" else "conv_exp.weight"].shape[1]
    block = timm_block(kind, chs_in, mid, source["conv_pwl.weight"].shape[0], **shape)
    block.load_state_dict({n: source[n][tuple(map(slice, t.shape))] for n, t in block.state_dict().items()})
    return block


@torch.no_grad()
@pytest.mark.parametrize("wider_bank", [False, True], ids=["own-bank", "wider-bank"])
@pytest.mark.parametrize("se", [0, 6], ids=["plain", "se"])
@pytest.mark.parametrize("kind", ["ir", "er"])
def test_a_bipath_block_is_the_weighted_sum_of_two_plain_blocks(kind, se, wider_bank):
    torch.manual_seed(3)
    shape = {"kernel": 5, "stride": 2, "se": se}
    whole = timm_block(kind, 8, 64, 24, **shape)
    prunode = unsettle(Prunode(whole, "mid", PairGate([8, 16, 24, 32, 40, 48, 56, 64])))
    if wider_bank:  # of all modules but squeeze-excite, which every candidate has for itself
        prunode.gate.move(2, 4)
        for side in ("conv_reduce", "conv_expand") if se else ():
            conv = getattr(whole.se, side)
            conv.weight.data = conv.weight.data[:, :40] if side == "conv_reduce" else conv.weight.data[:40]
            if side == "conv_expand":
                conv.bias.data, conv.out_channels = conv.bias.data[:40], 40
            else:
                conv.in_channels = 40
    assert (prunode.gate.small, prunode.gate.large) == ((24, 40) if wider_bank else (16, 64))
    x = torch.randn(4, 8, 10, 10)
    for training in (False, True):
        small, large = (
            extracted(prunode, kind, m, **shape).train(training) for m in (prunode.gate.small, prunode.gate.large)
        )
        y_small, y_large = small(x), large(x)
        assert float((y_small - y_large).abs().max()) > 0.1
        start = copy.deepcopy(prunode.state_dict())
        for q in ((0.3, 0.7), (1.0, 0.0), (0.0, 1.0)):
            prunode.load_state_dict(start)
            y = prunode.train(training)(x, torch.tensor(q), 24)
            close(y, q[0] * y_small + q[1] * y_large)
            if training and q == (0.3, 0.7):  # and both copies' statistics went on as in the plain blocks
                last = "bn3" if kind == "ir" else "bn2"
                for name, plain_block in (("norm_small", small), (f"block.{last}", large)):
                    for stat in ("running_mean", "running_var"):
                        close(prunode.state_dict()[f"{name}.{stat}"], plain_block.state_dict()[f"{last}.{stat}"])
        for mid, want in ((prunode.gate.small, y_small), (prunode.gate.large, y_large)):
            prunode.load_state_dict(start)
            close(prunode(x, mid, 24), want)


@torch.no_grad()
def test_a_candidate_whose_pair_moved_down_reads_the_bank_that_others_keep_wide():
    net = settled(mixed(True))
    layer = net.layers[3]
    moved, other = layer.blocks["ir-k5-se"], layer.blocks["ir-k3"]
    move_pair(moved, 0, 3)
    net.fit()
    assert (
        moved.gate.large
        < other.gate.large
        == moved.block.conv_pwl.in_channels
        == layer.blocks["er-k3"].block.conv_pwl.in_channels
    )
    assert moved.block.se.conv_reduce.in_channels == moved.gate.large
    net.eval()
    x = torch.randn(2, 24, 8, 8)
    for name in ("ir-k5-se", "er-k3", "er-k5-se", "ir-k3"):
        block, c = layer.blocks[name], next(c for c in net.outline.stages[1].candidates if c.name == name)
        se = 0 if isinstance(block.block.se, nn.Identity) else block.block.se.conv_reduce.out_channels
        widths = (block.gate.small, block.gate.large)
        shape = {"kernel": c.kernel, "stride": 1, "se": se, "act": nn.Hardswish}
        small, large = (extracted(block, c.kind, mid, **shape).eval()(x) for mid in widths)
        close(block(x, torch.tensor([0.4, 0.6]), 24), 0.4 * small + 0.6 * large)


def test_soft_memory_does_not_grow_with_the_number_of_widths():
    def saved_bytes(prunode, mid):
        storages = {}

        def pack(t):
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes(), t.untyped_storage()  # kept alive
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = prunode(x, mid, 16)
        parameters = {p.untyped_storage().data_ptr() for p in prunode.parameters()}
        total = sum(size for at, (size, _) in storages.items() if at not in parameters)
        y.sum().backward()
        return total

    x = torch.randn(4, 16, 12, 12, requires_grad=True)
    for kind in ("ir", "er"):
        for se in (0, 4):
            sizes, grids = {}, {4: range(24, 97, 24), 64: range(33, 97)}
            for count, grid in grids.items():
                assert len(grid) == count and grid[-1] == 96
                gate = PairGate(list(grid))
                prunode = Prunode(timm_block(kind, 16, 96, 16, 3, 1, se), "mid", gate).train()
                sizes[count] = saved_bytes(prunode, gate.soft(1.0, torch.Generator().manual_seed(0)))
                one = saved_bytes(prunode, gate.large)
            print(f"{kind} se={se}: {sizes} bytes, one path {one}")
            assert 0.9 <= sizes[64] / sizes[4] <= 1.1
            assert sizes[64] <= 2.2 * one  # and it is two paths, of which the first half is computed once


# The soft path of the Markov gates.


def answers_of_chain(net, seed):
    """Soft answers with random marginals in every Markov gate, and one drawn candidate in every layer."""
    g = torch.Generator().manual_seed(seed)
    for gate in net.gates().values():
        if isinstance(gate, MarkovGate):
            gate.alpha.data.copy_(torch.randn(gate.alpha.shape, generator=g) + 1)
    picks = {n: gate.draw(g) for n, gate in net.gates().items() if isinstance(gate, ChoiceGate)}
    return net.soft(g) | picks


@torch.no_grad()
@pytest.mark.parametrize("name", ["mobilenet_v2", "mixed-markov"])
def test_markov_factors_act_once_where_the_paper_says(name):
    """A factor on a hidden channel is one on the projection's column, on a stream one on the last norm."""

    def factor(answer):  # a gate with one width left answers that width
        return answer if isinstance(answer, torch.Tensor) else torch.ones(answer)

    macro = MACROS[name]()
    if name == "mixed-markov":  # squeeze-excite reads the scaled map: not a matter of the projection alone
        stages = [replace(s, candidates=tuple(c for c in s.candidates if not c.se)) for s in macro.stages]
        macro = replace(macro, stages=tuple(stages))
    net = settled(macro).eval()
    for seed in range(3):
        answers = answers_of_chain(net, seed)
        arch = net.space.complete(net.widest() | {n: v for n, v in answers.items() if isinstance(v, str)})
        model, before = plain(net, arch).eval(), "stem"
        blocks = [block for stage in model.blocks for block in stage]
        for layer, block in zip(net.layers, blocks, strict=True):
            gated = layer.blocks[arch.get(f"{layer.name}/block") or layer.only]
            is_ds = isinstance(block, DepthwiseSeparableConv)
            assert gated.mid == before if is_ds else gated.mid.endswith("/mid")
            (block.conv_pw if is_ds else block.conv_pwl).weight.mul_(factor(answers[gated.mid])[:, None, None])
            last = block.bn3 if isinstance(block, InvertedResidual) else block.bn2
            last.weight.mul_(factor(answers[layer.out]))
            last.bias.mul_(factor(answers[layer.out]))
            before = layer.out
        model.classifier.weight.mul_(factor(answers["head"]))
        x = images(macro, seed)
        close(net(x, answers), model(x))
        assert float((model(x) - net(x, arch)).abs().max()) > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("name", ["mobilenet_v2", "mixed-markov"])
def test_markov_marginals_of_one_change_nothing(name):
    macro = MACROS[name]()
    net, x = settled(macro), images(macro)
    answers = answers_of_chain(net, 0)
    widest = net.widest() | {n: v for n, v in answers.items() if isinstance(v, str)}
    for gate in net.gates().values():
        if isinstance(gate, MarkovGate):
            gate.alpha.fill_(60.0)
    soft = net.soft() | {n: v for n, v in widest.items() if isinstance(v, str)}
    assert any(isinstance(v, torch.Tensor) for v in soft.values())
    for training in (False, True):
        assert torch.equal(net.train(training)(x, soft), net(x, widest))


# The layer: choice and skip.


@torch.no_grad()
@pytest.mark.parametrize("name", ["mixed-bipath", "mixed-markov"])
def test_a_soft_choice_is_the_weighted_sum_of_its_blocks(name):
    net = settled(MACROS[name]()).eval()
    layer, x = net.layers[3], torch.randn(2, 24, 8, 8)
    g = torch.Generator().manual_seed(0)
    layer.choice.logits.copy_(torch.tensor([0.5, -0.5, 0.0, 0.2]))
    for paths, count in ((0, 4), (2, 2), (1, 1), (9, 4)):
        weights = layer.choice.soft(1.0, g, paths)
        assert len(weights) == count and math.isclose(sum(map(float, weights.values())), 1, rel_tol=1e-6)
        answers = net.soft(g) | {f"{layer.name}/block": weights}
        runs = {b: layer(x, answers | {f"{layer.name}/block": b}) - x for b in weights}
        close(layer(x, answers), x + sum(w * runs[b] for b, w in weights.items()))
        for b in set(layer.blocks) - set(weights):  # the others are not run at all: without answers they would fail
            del answers[layer.blocks[b].mid]
        layer(x, answers)


@torch.no_grad()
@pytest.mark.parametrize("name", ["prunet", "mixed-bipath", "mixed-markov"])
def test_an_open_skip_scales_the_branch_alone(name):
    net = settled(MACROS[name]())
    droppable = [layer for layer in net.layers if layer.skip]
    assert droppable and all(layer.residual for layer in droppable)
    for training in (True, False):
        net.train(training)
        for layer in droppable:
            layer.skip.is_open = False
            closed = net.widest()
            x = torch.randn(4, net.widths[layer.out].widths[-1], 8, 8)
            assert layer.skip.settled and layer.skip.widest() == KEEP
            before = layer(x, closed)
            layer.skip.open(0.8)
            after = layer(x, closed | {f"{layer.name}/keep": layer.skip.coefficient()})
            torch.testing.assert_close(after - x, 0.8 * (before - x), rtol=1e-4, atol=1e-5)  # the shortcut is untouched
            assert layer.skip.best() == KEEP and float(layer.skip.probabilities()[1]) == pytest.approx(0.8)


@torch.no_grad()
@pytest.mark.parametrize("name", ["prunet", "mixed-bipath", "mixed-markov"])
def test_a_skip_coefficient_of_zero_is_the_net_without_the_layer(name):
    macro = MACROS[name]()
    net, x = settled(macro).eval(), images(macro)
    for k, layer in enumerate([layer for layer in net.layers if layer.skip][:3]):
        answers = net.widest(torch.Generator().manual_seed(k))
        layer.skip.is_open = True
        start = float(layer.skip.kappa)
        layer.skip.kappa.fill_(-200.0)
        assert float(layer.skip.coefficient()) == 0
        dropped = net(x, answers | {f"{layer.name}/keep": DROP})
        assert torch.equal(net(x, answers | {f"{layer.name}/keep": layer.skip.coefficient()}), dropped)
        close(dropped, plain(net, net.space.complete(answers | {f"{layer.name}/keep": DROP})).eval()(x))
        assert float((dropped - net(x, answers)).abs().max()) > 1e-3
        layer.skip.kappa.fill_(start)


def test_candidates_of_a_layer_share_what_they_have_in_common_and_start_alike():
    torch.manual_seed(0)
    net = MacroSupernet(MACROS["prunet"]()).eval()
    layer = next(layer for layer in net.layers if len(layer.blocks) == 8 and layer.residual)
    blocks = {n: b.block for n, b in layer.blocks.items()}
    assert len({id(b.conv_pwl) for b in blocks.values()}) == 1
    ir = {n: b for n, b in blocks.items() if n.startswith("ir")}
    assert len({id(b.conv_pw) for b in ir.values()}) == len({id(b.bn1) for b in ir.values()}) == 1
    assert ir["ir-k3"].conv_dw is ir["ir-k3-se"].conv_dw is not ir["ir-k5"].conv_dw is ir["ir-k5-se"].conv_dw
    norms = [b.bn3 if n.startswith("ir") else b.bn2 for n, b in blocks.items()] + [
        b.norm_small for b in layer.blocks.values()
    ]
    assert len(set(map(id, norms))) == 16  # sums differ: each copy of each candidate has its last norm
    x = torch.randn(2, blocks["ir-k3"].conv_pw.in_channels, 8, 8)
    with torch.no_grad():
        close(ir["ir-k5"](x), ir["ir-k3"](x))
        # Without what is between them, expansion and depthwise convolution are the fused one (up to the border).
        for n in ("er-k3", "er-k5"):
            mid = blocks[n].conv_exp.out_channels
            inner = F.conv2d(x, ir["ir-k3"].conv_pw.weight[:mid])
            inner = F.conv2d(inner, ir["ir-k3"].conv_dw.weight[:mid], padding=1, groups=mid)
            close(blocks[n].conv_exp(x), inner)


def test_soft_and_hard_nets_run_in_bfloat16():
    for name in ("prunet", "mobilenet_v2"):
        macro = MACROS[name]()
        net, x = settled(macro).eval(), images(macro)
        for answers in (net.soft(torch.Generator().manual_seed(0)), net.widest(), random_arch(net.space, 0)):
            with torch.autocast("cpu", torch.bfloat16):
                y = net(x, answers)
            y.float().square().sum().backward()
            want = net(x, answers).detach()
            assert float((y.detach() - want).norm() / want.norm()) < 0.1
        assert all(bool(p.grad.isfinite().all()) for p in net.parameters() if p.grad is not None)


UNEVEN = {
    "fused wider than plain": (Candidate("ir", 3, 2, 2), Candidate("er", 3, 4, 4)),
    "fused kernel below the plain ones": (Candidate("ir", 5, 4, 4), Candidate("er", 3, 2, 2, se=0.25)),
    "larger kernel wider": (Candidate("ir", 3, 2, 2, se=0.25), Candidate("ir", 5, 4, 4)),
    "larger kernel narrower": (Candidate("ir", 3, 4, 4), Candidate("ir", 5, 2, 2), Candidate("er", 5, 1, 1)),
    "fused only": (Candidate("er", 3, 2, 2), Candidate("er", 5, 4, 4)),
}


@pytest.mark.parametrize("case", UNEVEN)
def test_candidates_of_any_widths_can_share(case):
    torch.manual_seed(0)
    stage = Stage(16, 2, 1, UNEVEN[case])
    macro = EfficientNetSpace("uneven", 16, 1, (stage,), 24, "relu", True, CLASSES, 3, 8, 8)
    net = unsettle(MacroSupernet(macro)).eval()
    names, x = [c.name for c in UNEVEN[case]], images(macro)
    soft = net(x, net.soft(torch.Generator().manual_seed(0)))
    soft.sum().backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in net.parameters())
    with torch.no_grad():
        for name in names:
            picks = {d.name: name for d in net.space.decisions if d.name.endswith("/block")}
            for seed in range(2):
                arch = net.space.complete(every_answer(net.space, seed) | picks)
                close(net(x, arch), plain(net, arch).eval()(x))


def test_the_residual_branch_is_all_that_a_block_gives():
    """Prunode and GatedBlock leave the shortcut to the layer, whatever the shapes."""
    for made in (Prunode, GatedBlock):
        block = timm_block("ir", 8, 32, 8, 3, 1, 0)
        assert not block.has_skip
        gate = PairGate([8, 16, 24, 32]) if made is Prunode else MarkovGate([8, 16, 24, 32])
        x = torch.randn(2, 8, 6, 6)
        with torch.no_grad():
            assert torch.equal(made(block, "mid", gate).eval()(x, 32, 8), block.eval()(x))
