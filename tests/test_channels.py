"""Which channels share a width: small networks whose groups are known, and what is cut when they get narrower."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dnas.nets.cut_tensors import remove_channels
from dnas.nets.timm_space import TimmBase
from dnas.nets.timm_supernet import TimmSupernet
from dnas.nets.tracing import trace

IMAGE = (3, 8, 8)


class Net(nn.Module):
    """A stem, a body of the test's, global pooling and a classifier."""

    def __init__(self, body, **modules):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = body
        for name, module in modules.items():
            setattr(self, name, module)
        with torch.no_grad():
            width = self.features(torch.zeros(1, *IMAGE)).shape[1]
        self.fc = nn.Linear(width, 5)

    def features(self, x):
        return self.body(self, self.stem(x))

    def forward(self, x):
        return self.fc(self.features(x).mean((2, 3)))


def conv(i, o, k=1, **more):
    return nn.Conv2d(i, o, k, padding=k // 2, **more)


def groups_of(net):
    """{name: (units, channels of the named layer in a unit)}."""
    return {g.name: (g.size, g.step) for g in trace(net, IMAGE).groups}


def test_a_chain_has_a_group_for_every_layer_but_the_last():
    net = Net(lambda m, x: m.b(F.relu(m.norm(m.a(x)))), a=conv(8, 6), norm=nn.BatchNorm2d(6), b=conv(6, 4))
    assert groups_of(net) == {"stem": (8, 1), "a": (6, 1), "b": (4, 1)}
    (a,) = (g for g in trace(net, IMAGE).groups if g.name == "a")
    places = {axis: at.tolist() for axis, at in a.places.items()}
    each = [[k] for k in range(6)]
    own = [("a.weight", 0), ("a.bias", 0), ("a.out_channels", 0), ("b.weight", 1), ("b.in_channels", 0)]
    own += [(f"norm.{n}", 0) for n in ("weight", "bias", "running_mean", "running_var", "num_features")]
    assert places == dict.fromkeys(own, each)


@pytest.mark.parametrize(
    "expected, body, modules",
    [
        # An addition ties its terms, and so does a product with one number for each channel.
        ({"stem": (8, 1)}, lambda m, x: x + m.a(x), {"a": conv(8, 8)}),
        ({"stem": (8, 1), "down": (2, 1)}, lambda m, x: x * m.up(m.down(x.mean((2, 3), keepdim=True))).sigmoid(),
         {"down": conv(8, 2), "up": conv(2, 8)}),
        # A map of one channel serves all: they are free, it stays.
        ({"stem": (8, 1)}, lambda m, x: x * m.a(x).sigmoid(), {"a": conv(8, 1)}),
        # Side by side: free of each other. Added to a concatenation: each part with its own.
        ({"stem": (8, 1), "a": (6, 1)}, lambda m, x: torch.cat([x, m.a(x), x], 1), {"a": conv(8, 6)}),
        ({"stem": (8, 1), "b": (4, 1)}, lambda m, x: torch.cat([x, m.b(x)], 1) + m.a(x),
         {"b": conv(8, 4), "a": conv(8, 12)}),
        # Depthwise with two outputs a channel: a unit is a channel and its two.
        ({"stem": (8, 1)}, lambda m, x: m.a(x), {"a": conv(8, 16, 3, groups=8)}),
        # Eight groups stay or go whole, here with those that read the same; two get narrower, in and out on their own.
        ({"stem": (4, 2), "b": (3, 1)}, lambda m, x: m.b(m.a(torch.cat([x, x], 1))),
         {"a": conv(16, 32, groups=8), "b": conv(32, 3)}),
        ({"stem": (4, 2), "a": (3, 2)}, lambda m, x: m.a(x), {"a": conv(8, 6, groups=2)}),
        # Halves are cut alike. A shuffle only moves channels.
        ({"stem": (4, 2), "a": (4, 1)}, lambda m, x: torch.cat([x.chunk(2, 1)[0], m.a(x.chunk(2, 1)[1])], 1),
         {"a": conv(4, 4)}),
        ({"stem": (8, 1)},
         lambda m, x: m.a(x.view(1, 2, 4, 8, 8).transpose(1, 2).reshape(1, 8, 8, 8)), {"a": conv(8, 8, 3, groups=8)}),
        # What is not understood keeps its channels: a running sum over them, a product of two maps.
        ({"a": (4, 1)}, lambda m, x: m.a(x.cumsum(1)), {"a": conv(8, 4)}),
        ({"a": (4, 1)}, lambda m, x: m.a((x.flatten(2) @ x.flatten(2).transpose(1, 2))[..., None]), {"a": conv(8, 4)}),
        # A mean over channels joins them all, and a group of one cannot be narrowed.
        ({"a": (4, 1)}, lambda m, x: m.a(x - x.mean(1, keepdim=True)), {"a": conv(8, 4)}),
        # A layer that is used twice; a flattened map; a layer norm with the channels last.
        ({"stem": (8, 1)}, lambda m, x: m.a(m.a(x)), {"a": conv(8, 8)}),
        ({"stem": (8, 1), "a": (4, 1)}, lambda m, x: m.a(x.flatten(1))[..., None, None], {"a": nn.Linear(512, 4)}),
        ({"stem": (8, 1)}, lambda m, x: m.n(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), {"n": nn.LayerNorm(8)}),
        # Norms over four groups of channels: the groups stay or go whole. Over one group: a norm over fewer channels.
        ({"stem": (4, 2)}, lambda m, x: m.n(x), {"n": nn.GroupNorm(4, 8)}),
        ({"stem": (8, 1)}, lambda m, x: m.n(x), {"n": nn.GroupNorm(1, 8)}),
    ],
)  # fmt: skip
def test_groups_that_can_be_told_by_hand(expected, body, modules):
    net = Net(body, **modules)
    assert groups_of(net) == expected
    # Cut to all kinds of widths, the network runs and is as wide as its groups say.
    channels = trace(net, IMAGE)
    for seed in range(5 if channels.groups and "view" not in body.__code__.co_names else 0):
        rng = np.random.default_rng(seed)
        sizes = {g.name: int(rng.integers(1, g.size + 1)) for g in channels.groups}
        left, goes = channels.cut(sizes)
        small = Net(body, **copy.deepcopy(modules))
        remove_channels(small, goes)
        assert small(torch.randn(2, *IMAGE)).shape == (2, 5)
        assert {g.name: g.size for g in left.groups} == sizes
        for name, parameter in small.named_parameters():
            for d, length in enumerate(parameter.shape):
                gone = len(goes.get((name, d), ()))
                assert length == net.get_parameter(name).shape[d] - gone


def test_cutting_twice_is_cutting_once():
    body = lambda m, x: torch.cat([m.b(x) + x, m.a(x)], 1)  # noqa: E731
    net = Net(body, a=conv(8, 6), b=conv(8, 8, 3, groups=8))
    channels = trace(net, IMAGE)
    once, _ = channels.cut({"stem": 3, "a": 2})
    half, _ = channels.cut({"stem": 5})
    twice, goes = half.cut({"stem": 3, "a": 2})
    for one, two in zip(once.groups, twice.groups, strict=True):
        assert one.name == two.name and one.size == two.size
        assert all((one.places[axis] == two.places[axis]).all() for axis in one.places)
    # of the 5 + 6 channels that the classifier reads after the first cut, 2 of the first five and 4 of the others go
    assert goes["fc.weight", 1].tolist() == [3, 4, 7, 8, 9, 10]


def test_numbers_that_a_module_keeps_for_its_splits_are_cut():
    class Split(nn.Module):
        def __init__(self):
            super().__init__()
            self.width, self.sizes, self.shape = 4, [2, 6], (8, 1, 1)
            self.a, self.b, self.scale = conv(2, 3), conv(6, 3), nn.Parameter(torch.ones(8))

        def forward(self, x):
            x = x * self.scale.view(self.shape)
            first, last = torch.split(x, self.width, 1)
            small, large = torch.split(torch.cat([first, last], 1), self.sizes, 1)
            return self.a(small) + self.b(large)

    net = Net(lambda m, x: m.split(x), split=Split())
    axes = {axis for g in trace(net, IMAGE).groups for axis in g.places}
    assert {("split.width", 0), ("split.sizes", 0), ("split.sizes", 1), ("split.shape", 0)} <= axes


def test_parts_of_a_layer_are_named_by_their_place():
    net = Net(lambda m, x: m.b(m.a(x)[:, :4]) + m.c(m.a(x)[:, 4:]), a=conv(8, 12), b=conv(4, 5), c=conv(8, 5))
    assert groups_of(net) == {"stem": (8, 1), "a[0:4]": (4, 1), "a[4:12]": (8, 1), "b": (5, 1)}


def test_what_is_not_understood_stays_and_the_rest_is_cut():
    """A bias that is computed, and padding of tokens."""

    class Scores(nn.Module):
        def __init__(self):
            super().__init__()
            self.qk, self.q_bias = nn.Linear(6, 6, bias=False), nn.Parameter(torch.ones(3))

        def forward(self, x):
            tokens = x.flatten(2).transpose(1, 2)
            bias = torch.cat([self.q_bias, 0 * self.q_bias]).cumsum(0)
            tokens = F.linear(tokens.reshape(-1, 6), self.qk.weight, bias).reshape(tokens.shape)
            return F.pad(tokens, (0, 0, 0, 1))[:, :-1].transpose(1, 2).reshape(x.shape)

    net = Net(
        lambda m, x: m.out(m.scores(m.a(m.first(x)))), first=conv(8, 8), a=conv(8, 6), scores=Scores(), out=conv(6, 4)
    )
    channels = trace(net, IMAGE)
    assert {g.name for g in channels.groups} >= {"stem", "first", "out"} and "scores.qk" not in {
        g.name for g in channels.groups
    }
    assert any("a bias that is computed" in why for why in channels.fixed)
    x, cut = torch.randn(2, *IMAGE), copy.deepcopy(net)
    sizes = {g.name: g.size // 2 if g.name == "first" else g.size for g in channels.groups}
    remove_channels(cut, channels.cut(sizes)[1])
    assert cut.first.out_channels == 4 and cut(x).shape == net(x).shape


@pytest.mark.slow
def test_attention_with_halos_keeps_its_channels():
    """timm's halonet26t at 256 px: its attention is not understood, the convolutions around it are cut."""
    net = TimmSupernet(TimmBase("halonet26t", 10, 3, 256))
    assert len(net.channels.groups) > 10 and any("self_attn" in why for why in net.channels.fixed)
