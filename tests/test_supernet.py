"""Supernets against plain timm nets: counted costs, logits, gradients, the soft paths, memory; and their macros."""

import copy
import math
import random
from dataclasses import replace
from functools import partial

import pytest
import timm
import torch
from timm.models._efficientnet_blocks import DepthwiseSeparableConv, EdgeResidual, InvertedResidual, SqueezeExcite
from torch import nn
from torch.nn import functional as F

from dnas.arch import DROP, KEEP
from dnas.cost import CostTable
from dnas.export import build_net, count_macs, count_macs_torch, count_params
from dnas.gates import MarkovGate
from dnas.prunode import GatedBlock, PairGate, Prunode
from dnas.stochastic import ChoiceGate, SkipGate, scale_channels
from dnas.supernet import (
    Candidate,
    Macro,
    Stage,
    Supernet,
    net_of,
    space_of,
)
from dnas.surgery import fit, move_pair, plain_state
from supernets import SUPERNETS

CLASSES = 5


def mixed(bipath, *, in_chans=2, img_size=16):
    """Few layers with everything in them: residual and strided, all kinds, squeeze-excite, layers that may go."""
    ds = (Candidate("ds", 3), Candidate("ds", 5, se=0.25))
    plain = (Candidate("ir", 3, 4, 4), Candidate("ir", 5, 4, 2, se=0.25))
    fused = (Candidate("er", 3, 2, 2), Candidate("er", 5, 1, 1, se=0.25))
    stages = (Stage(16, 2, 1, ds, droppable=True), Stage(24, 3, 2, plain + fused, droppable=True))
    stages += (Stage(32, 2, 1, (plain[1], ds[0])), Stage(40, 1, 2, plain[:1]))
    return Macro("mixed", 24, 1, stages, 48, "hard_swish", bipath, CLASSES, in_chans, img_size, 8)


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
    net = unsettle(Supernet(macro), seed).train()
    for k in range(4):
        net(images(macro, 100 + k, 8), net.widest() if k % 2 else random_arch(net.space, k))
    return net


def plain(net, arch):
    """The timm net of ``arch`` with the supernet's weights."""
    model = build_net(net_of(net.macro, arch), num_classes=net.macro.num_classes, in_chans=net.macro.in_chans)
    model.load_state_dict(plain_state(net, arch))
    return model


def close(a, b, tolerance=1e-5):
    """Within ``tolerance`` of the larger of 1 and the greatest magnitude."""
    gap = float((a - b).abs().max().detach())
    assert gap <= tolerance * max(1.0, float(b.abs().max().detach())), gap
    return gap


def test_the_macros_under_test_hold_every_kind_of_block_and_answer():
    kinds = {(c.kind, bool(c.se)) for name in MACROS for stage in MACROS[name]().stages for c in stage.candidates}
    assert kinds == {(kind, se) for kind in ("ds", "ir", "er") for se in (False, True)}
    assert {MACROS[name]().bipath for name in MACROS} == {True, False}
    for name in ("prunet", "mixed-bipath", "mixed-markov"):
        space = space_of(MACROS[name]())
        archs = [random_arch(space, seed) for seed in range(20)]
        assert any(DROP in arch.values() for arch in archs) and any(KEEP in arch.values() for arch in archs)


# Costs: the tables against counters that know nothing of them.


@pytest.mark.parametrize("name", [*SUPERNETS, "mixed-bipath"])
def test_tables_count_what_fvcore_and_torch_count(name):
    shapes = ((16, 3, 8), (28, 1, 4), (66, 3, 8)) if name in SUPERNETS else ((16, 2, 8),)
    for k, (img_size, in_chans, divisor) in enumerate(shapes):
        data = {"num_classes": 3 + k, "in_chans": in_chans, "img_size": img_size}
        macro = mixed(True) if name == "mixed-bipath" else SUPERNETS[name](**data, width_mult=0.25, divisor=divisor)
        space = space_of(macro)
        macs, params = (CostTable.build(space, metric) for metric in ("macs", "params"))
        seeds = range(k, 50, len(shapes))  # 50 architectures in all
        archs = [random_arch(space, seed) for seed in seeds]
        assert len(set(archs)) >= 0.8 * len(archs)
        for j, arch in enumerate([*macs.extremes(), *archs]):
            model = build_net(net_of(macro, arch), num_classes=macro.num_classes, in_chans=macro.in_chans)
            assert count_params(model) == params.of(arch)
            assert count_macs_torch(model, macro.in_chans, macro.img_size) == macs.of(arch)
            if j % 10 == 0:
                assert count_macs(model, macro.in_chans, macro.img_size) == macs.of(arch)


def test_mobilenet_v2_is_the_published_one_and_timms_own_bit_for_bit():
    macro = SUPERNETS["mobilenet_v2"](num_classes=1000, img_size=224)
    net = unsettle(Supernet(macro))
    arch = net.space.complete(net.widest())
    assert CostTable.build(net.space, "macs").of(arch) == 300_774_272  # 300.8 M
    assert CostTable.build(net.space, "params").of(arch) == 3_504_872  # 3.50 M
    theirs = timm.create_model("mobilenetv2_100")
    theirs.load_state_dict(plain_state(net, arch))
    x = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        assert torch.equal(net.eval()(x, arch), theirs.eval()(x))


# Hard answers: the masked supernet against the plain net.


@every_macro
def test_at_full_width_the_supernet_is_the_plain_net_bit_for_bit(name):
    macro = MACROS[name]()
    net, draws = settled(macro), torch.Generator().manual_seed(1)
    taken = set()
    for k in range(4):
        answers = net.widest(draws)
        arch = net.space.complete(answers)
        taken |= {v for v in arch.values() if isinstance(v, str)}
        model, x = plain(net, arch), images(macro, k)
        with torch.no_grad():
            assert torch.equal(net.eval()(x, answers), model.eval()(x))
            assert torch.equal(net.train()(x, answers), model.train()(x))
        after = plain_state(net, arch)
        for key, value in model.state_dict().items():
            if not key.endswith("num_batches_tracked"):  # a norm that several blocks share counts for all of them
                assert torch.equal(value, after[key]), key
    if name == "prunet":
        assert {"ir-k3", "er-k3", "er-k5-se"} <= taken


@every_macro
def test_masked_equals_exported_for_any_architecture(name):
    macro = MACROS[name]()
    net = settled(macro)
    for seed in range(6):
        arch = random_arch(net.space, seed)
        model, x = plain(net, arch), images(macro, seed)
        with torch.no_grad():
            close(net.eval()(x, arch), model.eval()(x))
            close(net.train()(x, arch), model.train()(x), 1e-4)  # in batches of 4 a norm can be ill-conditioned


def parameter_pairs(net, arch, model):
    """(name, plain parameter, the supernet's parameter of which it is a prefix), by timm's names alone."""
    own = dict(net.named_parameters())
    names = {n: n for n in own if n.startswith(("conv_stem.", "bn1.", "conv_head.", "bn2.", "classifier."))}
    position = {}
    for i, layer in enumerate(net.layers):
        if arch.get(f"{layer.name}/keep") == DROP:
            continue
        stage = layer.name.split("/")[0].removeprefix("stage")
        place = position[stage] = position.get(stage, -1) + 1
        chosen = arch.get(f"{layer.name}/block") or layer.only
        block = layer.blocks[chosen]
        takes_small = isinstance(block, Prunode) and arch[block.mid] == block.gate.small < block.gate.large
        last = "bn3" if isinstance(block.block, InvertedResidual) else "bn2"
        for n, _ in block.block.named_parameters():
            where = f"layers.{i}.blocks.{chosen}." + ("norm_small." if takes_small and n.startswith(last) else "block.")
            names[f"blocks.{stage}.{place}.{n}"] = where + (n.split(".")[-1] if "norm_small" in where else n)
    # A module that several candidates share has one name only among the parameters.
    every = dict(net.named_parameters(remove_duplicate=False))
    theirs = dict(model.named_parameters())
    assert names.keys() == theirs.keys()
    return [(n, p, every[names[n]]) for n, p in theirs.items()]


@every_macro
def test_gradients_are_the_plain_nets_and_exactly_zero_elsewhere(name):
    macro = MACROS[name]()
    net = settled(macro).train()
    for seed in range(3):
        arch = random_arch(net.space, seed)
        if seed == 2 and macro.bipath:  # the small copies, with the norms of their own
            small = {mid: gate.small for mid, gate in net.gates().items() if isinstance(gate, PairGate)}
            arch = net.space.complete(every_answer(net.space, seed) | small)
        model, x = plain(net, arch).train(), images(macro, seed, 8)
        y = torch.randint(CLASSES, (8,), generator=torch.Generator().manual_seed(seed))
        net.zero_grad()
        for forward in (lambda: net(x, arch), lambda: model(x)):  # noqa: B023
            F.cross_entropy(forward(), y).backward()
        seen, dead = set(), 0
        for key, theirs, ours in parameter_pairs(net, arch, model):
            inside = torch.zeros_like(ours, dtype=torch.bool)
            inside[tuple(slice(n) for n in theirs.shape)] = True
            assert torch.equal(ours[inside].view(theirs.shape), theirs), key
            scale = float(theirs.grad.abs().max())
            gap = (ours.grad[inside].view(theirs.shape) - theirs.grad).abs().max()
            assert float(gap) <= 1e-3 * scale + 1e-5, (key, float(gap), scale)
            assert not ours.grad[~inside].any(), key
            seen.add(id(ours))
            dead += int((~inside).sum())
        assert dead > 0
        for key, p in net.named_parameters():
            assert id(p) in seen or p.grad is None or not p.grad.any(), key


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
            y = prunode.train(training)(x, torch.tensor(q))
            close(y, q[0] * y_small + q[1] * y_large)
            if training and q == (0.3, 0.7):  # and both copies' statistics went on as in the plain blocks
                last = "bn3" if kind == "ir" else "bn2"
                for name, plain_block in (("norm_small", small), (f"block.{last}", large)):
                    for stat in ("running_mean", "running_var"):
                        close(prunode.state_dict()[f"{name}.{stat}"], plain_block.state_dict()[f"{last}.{stat}"])
        for mid, want in ((prunode.gate.small, y_small), (prunode.gate.large, y_large)):
            prunode.load_state_dict(start)
            close(prunode(x, mid), want)


@torch.no_grad()
def test_a_candidate_whose_pair_moved_down_reads_the_bank_that_others_keep_wide():
    net = settled(mixed(True))
    layer = net.layers[3]
    moved, other = layer.blocks["ir-k5-se"], layer.blocks["ir-k3"]
    move_pair(moved, 0, 3)
    fit(net)
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
        block, c = layer.blocks[name], next(c for c in net.macro.stages[1].candidates if c.name == name)
        se = 0 if isinstance(block.block.se, nn.Identity) else block.block.se.conv_reduce.out_channels
        widths = (block.gate.small, block.gate.large)
        shape = {"kernel": c.kernel, "stride": 1, "se": se, "act": nn.Hardswish}
        small, large = (extracted(block, c.kind, mid, **shape).eval()(x) for mid in widths)
        close(block(x, torch.tensor([0.4, 0.6])), 0.4 * small + 0.6 * large)


def test_soft_memory_does_not_grow_with_the_number_of_widths():
    def saved_bytes(prunode, mid):
        storages = {}

        def pack(t):
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes(), t.untyped_storage()  # kept alive
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = prunode(x, mid)
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
                sizes[count] = saved_bytes(prunode, gate.soft(torch.Generator().manual_seed(0)))
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


def test_scale_channels_masks_or_multiplies():
    x = torch.randn(2, 6, 3, 3)
    assert scale_channels(x, 6) is x
    cut = scale_channels(x, 4)
    assert torch.equal(cut[:, :4], x[:, :4]) and not cut[:, 4:].any()
    by = torch.rand(6)
    assert torch.equal(scale_channels(x, by)[:, 2], x[:, 2] * by[2])


# The layer: choice and skip.


@torch.no_grad()
@pytest.mark.parametrize("name", ["mixed-bipath", "mixed-markov"])
def test_a_soft_choice_is_the_weighted_sum_of_its_blocks(name):
    net = settled(MACROS[name]()).eval()
    layer, x = net.layers[3], torch.randn(2, 24, 8, 8)
    g = torch.Generator().manual_seed(0)
    layer.choice.logits.copy_(torch.tensor([0.5, -0.5, 0.0, 0.2]))
    for paths, count in ((0, 4), (2, 2), (1, 1), (9, 4)):
        weights = layer.choice.soft(g, paths)
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
            assert layer.skip.soft() == KEEP
            before = layer(x, closed)
            layer.skip.open(0.8)
            after = layer(x, closed | {f"{layer.name}/keep": layer.skip.soft()})
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
        assert torch.equal(net(x, answers | {f"{layer.name}/keep": layer.skip.soft()}), dropped)
        close(dropped, plain(net, net.space.complete(answers | {f"{layer.name}/keep": DROP})).eval()(x))
        assert float((dropped - net(x, answers)).abs().max()) > 1e-3
        layer.skip.kappa.fill_(start)


def test_candidates_of_a_layer_share_what_they_have_in_common_and_start_alike():
    torch.manual_seed(0)
    net = Supernet(MACROS["prunet"]()).eval()
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
    macro = Macro("uneven", 16, 1, (stage,), 24, "relu", True, CLASSES, 3, 8, 8)
    net = unsettle(Supernet(macro)).eval()
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


# Gates learn from the first step on.


@pytest.mark.parametrize("open_skips", [False, True])
@every_macro
def test_every_gate_has_a_gradient_from_the_task_at_the_first_step(name, open_skips):
    for seed in range(2 - open_skips):
        torch.manual_seed(seed)
        macro = MACROS[name]()
        net = Supernet(macro).train()
        for gate in net.gates().values():
            if isinstance(gate, SkipGate):
                gate.is_open = open_skips
        y = torch.randint(CLASSES, (16,))
        F.cross_entropy(net(images(macro, seed, 16), net.soft(torch.Generator().manual_seed(seed), 0)), y).backward()
        counted = 0
        for decision, gate in net.gates().items():
            for p in gate.parameters():
                if isinstance(gate, SkipGate) and not open_skips:
                    assert p.grad is None
                elif p.numel():
                    assert p.grad is not None and bool(p.grad.isfinite().all()), decision
                    assert bool((p.grad != 0).all()), (decision, p.grad)
                    counted += p.numel()
        assert counted >= len([d for d in net.space.decisions if len(d.options) > 1 and (d.is_width or open_skips)])


def test_every_decision_has_a_gate_and_every_gate_a_distribution():
    for name in MACROS:
        net = Supernet(MACROS[name]())
        assert net.gates().keys() == net.space.by_name.keys()
        for decision, p in ((d, p.detach()) for d, p in net.probabilities().items()):
            assert len(p) == len(net.space.by_name[decision].options)
            assert math.isclose(float(p.sum()), 1, rel_tol=1e-5) and float(p.min()) >= 0
        gates = {id(p) for p in net.gate_parameters()}
        weights = {id(p) for p in net.weight_parameters()}
        assert gates.isdisjoint(weights) and gates | weights == {id(p) for p in net.parameters()}
        for uniform in (False, True):
            for seed in range(3):
                draw = net.draw(torch.Generator().manual_seed(seed), uniform)
                net.space.complete(draw)
                assert draw == net.draw(torch.Generator().manual_seed(seed), uniform)


def test_slices_name_every_side_of_every_module_but_the_fixed_ones():
    net = Supernet(mixed(True))
    top = {d.name: d.options[-1] for d in net.space.decisions if d.is_width}
    dim_of = {"out": 0, "in": 1, "depthwise": 0, "norm": 0}
    cut = {}
    for decision, places in net.slices().items():
        for module, side in places:
            at = (module, dim_of[side])
            cut[at] = max(cut.get(at, 0), top[decision])
            assert side != "norm" or isinstance(module, nn.BatchNorm2d)
            assert (side == "depthwise") == (getattr(module, "groups", 1) > 1)
    fixed = {(net.conv_stem, 1), (net.classifier, 0)}  # image channels, classes, and the squeezed width
    for module in net.modules():
        if isinstance(module, SqueezeExcite):
            fixed |= {(module.conv_reduce, 0), (module.conv_expand, 1)}
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear, nn.BatchNorm2d)):
            one_sided = isinstance(module, nn.BatchNorm2d) or getattr(module, "groups", 1) > 1
            for dim in (0,) if one_sided else (0, 1):
                assert ((module, dim) in cut) != ((module, dim) in fixed), module
                assert (module, dim) in fixed or cut[module, dim] == module.weight.shape[dim]


def test_the_residual_branch_is_all_that_a_block_gives():
    """Prunode and GatedBlock leave the shortcut to the layer, whatever the shapes."""
    for made in (Prunode, GatedBlock):
        block = timm_block("ir", 8, 32, 8, 3, 1, 0)
        assert not block.has_skip
        gate = PairGate([8, 16, 24, 32]) if made is Prunode else MarkovGate([8, 16, 24, 32])
        x = torch.randn(2, 8, 6, 6)
        with torch.no_grad():
            assert torch.equal(made(block, "mid", gate).eval()(x, 32), block.eval()(x))
