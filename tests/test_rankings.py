"""The scores of each method against numpy and plain timm; where the formula is the same, against another tool."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from scoring import INNER, SCORES, batches, begun, settle
from test_methods import METHODS, task_of
from timm.utils import random_seed
from torch import nn
from torch.nn import functional as F

from dnas.methods import curvature, feature_maps, penalties
from dnas.methods.loop import begin, run
from dnas.methods.rankings import activity, l1_norms, ranks, sensitivity, taylor
from dnas.nets.own_base import OwnBase
from dnas.nets.timm_space import TimmBase
from dnas.nets.timm_supernet import TimmSupernet
from dnas.nets.traced_supernet import TracedSupernet
from dnas.training.batches import OwnLoss
from dnas.training.data import load_data


def test_every_method_that_scores_is_tested_here():
    scoring = {name for name, method in METHODS.items() if hasattr(method.config(), "cut")}
    assert scoring == {*SCORES}


@pytest.mark.parametrize("space", ["resnet", "prunet"])
@pytest.mark.parametrize("name", SCORES)
def test_planted_dead_channels_have_the_lowest_scores(name, space):
    """A third of the channels of each width are written as zeros, behind norms, too: every other scores higher."""
    search, task = begun(name, space)
    rng = np.random.default_rng(0)
    dead = {}
    for decision, axes in search.net.channel_axes().items():
        units = len(axes[0].places)
        dead[decision] = rng.permutation(units)[: max(1, units // 3)]
        for axis in axes:
            if axis.role != "in" or name == "ssl":  # of SSL the readers' weights belong to the group
                with torch.no_grad():
                    tensor = getattr(axis.module, axis.name).movedim(axis.dim, 0)
                    tensor[axis.places[dead[decision]].ravel()] = 1.0 if "var" in axis.name else 0.0
    settle(search.net)
    with torch.no_grad():
        scores = SCORES[name](search, task)
    assert scores
    for decision, score in scores.items():
        lowest = score.argsort()[: len(dead[decision])]
        assert set(lowest.tolist()) == set(dead[decision].tolist()), decision


def read_maps(search, task, layer, count):
    """What a layer reads on so many batches, by a hook on timm's own module."""
    seen = []
    hook = search.net.model.get_submodule(layer).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    search.net.eval()
    with torch.no_grad():
        for x, _ in batches(task, count):
            search.net.model(x)
    hook.remove()
    return torch.cat(seen).numpy()


def test_ranks_are_numpys():
    search, task = begun("hrank", score_batches=3)
    maps = read_maps(search, task, "layer2.0.conv2", 3)
    expected = np.linalg.matrix_rank(maps).mean(0) / min(maps.shape[2:])
    np.testing.assert_allclose(ranks(search, task)[INNER].numpy(), expected, rtol=1e-6)


def test_ranks_of_maps_that_are_known():
    constant, outer = torch.ones(4, 4), torch.outer(torch.arange(1.0, 5), torch.arange(1.0, 5))
    maps = torch.stack([torch.zeros(4, 4), constant, outer, torch.eye(4)])
    assert torch.linalg.matrix_rank(maps).tolist() == [0, 1, 1, 4]


def test_activities_are_means_over_what_is_read():
    search, task = begun("dropnet", score_batches=3)
    expected = np.abs(read_maps(search, task, "layer2.0.conv2", 3)).mean((0, 2, 3))
    np.testing.assert_allclose(activity(search, task)[INNER].numpy(), expected, rtol=1e-5)


def test_squeezed_maps_of_one_pixel_do_not_count():
    """A width that a squeeze and a projection read: only the maps of the projection are looked at."""
    net = TimmSupernet(TimmBase("test_efficientnet", 10, 3, 64))
    task = task_of(net, "dropnet", "60%", data=load_data(img_size=64).take(200))
    task = replace(task, config=replace(task.config, score_batches=1))
    search = begin(METHODS["dropnet"], net, task)
    found, tried = activity(search, task), 0
    for decision, axes in search.net.channel_axes().items():
        readers = [a.module for a in axes if a.role == "in"]
        if decision not in found or len(readers) != 2 or readers[0].weight.shape[0] > readers[1].weight.shape[0]:
            continue
        seen = []
        look = partial(lambda kept, _, inputs: kept.append(inputs[0]), seen)
        hooks = [m.register_forward_pre_hook(look) for m in readers]
        search.net.eval()
        with torch.no_grad():
            search.net(batches(task, 1)[0][0], search.own.arch)
        for hook in hooks:
            hook.remove()
        if seen[0].shape != seen[1].shape:
            tried += 1
            maps = max(seen, key=lambda t: t.shape[-1])
            torch.testing.assert_close(found[decision], maps.abs().mean((0, 2, 3)))
    assert tried


def test_second_order_taylor_is_the_change_of_a_loss_that_is_quadratic_in_a_gate():
    """The last stream is read by the classifier alone, so a squared error of the logits is quadratic in its gates."""
    squared_error = OwnLoss(lambda logits, y: (logits - F.one_hot(y, 10)).square().sum(1).mean(), lambda logits, y: 0.0)
    search, task = begun("taylor", order=2, score_batches=2)
    task = replace(task, data=replace(task.data, own_loss=squared_error))
    found, net = taylor(search, task), search.net
    stream = next(n for n, own in net.channel_axes().items() if any(a.module is net.model.fc for a in own))
    changes = torch.zeros(len(found[stream]))
    net.eval()
    with torch.no_grad():
        for x, y in batches(task, 2):
            features = net.model.forward_head(net.model.forward_features(x), pre_logits=True)
            losses = [
                (net.model.fc(f) - F.one_hot(y, 10)).square().sum(1).mean()
                for f in (features, *(features.index_fill(1, torch.tensor([k]), 0) for k in range(len(changes))))
            ]
            changes += (torch.stack(losses[1:]) - losses[0]).square()
    torch.testing.assert_close(found[stream], changes, rtol=1e-3, atol=1e-6 * float(changes.max()))


def test_groups_share_their_scores():
    search, task = begun("taylor", score_batches=1)
    alone = taylor(search, task)
    together = taylor(search, replace(task, config=replace(task.config, group=4)))
    for name, score in alone.items():
        expected = torch.cat([part.sum().expand(len(part)) for part in score.split(4)])
        torch.testing.assert_close(together[name], expected)


def test_sensitivities_are_products_of_weights_and_gradients_of_timms_network():
    search, task = begun("snip")
    random_seed(0)
    found, model = sensitivity(search, task)[INNER], search.net.model
    x, y = batches(task, 1)[0]
    model.train().zero_grad()
    F.cross_entropy(model(x), y).backward()
    block = model.layer2[0]

    def products(p):
        return (p * p.grad).detach().abs()

    expected = products(block.conv1.weight).sum((1, 2, 3)) + products(block.conv2.weight).sum((0, 2, 3))
    expected += products(block.bn1.weight) + products(block.bn1.bias)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


def patches(maps, layer):
    return F.unfold(torch.from_numpy(maps), layer.kernel_size, padding=layer.padding, stride=layer.stride)


def test_saliencies_are_those_of_kronecker_factors():
    search, task = begun("kfac", score_batches=1)
    layer, (x, y) = search.net.model.layer2[0].conv1, batches(task, 1)[0]
    found, slopes = curvature.saliency(search, task)[INNER], []

    def look(_layer, _inputs, out):
        out.register_hook(slopes.append)

    hook = layer.register_forward_hook(look)
    F.cross_entropy(search.net.model.eval()(x), y).backward()
    hook.remove()
    a = patches(read_maps(search, task, "layer2.0.conv1", 1), layer)  # [B, numbers, places]
    g = (slopes[0] * len(x)).flatten(2)
    factor_a = torch.einsum("bip,bjp->ij", a, a) / a.shape[0] / a.shape[2]
    factor_g = torch.einsum("bip,bjp->ij", g, g) / g.shape[0]
    w = layer.weight.detach().flatten(1)
    expected = torch.einsum("ji,ik,jk->j", w, factor_a, w) * factor_g.diagonal() / 2
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-7 * float(expected.max()))


class Signals(nn.Module):
    """The rows of an image one after the other: a signal, for convolutions over one dimension, or over two."""

    def __init__(self, conv, kernel):
        super().__init__()
        self.a, self.b, self.head = conv(3, 8, kernel), conv(8, 16, kernel), nn.Linear(16, 10)

    def forward(self, x):
        x = x.flatten(2)
        x = x if isinstance(self.a, nn.Conv1d) else x[..., None]
        return self.head(self.b(self.a(x).relu()).relu().flatten(2).mean(2))


def test_convolutions_over_one_dimension_have_the_scores_of_those_over_two():
    found = []
    for conv, kernel in ((nn.Conv1d, 3), (nn.Conv2d, (3, 1))):
        torch.manual_seed(0)
        net = TracedSupernet(OwnBase("signals", 10, 3, 8, divisor=1), Signals(conv, kernel))
        task = task_of(net, "kfac", "40%")
        found.append(curvature.saliency(begin(METHODS["kfac"], net, task), task))
    assert found[0].keys() == found[1].keys() == {"a", "b"}
    for name, scores in found[0].items():
        torch.testing.assert_close(scores, found[1][name], rtol=1e-4, atol=1e-9)
        assert scores.min() > 0 and scores.max() > 1.1 * scores.min()


class OwnLinear(nn.Module):
    def __init__(self, ins, outs):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(outs, ins)), nn.Parameter(torch.randn(outs))

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


class Tokens(nn.Module):
    """The rows of an image as tokens of its columns, through two linear layers of this class."""

    def __init__(self, linear):
        super().__init__()
        self.a, self.b, self.head = linear(8, 6), linear(6, 16), nn.Linear(16, 10)

    def forward(self, x):
        return self.head(self.b(self.a(x.flatten(1, 2)).relu()).relu().mean(1))


def test_linear_layers_of_a_class_of_ones_own_have_the_scores_of_torchs():
    found, weights = [], Tokens(nn.Linear).state_dict()
    for linear in (nn.Linear, OwnLinear):
        model = Tokens(linear)
        model.load_state_dict(weights)
        net = TracedSupernet(OwnBase("tokens", 10, 3, 8, divisor=1), model)
        task = task_of(net, "kfac", "60%")
        found.append(curvature.saliency(begin(METHODS["kfac"], net, task), task))
    assert found[0].keys() == found[1].keys() == {"a", "b"}
    for name, scores in found[0].items():
        torch.testing.assert_close(scores, found[1][name], rtol=1e-4, atol=1e-9)


class Attention(nn.Module):
    """Rows of an image as tokens; a frozen layer, and torch's encoder layer, whose attention writes two tensors."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 16)
        self.layer, self.head = nn.TransformerEncoderLayer(16, 2, 12, batch_first=True), nn.Linear(16, 10)
        self.first.requires_grad_(False)

    def forward(self, x):
        return self.head(self.layer(self.second(self.first(x.flatten(1, 2)).relu())).mean(1))


def test_saliencies_where_a_layer_is_frozen_or_writes_two_tensors():
    torch.manual_seed(0)
    net = TracedSupernet(OwnBase("attention", 10, 3, 8, divisor=1), Attention())
    task = task_of(net, "kfac", "90%")
    found = curvature.saliency(begin(METHODS["kfac"], net, task), task)
    assert any(type(a.module) is nn.MultiheadAttention for a in net.channel_axes()["second"])
    assert {"first", "second", "layer.linear1"} == found.keys() == {d.name for d in net.space.decisions}
    assert (found["first"] == 1).all()  # nothing says what it is worth
    for name in ("second", "layer.linear1"):
        assert found[name].min() >= 0 and found[name].max() > 1.1 * found[name].min()


def test_the_spectral_radius_is_that_of_the_kronecker_product(monkeypatch):
    monkeypatch.setattr(curvature, "POWER_STEPS", 200)
    torch.manual_seed(0)
    first, second, x = nn.Linear(4, 3), nn.Linear(3, 2), torch.randn(16, 4)
    seen = []
    with feature_maps.watching([first, second], lambda m, read, made: seen.append((m, read, made))):
        out = second(first(x).tanh())
    loss = out.square().sum(1).mean()
    radius = curvature.spectral_radius(seen, loss, 16)
    radii = []
    for (_, read, _), slope in zip(seen, torch.autograd.grad(loss, [made for _, _, made in seen]), strict=True):
        a, g = read.detach().numpy(), 16 * slope.numpy()
        radii.append(np.linalg.eigvalsh(np.kron(a.T @ a / 16, g.T @ g / 16)).max())
    assert float(radius.detach()) == pytest.approx(max(radii), rel=1e-4)


@pytest.mark.slow
def test_flatness_lowers_the_largest_eigenvalue_of_the_hessian():
    def largest(flatness):
        search, task = begun("kfac", flatness=flatness, radius=0.0, cuts=1)
        run(METHODS["kfac"], search, task)
        net, (x, y) = search.net.eval(), batches(task, 1)[0]
        weights = [p for p in net.model.parameters() if p.ndim > 1]
        slopes = torch.autograd.grad(F.cross_entropy(net.model(x), y), weights, create_graph=True)
        v, value = [torch.ones_like(p) for p in weights], 0.0
        for _ in range(30):
            v = torch.autograd.grad(slopes, weights, v, retain_graph=True)
            value = float(torch.cat([t.flatten() for t in v]).norm())
            v = [t / value for t in v]
        return value

    assert largest(1e-3) < 0.7 * largest(0.0)


def test_snip_leaves_the_statistics_of_norms_as_they_were():
    search, task = begun("snip")
    before = {name: b.clone() for name, b in search.net.named_buffers()}
    search.net.eval()
    sensitivity(search, task)
    assert all(torch.equal(b, before[name]) for name, b in search.net.named_buffers()) and not search.net.training


# Where the formula is the same, another tool ranks the channels alike.


def their_scores(model, importance, only=None):
    """Torch-Pruning's scores of the width that layer2.0.conv1 writes, from the layers ``only`` or all of its group."""
    # Meant: peers are an extra of their own, pip install -e '.[peers]'.
    tp = pytest.importorskip("torch_pruning")
    graph = tp.DependencyGraph().build_dependency(model, example_inputs=torch.randn(1, 3, 8, 8))
    group = graph.get_pruning_group(model.layer2[0].conv1, tp.prune_conv_out_channels, [*range(16)])
    if only:
        group._group = [item for item in group._group if item.dep.target.module in only]
    return importance(tp)(group)


def test_l1_ranks_as_torch_pruning():
    search, task = begun("l1")
    theirs = their_scores(
        search.net.model, lambda tp: tp.importance.MagnitudeImportance(p=1, group_reduction="first", normalizer=None)
    )
    ours = l1_norms(search, task)[INNER].detach()
    torch.testing.assert_close(ours, theirs / theirs.mean())
    assert ours.argsort().tolist() == theirs.argsort().tolist()


def test_slimming_ranks_as_torch_pruning():
    search, task = begun("slimming")
    with torch.no_grad():
        search.net.model.layer2[0].bn1.weight.uniform_(-1, 1)
    theirs = their_scores(
        search.net.model, lambda tp: tp.importance.BNScaleImportance(group_reduction="sum", normalizer=None)
    )
    torch.testing.assert_close(penalties.scale_sizes(search, task)[INNER].detach(), theirs.detach())


def gradients(search, task, train):
    x, y = batches(task, 1)[0]
    search.net.train(train)
    search.net.zero_grad()
    F.cross_entropy(search.net.model(x), y).backward()


def test_taylor_ranks_as_torch_pruning_where_both_look_at_the_layers_that_read():
    search, task = begun("taylor", score_batches=1)
    ours, model = taylor(search, task)[INNER], search.net.model
    gradients(search, task, train=False)
    theirs = their_scores(
        model,
        lambda tp: tp.importance.TaylorImportance(multivariable=True, group_reduction="sum", normalizer=None),
        only=[model.layer2[0].conv2],
    )
    torch.testing.assert_close(ours, theirs.square(), rtol=1e-3, atol=1e-6 * float(ours.max()))


def test_snip_ranks_as_torch_pruning_does_with_convolutions():
    """Torch-Pruning 1.6 leaves batch norms out of this sum: their part is added by hand."""
    search, task = begun("snip")
    ours = sensitivity(search, task)[INNER].detach()
    gradients(search, task, train=True)
    theirs = their_scores(
        search.net.model,
        lambda tp: tp.importance.TaylorImportance(group_reduction="sum", normalizer=None, target_types=[nn.Conv2d]),
    )
    norm = search.net.model.layer2[0].bn1
    theirs = theirs + sum((p * p.grad).detach().abs() for p in (norm.weight, norm.bias))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6 * float(ours.max()))
