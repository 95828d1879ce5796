"""Supernets against plain timm nets: counted costs, logits, gradients; what their gates and slices cover."""

import math

import pytest
import timm
import torch
from settled_nets import (
    CLASSES,
    MACROS,
    close,
    every_answer,
    every_macro,
    images,
    mixed,
    plain,
    random_arch,
    settled,
    unsettle,
)
from timm.models._efficientnet_blocks import InvertedResidual, SqueezeExcite
from torch import nn
from torch.nn import functional as F

from dnas.export.model_file import build_net, count_macs, count_macs_torch, count_params
from dnas.nets.bipath_block import PairGate, Prunode
from dnas.nets.layer_choice import ChoiceGate, SkipGate
from dnas.nets.layer_supernet import MacroSupernet, net_of, space_of
from dnas.nets.markov_gate import MarkovGate
from dnas.nets.shrink import cut_width, plain_state, remove_block, remove_layer
from dnas.nets.timm_space import TimmBase
from dnas.nets.timm_supernet import TimmSupernet
from dnas.spec.cost import CostTable
from dnas.spec.space import DROP, KEEP
from supernets import SUPERNETS


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
    net = unsettle(MacroSupernet(macro))
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


@pytest.mark.parametrize("open_skips", [False, True])
@every_macro
def test_the_widest_net_is_the_dearest_of_its_blocks(name, open_skips):
    net = MacroSupernet(MACROS[name]())
    for gate in net.gates().values():
        if isinstance(gate, SkipGate):
            gate.is_open = open_skips
    table = CostTable.build(net.space, "macs")
    answers = net.widest(torch.Generator().manual_seed(0))
    options = net.live_options()
    for n, gate in net.gates().items():
        if isinstance(gate, PairGate):
            options[n] = [gate.low, gate.high]
        elif isinstance(gate, ChoiceGate) or (isinstance(gate, SkipGate) and not open_skips):
            options[n] = [net.space.by_name[n].index(answers[n])]
    assert table.of(net.space.complete(answers)) == table.of(table.extremes(options)[1])


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


# Gates learn from the first step on.


@pytest.mark.parametrize("open_skips", [False, True])
@every_macro
def test_every_gate_has_a_gradient_from_the_task_at_the_first_step(name, open_skips):
    for seed in range(2 - open_skips):
        torch.manual_seed(seed)
        macro = MACROS[name]()
        net = MacroSupernet(macro).train()
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
        net = MacroSupernet(MACROS[name]())
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
    net = MacroSupernet(mixed(True))
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


@pytest.mark.parametrize("name", ["prunet", "mobilenet_v2", "test_resnet"])
def test_all_probabilities_at_once_are_those_of_each_gate(name):
    """Values and gradients, after cuts and moves, at temperatures of their own."""
    if name in SUPERNETS:
        net = MacroSupernet(SUPERNETS[name](num_classes=10, img_size=16, width_mult=0.35))
    else:
        net = TimmSupernet(TimmBase(name, 10, 3, 32))
    rng = torch.Generator().manual_seed(0)
    for k, layer in enumerate(net.layers):
        for gone in [*layer.blocks][1 : 1 + k % 3] if layer.choice else ():
            remove_block(layer, gone)
        if layer.skip and k % 3:
            layer.skip.open()
        if layer.skip and k == 7:
            remove_layer(layer)
    for k, (decision, gate) in enumerate(net.gates().items()):
        if isinstance(gate, MarkovGate) and k % 2:
            cut_width(net, decision, gate.widths[len(gate.widths) // 2 * (k % 4 == 1)])
        elif isinstance(gate, PairGate) and k % 3 == 1 and len(gate.widths) > 2:
            gate.move(low=1, high=2)
        for p in gate.parameters():
            p.data = 3 * torch.randn(p.shape, generator=rng)
    together = net.probabilities(0.4)
    alone = {name: gate.probabilities(0.4) for name, gate in net.gates().items()}
    assert list(together) == list(alone)
    weights = {name: torch.randn(p.shape, generator=rng, dtype=torch.double) for name, p in alone.items()}
    grads = []
    for found in (together, alone):
        for decision, p in found.items():
            assert torch.allclose(p.double(), alone[decision].double(), atol=1e-6)
        net.zero_grad()
        sum((p * weights[decision]).sum() for decision, p in found.items()).backward()
        grads.append([p.grad for p in net.gate_parameters() if p.grad is not None and p.numel()])
    assert len(grads[0]) == len(grads[1]) > 5
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*grads, strict=True))
