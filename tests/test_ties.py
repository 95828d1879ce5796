"""Groups of channels that share a width because the user says so."""

import argparse
import itertools
import math
import random

import pytest
import torch

from dnas.cli.flags import add_space_flags
from dnas.cli.inputs import outline_of
from dnas.export import narrowed
from dnas.export.model_file import count_macs, count_params
from dnas.latency.measured_parts import parts_of
from dnas.methods.rules import balanced_arch
from dnas.nets.shrink import extract, plain_state
from dnas.nets.timm_space import TimmBase, tied
from dnas.nets.timm_supernet import TimmSupernet
from dnas.spec.budget import parse_budget
from dnas.spec.checks import UserError
from dnas.spec.cost import CostTable, resolve_budgets

SIZE, CLASSES = 32, 10
NARROW = {"layers": [2, 1, 1, 1], "channels": [16, 16, 24, 32]}
TIES = ("layer1.*.conv1,layer2.0.conv1", "layer3.0.conv*")  # inner widths; an inner width and its stream


def tied_net(ties):
    torch.manual_seed(0)
    base = TimmBase("resnet18", CLASSES, 3, SIZE, divisor=4, kwargs=NARROW, ties=ties)
    return TimmSupernet(base).eval()


@pytest.fixture(scope="module")
def net():
    return tied_net(TIES)


def test_tied_groups_are_one_decision(net):
    free = tied_net(())
    assert len(net.space.decisions) == len(free.space.decisions) - 3
    assert set(net.decision_of) == set(free.space.by_name)
    assert {net.decision_of[f"layer{k}.conv1"] for k in ("1.0", "1.1", "2.0")} == {"layer1.0.conv1"}
    with torch.no_grad():
        x = torch.randn(1, 3, SIZE, SIZE)
        assert torch.equal(net(x, net.widest()), net.model(x))


def test_masked_cut_exported_and_counted_alike(net):
    tables = {metric: CostTable.build(net.space, metric) for metric in ("macs", "params")}
    x, rng = torch.randn(2, 3, SIZE, SIZE), random.Random(0)
    for _ in range(5):
        arch = net.space.complete({d.name: rng.choice(d.options) for d in net.space.decisions})
        with torch.no_grad():
            masked, cut = net(x, arch), extract(net, arch).model(x)
        assert (masked - cut).abs().max() < 1e-5 * masked.abs().max()
        found = narrowed.network(net.net_of(arch), num_classes=CLASSES).eval()
        found.load_state_dict(plain_state(net, arch))
        with torch.no_grad():
            assert torch.equal(found(x), cut)
        convs = dict(found.named_modules())
        for group, decision in net.decision_of.items():
            assert convs[group].out_channels == arch[decision]
        assert count_macs(found, 3, SIZE) == tables["macs"].of(arch)
        assert count_params(found) == tables["params"].of(arch)


def test_every_layer_of_a_tie_is_an_axis_of_its_decision(net):
    written = [axis for axis in net.channel_axes()["layer1.0.conv1"] if axis.role == "out"]
    assert [id(axis.module) for axis in written] == [
        id(net.model.get_submodule(f"layer{k}.conv1")) for k in ("1.0", "1.1", "2.0")
    ]


def test_balanced_widths_count_a_tie_once(net):
    """No change of two decisions has a larger product of widths inside the band; ties counted thrice would have one."""
    table = {"macs": CostTable.build(net.space, "macs")}
    budgets = resolve_budgets(table, parse_budget("50%"))
    arch, seen = balanced_arch(net.space, table, budgets), 0
    for a, b in itertools.combinations(net.space.decisions, 2):
        for v, w in itertools.product(a.options, b.options):
            other = net.space.complete({**arch, a.name: v, b.name: w})
            if 0.98 <= table["macs"].of(other) / budgets[0].limit <= 1:
                seen += 1
                assert math.prod(other.values()) <= math.prod(arch.values())
    assert seen > 20


def test_parts_of_a_tied_network_are_cut_together(net):
    """A part whose layer reads and writes channels of one decision has one slot, and is built with both narrower."""
    (part,) = (p for p in parts_of(net) if p.site.name == "layer3.0.conv2")
    assert part.site.widths == {"in": "layer3.0.conv1"}
    module, inputs = part.build({"in": 8}, 1)
    assert inputs[0].shape[1] == 8 and module(*inputs).shape[1] == 8


@pytest.mark.parametrize(
    "ties, said",
    [
        (("layer1.*.conv1", "no.such"), "'no.such' matches 0 groups"),
        (("layer1.0.conv1",), "matches 1 groups"),
        (("layer1.0.conv1,layer4.0.conv1",), "has the widths 4, 8, ... 32"),
        (("layer1.*.conv1", "layer1.1.conv1,layer2.0.conv1"), "layer1.1.conv1 is in tie 'layer1.*.conv1', too"),
    ],
)
def test_ties_that_make_no_sense(ties, said):
    with pytest.raises(UserError, match="tie") as error:
        tied_net(ties)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_group_that_is_first_in_one_tie_and_second_in_another():
    grids = dict.fromkeys("abc", (1, 2))
    with pytest.raises(UserError, match="'b,c'"):
        tied(grids, ("a,b", "b,c"))
    assert tied(grids, ("b,c",)) == {"a": "a", "b": "b", "c": "b"}


def test_the_flag():
    parser = argparse.ArgumentParser()
    add_space_flags(parser)
    sizes = {"num_classes": 10, "in_chans": 3, "img_size": 32}
    args = parser.parse_args(["--model", "resnet18", "--tie", "layer1.*.conv1", "--tie", "conv1,layer2.0.conv2"])
    assert outline_of(args, sizes).ties == ("layer1.*.conv1", "conv1,layer2.0.conv2")
    vit = parser.parse_args(["--model", "vit_tiny_patch16_224"])
    assert outline_of(vit, sizes).kwargs == {"img_size": 32}  # timm builds it for one size of images
    with pytest.raises(UserError, match="^tie goes with model"):
        outline_of(parser.parse_args(["--tie", "conv1"]), sizes)


def grids_of(**more):
    base = TimmBase("resnet18", CLASSES, 3, SIZE, divisor=4, kwargs=NARROW, **more)
    return {d.name: d.options for d in TimmSupernet(base).space.decisions}


def test_groups_have_divisors_and_least_widths_of_their_own():
    free = grids_of()
    assert free["layer4.0.conv1"] == (4, 8, 12, 16, 20, 24, 28, 32) and free["layer1.0.conv1"] == (4, 8, 12, 16)
    ruled = grids_of(divisors=("layer4.*=16", "layer4.0.conv1=8"), min_widths=("*=8", "layer3.*=20"))
    assert ruled["layer1.0.conv1"] == (8, 12, 16)
    assert ruled["layer4.0.conv1"] == (8, 16, 24, 32)  # the last rule that matches counts
    assert ruled["layer4.0.conv2"] == (16, 32)
    assert ruled["layer3.0.conv1"] == (20, 24)
    assert "layer3.0.conv1" not in grids_of(min_widths=("layer3.*=24",))  # one width is no decision


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        (("layer9.*=8",), "matches no group of channels; near: "),
        (("layer4.*",), "NAME=NUMBER is expected"),
        (("layer4.*=0",), "NAME=NUMBER is expected"),
    ],
)
def test_rules_of_groups_that_are_none(rules, said):
    with pytest.raises(UserError, match="min.width.*" + said):
        grids_of(min_widths=rules)
