"""Residual blocks that may be dropped: which ones, one network masked, dropped and built by timm, search, export."""

import copy
import itertools
import random

import pytest
import timm
import torch
from commands import call, check_refused, trust
from small_nets import step_on
from torch import nn
from torch.nn import functional as F

import dnas
from dnas.export.arch_schema import check_net
from dnas.export.model_file import (
    arch_document,
    build_net,
    count_macs,
    count_macs_torch,
    count_params,
    read_arch,
    write_export,
)
from dnas.export.verify import verify_export
from dnas.latency.measured_parts import parts_of
from dnas.methods.catalog import METHODS
from dnas.methods.loop import begin, search
from dnas.methods.method import Task
from dnas.methods.penalties import layer_norms
from dnas.nets.own_base import OwnBase, read_function
from dnas.nets.own_supernet import OwnSupernet
from dnas.nets.remove_options import forget, remove_layer
from dnas.nets.shrink import extract, plain_state
from dnas.nets.timm_space import TimmBase
from dnas.nets.timm_supernet import TimmSupernet
from dnas.nets.traced_supernet import TracedSupernet
from dnas.spec.budget import parse_budget
from dnas.spec.checks import UserError
from dnas.spec.cost import CostTable, resolve_budgets
from dnas.spec.recipe import Recipe
from dnas.spec.space import DROP, KEEP
from dnas.training.data import load_data
from tools import export as export_tool
from tools import search as search_tool

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}
RESNET = {"layers": [2, 3, 1, 2], "channels": [16, 16, 24, 32], "stem_width": 16}
SMALL = {
    "resnet18": RESNET,
    "vit_tiny_patch16_224": VIT,
    "mobilenetv2_035": {},
    "test_convnext": {},
}


class Block(nn.Module):
    """A residual block; ``kind`` says in which form."""

    def __init__(self, kind="plain", width=16):
        super().__init__()
        self.kind, self.first = kind, nn.Identity()
        self.conv = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 1))

    def forward(self, x, *more, **named):
        if self.kind == "in_place":
            return x.mul_(0.5) + self.conv(x)
        if self.kind == "gate":
            return x * self.conv(x).sigmoid()
        if self.kind == "softmax":
            return (x + self.conv(x)).softmax(2)
        if self.kind == "activated":
            return F.relu(self.conv(x).add_(x), inplace=True)
        if self.kind == "moved":
            y = x.permute(0, 2, 3, 1)
            y = y.flatten(1, 2) + self.conv(x).flatten(2).mT
            return y.mT.unflatten(2, x.shape[2:])
        if self.kind == "activity":
            return x + x.relu()
        return self.first(x) + self.conv(x)


class Chain(nn.Module):
    """Blocks between a stem and a classifier. ``calls`` are the places of blocks in the order in which they run."""

    def __init__(self, *blocks, calls=None):
        super().__init__()
        self.stem, self.blocks, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.ModuleList(blocks), nn.Linear(16, 10)
        self.calls = range(len(blocks)) if calls is None else calls

    def forward(self, x):
        x = F.relu(self.stem(x))
        for k in self.calls:
            x = self.blocks[k](x)
        return self.head(x.mean((2, 3)))


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.position, self.conv = Block(), nn.Conv2d(16, 16, 1)

    def forward(self, x):
        x = self.position(x)
        return x + self.conv(x)


class Asks(Chain):
    """Its own code asks a block for more than its output, and gives another one a second argument."""

    def forward(self, x):
        x = self.blocks[0](F.relu(self.stem(x)))
        x = self.blocks[2](self.blocks[1](x), x)
        return self.head(x.mean((2, 3))) + self.blocks[0].conv[0].bias.sum()


def space_of(model, size=8, **more):
    return TracedSupernet(OwnBase("own", 10, 3, size, divisor=2, depth=True, **more), model).eval()


def lively(net):
    """In double precision, with norms and biases far from their start."""
    for p in net.model.parameters():
        if p.ndim == 1 or float(p.detach().abs().max()) < 1e-3:
            p.data.add_(torch.rand(p.shape) - 0.5)
    return net.double().eval()


def test_blocks_that_add_to_their_input_are_found():
    shared = Block(), Block()
    shared[1].conv[0].weight = shared[0].conv[0].weight
    kinds = "plain", "activated", "moved", "in_place", "gate", "softmax", "activity"
    net = space_of(Chain(*map(Block, kinds), nn.Sequential(Block(), Block()), Nested(), *shared))
    expected = ["blocks.0", "blocks.1", "blocks.2", "blocks.7.0", "blocks.7.1", "blocks.8"]
    assert net.droppable == expected
    assert [r for r in net.blocks_fixed if "shares" in r] == [
        f"blocks.{k}: it shares a parameter with the rest of the network" for k in (9, 10)
    ]
    assert all(d.options == (DROP, KEEP) and d.base == KEEP for d in net.space.decisions if not d.is_width)


def test_blocks_that_the_network_needs_stay_and_are_named():
    net = space_of(Chain(Block(), Block(), calls=[0, 1, 1]))
    assert net.droppable == ["blocks.0"] and "blocks.1: it runs 2 times" in net.blocks_fixed
    net = space_of(Asks(Block(), Block(), Block()))
    assert net.droppable == ["blocks.1"]
    assert any(r.startswith("blocks.0: without it the network fails: 'Identity'") for r in net.blocks_fixed)
    net = space_of(Chain(Block(), Block()), keep=("blocks.1.conv.0",))
    assert net.droppable == ["blocks.0"] and "blocks.1: --keep" in net.blocks_fixed
    with pytest.raises(UserError, match="own has no residual block that can be dropped"):
        space_of(Chain(Block("gate")))


@pytest.mark.parametrize("name", SMALL)
def test_masked_dropped_and_built_by_timm_are_one_network(name):
    torch.manual_seed(0)
    net = lively(TimmSupernet(TimmBase(name, 10, 3, 32, divisor=4, kwargs=SMALL[name], depth=True)))
    tables = {metric: CostTable.build(net.space, metric) for metric in ("macs", "params")}
    rng, x = random.Random(0), torch.randn(2, 3, 32, 32, dtype=torch.double)
    assert len(net.layers) > 1
    for dropped in (net.droppable, *(rng.sample(net.droppable, k=1) for _ in range(2))):
        drawn = {d.name: rng.choice(d.options) for d in net.space.decisions}
        arch = net.space.complete(drawn | {f"{b}/keep": DROP if b in dropped else KEEP for b in net.droppable})
        cut, plain = extract(net, arch), build_net(net.net_of(arch), num_classes=10).eval().double()
        plain.load_state_dict(cut.plain_state())
        with torch.no_grad():
            masked = net(x, arch)
            for other in (cut(x, cut.widest()), plain(x)):
                assert (other - masked).abs().max() < 1e-9 * masked.abs().max()
        assert tables["macs"].of(arch) == count_macs(plain, 3, 32) == count_macs_torch(plain, 3, 32)
        assert tables["params"].of(arch) == count_params(plain) == count_params(cut.model)
        net.net_of(arch)  # nothing of the supernet has changed
        assert net.droppable == [layer.name for layer in net.layers if not layer.skip.is_removed]


@pytest.mark.parametrize(
    ("name", "kwargs", "dropped", "shallower"),
    [
        ("vit_tiny_patch16_224", VIT, ["blocks.2", "blocks.3"], VIT | {"depth": 2}),
        ("resnet18", RESNET, ["layer1.1", "layer2.1", "layer2.2"], RESNET | {"layers": [1, 1, 1, 2]}),
    ],
)
def test_without_its_last_blocks_it_is_timms_shallower_network(name, kwargs, dropped, shallower):
    torch.manual_seed(0)
    net = lively(TimmSupernet(TimmBase(name, 10, 3, 32, kwargs=kwargs, depth=True)))
    widest = {d.name: d.options[-1] for d in net.space.decisions}
    arch = net.space.complete(widest | {f"{b}/keep": DROP for b in dropped})
    plain = timm.create_model(name, num_classes=10, **shallower).double().eval()
    plain.load_state_dict(plain_state(net, arch))
    x = torch.randn(2, 3, 32, 32, dtype=torch.double)
    with torch.no_grad():
        assert torch.allclose(plain(x), net(x, arch), rtol=1e-9)
    assert CostTable.build(net.space, "macs").of(arch) == count_macs_torch(plain, 3, 32)
    assert CostTable.build(net.space, "params").of(arch) == count_params(plain)
    assert set(net.net_of(arch)["modules"]) <= {""}


def test_the_skip_scales_what_a_block_adds():
    torch.manual_seed(0)
    net = space_of(Chain(Block(), Block("activated"))).double()
    model, x = net.model, torch.randn(2, 3, 8, 8, dtype=torch.double)
    s, t = (torch.tensor(v, dtype=torch.double, requires_grad=True) for v in (0.3, 0.8))
    answers = {d.name: d.options[-1] for d in net.space.decisions} | {"blocks.0/keep": s, "blocks.1/keep": t}
    y = F.relu(model.stem(x))
    y = y + s * model.blocks[0].conv(y)
    y = (1 - t) * y + t * F.relu(y + model.blocks[1].conv(y))
    expected = model.head(y.mean((2, 3)))
    found = net(x, answers)
    assert torch.allclose(found, expected, rtol=1e-12)
    for a, b in zip(
        *(torch.autograd.grad(out.sum(), [s, t], retain_graph=True) for out in (found, expected)), strict=True
    ):
        assert torch.allclose(a, b, rtol=1e-9) and float(a) != 0


def test_expected_costs_are_those_of_all_networks_weighted_by_their_probability():
    torch.manual_seed(0)
    net = space_of(Chain(Block(), Nested()), divisors=("*=8",))
    net.layers[0].skip.open(0.3)
    net.layers[1].skip.open(0.8)
    p = {name: own.tolist() for name, own in net.probabilities().items()}
    for metric in ("macs", "params"):
        table, total = CostTable.build(net.space, metric), 0.0
        for options in itertools.product(*(range(len(d.options)) for d in net.space.decisions)):
            drawn = {d.name: d.options[k] for d, k in zip(net.space.decisions, options, strict=True)}
            share = torch.tensor([p[d.name][k] for d, k in zip(net.space.decisions, options, strict=True)]).prod()
            total += float(share) * table.of(net.space.complete(drawn))
        assert float(table.expected(net.probabilities()).detach()) == pytest.approx(total, rel=1e-6)


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224"])
def test_steps_after_a_drop_are_those_of_the_masked_network(name):
    torch.manual_seed(0)
    net = TimmSupernet(TimmBase(name, 10, 3, 32, divisor=4, kwargs=SMALL[name], depth=True)).double()
    nets = [net, copy.deepcopy(net)]
    optimizers = [torch.optim.SGD(n.weight_parameters(), 0.05, momentum=0.9) for n in nets]
    x, y = torch.randn(8, 3, 32, 32, dtype=torch.double), torch.randint(0, 10, (8,))

    def step(k, answers):
        return step_on(nets[k], optimizers[k], answers, x, y)[1]

    for _ in range(2):
        assert step(0, nets[0].widest()) == step(1, nets[1].widest())
    block = net.layers[1].name
    remove_layer(nets[1].layers[1])
    nets[1].fit((optimizers[1],))
    forget(nets[1], (optimizers[1],))
    assert count_params(nets[1].model) < count_params(nets[0].model)
    assert len(optimizers[1].param_groups[0]["params"]) < len(optimizers[0].param_groups[0]["params"])
    assert not any(d.startswith(f"{block}.") for d in nets[1].gates())
    for _ in range(3):
        assert step(0, nets[0].widest() | {f"{block}/keep": DROP}) == pytest.approx(step(1, nets[1].widest()), rel=1e-9)


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224"])
def test_a_state_dict_restores_a_supernet_without_a_block(name):
    torch.manual_seed(0)
    base = TimmBase(name, 10, 3, 32, divisor=4, kwargs=SMALL[name], depth=True)
    net, other = TimmSupernet(base), TimmSupernet(base)
    net.layers[0].skip.open(0.7)
    remove_layer(net.layers[1])
    net.fit()
    other.load_state_dict(net.state_dict())
    assert other.structure() == net.structure() and [*other.gates()] == [*net.gates()]
    assert other.layers[0].skip.is_open and not other.layers[2].skip.is_open
    assert count_params(other.model) == count_params(net.model) < count_params(TimmSupernet(base).model)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(other.eval()(x, other.widest()), net.eval()(x, net.widest()))


FILE = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 1)

    def forward(self, x):
        return x + self.b(self.a(x).relu())

def build():
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)
    return nn.Sequential(nn.Conv2d(3, 16, 1), Block(), Block(), *head)
"""


def test_a_network_from_a_file_is_exported_without_a_block(tmp_path):
    (tmp_path / "net.py").write_text(FILE)
    own, about = read_function(f"{tmp_path / 'net.py'}:build")
    net = OwnSupernet(OwnBase(**{"num_classes": 10, "img_size": 8, "depth": True, **about}), own)
    assert net.droppable == ["1", "2"]
    arch = net.space.complete({d.name: d.options[0] for d in net.space.decisions} | {"1/keep": DROP, "2/keep": KEEP})
    data = {"num_classes": 10, "in_chans": 3, "img_size": 8, "mean": [0.5] * 3, "std": [0.5] * 3}
    document = arch_document("dnas_net", net.net_of(arch), data, supernet="build", answers=arch, own=own)
    write_export(tmp_path / "run", document, own)
    counted = verify_export(tmp_path / "run")
    tables = {metric: CostTable.build(net.space, metric) for metric in ("macs", "params")}
    assert {metric: counted[metric] for metric in tables} == {metric: t.of(arch) for metric, t in tables.items()}


@pytest.mark.parametrize(
    ("dropped", "said"),
    [
        (["layer9.0"], r"^net.dropped is 'layer9.0': it must be modules of resnet18$"),
        ([""], r"net.dropped\[0\]"),
        ("layer1.1", "net.dropped is 'layer1.1'"),
        (["layer1.1", "layer1.1"], "^net.dropped is 'layer1.1'"),
        (["layer1.0"], "^net.modules is 'layer1.0.conv1': it must be modules of resnet18 that are not dropped$"),
    ],
)
def test_dropped_blocks_that_are_none_are_refused(dropped, said):
    net = TimmSupernet(TimmBase("resnet18", 10, 3, 32, kwargs=RESNET, depth=True))
    narrowest = {d.name: d.options[0] if d.is_width else KEEP for d in net.space.decisions}
    plain = net.net_of(net.space.complete(narrowest))
    check_net(
        plain | {"dropped": ["layer4.1"], "modules": {n: s for n, s in plain["modules"].items() if "4.1" not in n}}
    )
    with pytest.raises(UserError, match=said):
        check_net(plain | {"dropped": dropped})


def task_of(net, data, method, budget, epochs, **config):
    tables = {metric: CostTable.build(net.space, metric) for metric in ("macs", "params")}
    own = METHODS[method]
    return own, Task(
        tables, resolve_budgets(tables, parse_budget(budget)), data, Recipe(epochs=epochs), own.config(**config), 0
    )


class Nothing(Block):
    """A block that costs as much as others and computes nothing."""

    def forward(self, x):
        return x + 0 * self.conv(x)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_the_gates_drop_a_block_that_computes_nothing(place):
    """The budget is what the network costs without this block; a narrower stream with all blocks would fit, too."""
    torch.manual_seed(0)
    data = load_data(img_size=8).take(512)
    blocks = [Nothing() if k == place else Block("activated") for k in range(3)]
    net = space_of(Chain(*blocks), divisors=("stem=1", "blocks.*=16")).train()
    widest = {d.name: d.options[-1] for d in net.space.decisions}
    planted = net.space.complete(widest | {f"blocks.{place}/keep": DROP})
    limit = CostTable.build(net.space, "macs").of(planted)
    method, task = task_of(net, data, "gates", f"{limit}FLOPs", 12)
    _, arch = search(method, net, task)
    assert arch == planted


def test_the_norms_of_ssl_are_those_of_the_weights_of_a_block():
    torch.manual_seed(0)
    data = load_data(img_size=8).take(64)
    net = space_of(Chain(Block(), Block("activated")))
    method, task = task_of(net, data, "ssl", "60%", 1)
    found = {name: float(norm.detach()) for name, norm in layer_norms(begin(method, net, task)).items()}
    for k, block in enumerate(net.model.blocks):
        weights = torch.cat([block.conv[i].weight.flatten() for i in (0, 2)])
        assert found.pop(f"blocks.{k}/keep") == pytest.approx(float(weights.detach().norm()))
    assert not found


def test_parts_of_a_block_are_measured_and_paid_only_with_it():
    base = TimmBase("resnet18", 10, 3, 32, kwargs=RESNET)
    plain, deep = (parts_of(TimmSupernet(b)) for b in (base, TimmBase(**vars(base) | {"depth": True})))
    assert [p.site.op for p in plain] == [p.site.op for p in deep]  # the same table serves both
    when = {p.site.name: p.site.when for p in deep}
    assert when["layer1.1.conv1"] == (("layer1.1/keep", KEEP),) and when["layer1.1.conv2"] == when["layer1.1.conv1"]
    assert when["conv1"] == when["layer2.0.conv1"] == when["fc"] == ()
    assert not any(p.site.when for p in plain)


@pytest.fixture(scope="module")
def shallow_run(tmp_path_factory):
    """A search by the command, in which blocks may be dropped, and its folder."""
    folder = tmp_path_factory.mktemp("depth") / "run"
    with pytest.MonkeyPatch.context() as patch:
        trust(patch)
        flags = "--model test_resnet --depth --divisor 4 --img-size 16 --budget 15% --search-epochs 6 --epochs 2"
        assert call(search_tool, patch, *flags.split(), "--device", "cpu", "--output", folder) == 0
    return folder


def test_a_run_that_drops_a_block_works_without_dnas_and_is_exported_anew(shallow_run, tmp_path, monkeypatch):
    assert read_arch(shallow_run / "arch.json")["net"]["dropped"]
    assert verify_export(shallow_run)["weights"]
    trust(monkeypatch)
    assert '"depth": true' in (shallow_run / "config.json").read_text()
    assert call(export_tool, monkeypatch, shallow_run, "--output", tmp_path / "again") == 0
    for name in ("arch.json", "model.py"):
        assert (tmp_path / "again" / name).read_bytes() == (shallow_run / name).read_bytes()


def test_depth_goes_with_a_network_only(monkeypatch, capsys):
    code = call(search_tool, monkeypatch, "--depth", "--budget", "30%")
    check_refused(code, capsys, "--depth goes with --model or --model-file")


def test_a_pruned_program_without_a_block_is_proved_and_exported(tmp_path):
    torch.manual_seed(0)
    data = load_data(img_size=8).take(256)
    result = dnas.prune(
        Chain(Nothing(), Block()), budget="40%", data=data, method="random", depth=True, divisor=1, seed=1,
        search_epochs=1, epochs=1, output=tmp_path / "run",
    )  # fmt: skip
    dropped = [name for name, answer in result.arch.items() if answer == DROP]
    assert dropped and (tmp_path / "run" / "model.pt2").exists()
    program = torch.export.load(tmp_path / "run" / "model.pt2").module()
    x = torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        assert torch.allclose(program(x), result.model().eval()(x), atol=1e-5)
