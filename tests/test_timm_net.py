"""The supernet around a network of timm's: the same logits masked, cut and exported; costs; search."""

import copy
import random

import pytest
import timm
import torch
from small_nets import step_on
from timm.layers import GroupNorm1, LayerNorm, LayerNorm2d, RmsNorm
from timm.layers.grn import GlobalResponseNorm
from torch import nn

from dnas.export import narrowed
from dnas.export.model_file import count_macs, count_params
from dnas.methods.derive import derive, gate_likelihood
from dnas.methods.gates import GATES
from dnas.methods.loop import search
from dnas.methods.method import Task
from dnas.methods.rules import random_arch, uniform_arch
from dnas.methods.settings import GatesConfig
from dnas.nets.shrink import cut_width, extract, plain_state
from dnas.nets.timm_space import TimmBase, channel_grid
from dnas.nets.timm_supernet import TimmSupernet
from dnas.nets.traced_supernet import safe_channels
from dnas.nets.weighted_norms import weighted_norms
from dnas.spec.budget import parse_budget
from dnas.spec.checks import UserError
from dnas.spec.cost import CostTable, resolve_budgets
from dnas.spec.recipe import Recipe
from dnas.training.data import load_data

SIZE, CLASSES = 64, 10
# Small ones of many families: additions, concatenations, splits, groups, depthwise, squeeze-excite, layer scale, layer
# norms with and without an activation, group norms, standardised weights, attention, kernels side by side, blurs.
FAMILIES = [
    *("test_resnet", "test_byobnet", "test_efficientnet", "test_efficientnet_ln", "test_efficientnet_gn"),
    *("test_convnext", "test_nfnet", "test_mambaout", "lcnet_050", "mixnet_s", "ghostnet_050", "regnety_002"),
    *("rexnet_100", "cspresnet50", "res2net50_14w_8s", "skresnet18", "hgnetv2_b0", "hrnet_w18_small"),
    *("mobilevit_xxs", "edgenext_xx_small", "resnest14d", "dla46_c", "resnetblur18"),
]
SHALLOW = {"layers": [1, 1, 1, 1]}
SMALLER = {
    "resnetblur18": SHALLOW,
    "res2net50_14w_8s": SHALLOW,
    "skresnet18": SHALLOW,
    "resnest14d": SHALLOW,
    "rexnet_100": {"depth_mult": 0.5},
}


def lively(model, seed=0):
    """No branch is switched off: norms and layer scales are far from their start."""
    generator = torch.Generator().manual_seed(seed)
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        if t.ndim == 1 and t.is_floating_point():
            t.data.copy_(torch.rand(t.shape, generator=generator) + (-0.5 if name.endswith(("bias", "mean")) else 0.5))
    return model


def widths_of(net, seed):
    rng = random.Random(seed)
    return {d.name: rng.choice(d.options) for d in net.space.decisions}


@pytest.mark.parametrize("name", FAMILIES)
def test_masked_cut_and_exported_are_one_network(name):
    torch.manual_seed(0)
    kwargs = SMALLER.get(name, {})
    net = TimmSupernet(TimmBase(name, CLASSES, 3, SIZE, divisor=2, kwargs=kwargs)).eval()
    lively(net.model)
    tables = {metric: CostTable.build(net.space, metric) for metric in ("macs", "params")}
    x = torch.randn(2, 3, SIZE, SIZE)
    with torch.no_grad():
        whole = net(x, net.widest())
        assert torch.equal(whole, net.model(x))
    plain = timm.create_model(name, num_classes=CLASSES, **kwargs)
    widest = tables["macs"].extremes()[1]
    assert tables["macs"].of(widest) == count_macs(plain, 3, SIZE)
    assert tables["params"].of(widest) == count_params(plain)
    for seed in range(5):
        arch = net.space.check(widths_of(net, seed))
        with torch.no_grad():
            masked, cut = net(x, arch), extract(net, arch).model(x)
        assert (masked - whole).abs().max() > 1e-3 * whole.abs().max()
        assert (masked - cut).abs().max() < 1e-5 * masked.abs().max()
    found = narrowed.network(net.net_of(arch), num_classes=CLASSES).eval()
    found.load_state_dict(plain_state(net, arch))
    with torch.no_grad():
        assert torch.equal(found(x), cut)
    assert count_macs(found, 3, SIZE) == tables["macs"].of(arch)
    assert count_params(found) == tables["params"].of(arch)
    axes, draws = net.channel_axes(), torch.Generator().manual_seed(1)
    orders = {name: torch.randperm(len(own[0].places), generator=draws) for name, own in axes.items()}
    before = {name: [axis.slices() for axis in own] for name, own in axes.items()}
    net.reorder(orders)
    with torch.no_grad():
        assert (net.model(x) - whole).abs().max() < 1e-5 * whole.abs().max()
    for name, own in axes.items():  # sorted, as other groups were permuted along the other dimensions
        for axis, rows in zip(own, before[name], strict=True):
            assert torch.equal(axis.slices().sort().values, rows[orders[name]].sort().values)


class Stubborn(nn.Module):
    """Keeps a number of channels where nobody sees it: only the second half of the stem's output can be cut."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.fc = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1), nn.Linear(6, 5)

    def forward(self, x):
        x = self.stem(x)
        x = self.a(x) if x.shape[1] == 8 else self.a(x) * 2
        return self.fc(x.mean((2, 3)))


class Static(Stubborn):
    def forward(self, x):
        return self.fc(self.a(self.stem(x).view(1, 2, 4, 8, 8).flatten(1, 2)).mean((2, 3)))


@pytest.mark.parametrize("kind, why", [(Stubborn, "differ by"), (Static, "invalid for input")])
def test_groups_that_break_the_network_stay_and_are_named(kind, why):
    channels = safe_channels(kind(), (3, 8, 8))
    assert [g.name for g in channels.groups] == ["a"]
    (reason,) = channels.fixed
    assert reason.startswith("stem: ") and why in reason


@pytest.mark.parametrize(
    "top, step, divisor, grid",
    [
        (64, 1, 8, (8, 16, 24, 32, 40, 48, 56, 64)),
        (27, 1, 8, (8, 16, 24, 27)),  # the widest is as it is
        (6, 1, 8, (6,)),
        (96, 24, 8, (24, 48, 72, 96)),  # groups of 24 channels
        (40, 4, 6, (12, 24, 36, 40)),
        (1024, 1, 8, tuple(range(128, 1025, 32))),  # at most 32 below the top, none below a tenth
    ],
)
def test_grids(top, step, divisor, grid):
    assert channel_grid(top, step, divisor, most=32) == grid


def test_a_grid_of_quarters():
    assert [channel_grid(top, 1, 32, most=4) for top in (128, 768)] == [(32, 64, 96, 128), (192, 384, 576, 768)]


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    net = TimmSupernet(TimmBase("test_efficientnet_ln", CLASSES, 1, 32, divisor=4))
    lively(net.model)
    return net


def test_the_expected_cost_is_the_mean_cost_of_what_is_drawn(small):
    table = CostTable.build(small.space, "macs")
    generator = torch.Generator().manual_seed(0)
    costs = torch.tensor([float(table.of(small.draw(generator))) for _ in range(4000)])
    expected = float(table.expected(small.probabilities()).detach())
    assert abs(float(costs.mean()) - expected) < 4 * float(costs.std()) / 4000**0.5


def test_a_soft_factor_of_zeros_and_ones_is_a_mask_and_every_gate_has_a_gradient(small):
    x = torch.randn(2, 1, 32, 32)
    arch = widths_of(small, 3)
    factors = {n: (torch.arange(g.widths[-1]) < arch[n]).float() for n, g in small.gates().items()}
    small.eval()
    assert torch.allclose(small(x, factors), small(x, arch), rtol=1e-5, atol=1e-6)
    small.train()(x, small.soft()).square().sum().backward()
    for name, gate in small.gates().items():
        assert gate.alpha.grad is not None and (gate.alpha.grad != 0).all(), name
    small.zero_grad()


@pytest.mark.parametrize("kind", [LayerNorm, LayerNorm2d, GroupNorm1, RmsNorm, GlobalResponseNorm])
def test_a_channel_that_counts_twice_is_in_a_norm_over_channels_twice(kind):
    norm, counts = lively(kind(5)).double(), torch.tensor([1, 2, 3, 1, 2])
    first = kind in (LayerNorm2d, GroupNorm1)
    x = torch.randn(3, 5, 4, 4).double() if first else torch.randn(3, 4, 4, 5).double()
    channels = 1 if first else -1
    repeated = kind(9).double()
    for name, own in norm.named_parameters():
        getattr(repeated, name).data = own.data.repeat_interleave(counts)
    expected = repeated(x.repeat_interleave(counts, channels)).index_select(channels, counts.cumsum(0) - 1)
    with weighted_norms(nn.Sequential(norm), {"0.weight": 0.3 * counts.double()}):
        given, other = norm(x), repeated(x.repeat_interleave(counts, channels))
    assert torch.allclose(given, expected, rtol=1e-12)
    assert torch.equal(other, repeated(x.repeat_interleave(counts, channels)))  # not one of those to be weighted
    assert torch.equal(norm(x), norm.forward(x)) and not torch.allclose(norm(x), given)  # as before, outside


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_steps_after_a_cut_are_those_of_the_masked_network(optimizer):
    torch.manual_seed(0)
    net = TimmSupernet(TimmBase("test_resnet", CLASSES, 3, 32, divisor=4))
    net.double()
    x, y = torch.randn(8, 3, 32, 32, dtype=torch.double), torch.randint(0, CLASSES, (8,))
    make = {"sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9), "adamw": lambda p: torch.optim.AdamW(p, 0.01)}
    nets = [net, copy.deepcopy(net)]
    optimizers = [make[optimizer](n.weight_parameters()) for n in nets]
    name = max(net.gates(), key=lambda n: len(net.gates()[n].widths))
    width = net.gates()[name].widths[1]

    def step(k, answers):
        return step_on(nets[k], optimizers[k], answers, x, y)[1]

    for _ in range(3):
        assert step(0, nets[0].widest()) == step(1, nets[1].widest())
    cut_width(nets[1], name, width, (optimizers[1],))
    nets[1].fit((optimizers[1],))
    assert count_params(nets[1].model) < count_params(nets[0].model)
    for _ in range(5):
        masked, cut = step(0, nets[0].widest() | {name: width}), step(1, nets[1].widest())
        assert masked == pytest.approx(cut, rel=1e-9)


def test_a_search_ends_inside_the_budget_with_a_smaller_supernet():
    torch.manual_seed(0)
    data = load_data(img_size=16).take(512)
    net = TimmSupernet(TimmBase("test_resnet", data.num_classes, data.in_chans, data.img_size, divisor=4))
    tables = {metric: CostTable.build(net.space, metric) for metric in ("macs", "params")}
    budgets = resolve_budgets(tables, parse_budget("30%"))
    first, rows = count_params(net.model), []
    search(GATES, net, Task(tables, budgets, data, Recipe(epochs=12), GatesConfig(), 0), on_row=rows.append)
    assert any(event.get("width") for row in rows for event in row.get("events", ()))
    assert count_params(net.model) < first
    assert rows[-1]["live_macs"] == net.live_cost(tables["macs"]) == count_macs(net.model, data.in_chans, 16)
    found = derive(net.space, tables, budgets, gate_likelihood(net))
    assert 0.98 * budgets[0].limit <= tables["macs"].of(found) <= budgets[0].limit
    assert found != uniform_arch(net.space, tables, budgets)
    narrowed.network(net.net_of(found), num_classes=10, in_chans=data.in_chans).load_state_dict(plain_state(net, found))


def test_random_and_uniform_nets_are_inside_the_band(small):
    tables = {metric: CostTable.build(small.space, metric) for metric in ("macs", "params")}
    budgets = resolve_budgets(tables, parse_budget("40%"))
    for arch in (uniform_arch(small.space, tables, budgets), random_arch(small.space, tables, budgets, 1)):
        assert 0.98 <= tables["macs"].of(arch) / budgets[0].limit <= 1


def test_weights_to_start_from(tmp_path):
    plain = timm.create_model("test_resnet", num_classes=7)
    torch.save(plain.state_dict(), tmp_path / "w.pth")
    base = TimmBase("test_resnet", CLASSES, 3, 32)
    net = TimmSupernet(base, checkpoint=str(tmp_path / "w.pth"))  # other classes: all but the classifier
    assert torch.equal(net.model.conv1[0].weight, plain.conv1[0].weight)
    (tmp_path / "broken.pth").write_bytes(b"no weights")
    other = timm.create_model("test_byobnet", num_classes=7)
    torch.save(other.state_dict(), tmp_path / "other.pth")
    for file in ("missing.pth", "broken.pth", "other.pth"):
        with pytest.raises(UserError, match=f"^initial_checkpoint .*{file}") as caught:
            TimmSupernet(base, checkpoint=str(tmp_path / file))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "base, said",
    [
        (TimmBase("inception_v3", CLASSES, 3, 32), "--model inception_v3 cannot be run on an image of 3 x 32 x 32"),
        (TimmBase("resnet18", CLASSES, 3, 32, kwargs={"layers": [1, 1, 1]}), "cannot be run"),
        (TimmBase("resnet18", CLASSES, 3, 32, kwargs={"no_such": 1}), "no_such"),
        (TimmBase("resnetv2_50x1_bit", CLASSES, 3, 32), "no channels that can be cut: stem.conv: a convolution whose"),
    ],
)
def test_a_model_that_does_not_run(base, said):
    with pytest.raises(UserError) as caught:
        TimmSupernet(base)
    assert said in caught.value.with_flags and "\n" not in str(caught.value)


def test_a_model_that_timm_has_not():
    with pytest.raises(UserError, match="'resnet51' is no model of timm's; near: .*resnet50"):
        TimmSupernet(TimmBase("resnet51", CLASSES))
