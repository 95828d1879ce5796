"""The scores of each method against closed forms, numpy and plain timm; cuts by a threshold; weights that are kept."""

import itertools
from dataclasses import replace
from functools import cache, partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from spaces import Brute, assert_in_band
from test_methods import METHODS, digits, net_of, task_of
from timm.utils import random_seed
from torch import nn
from torch.nn import functional as F

from dnas.export.model_file import build_net
from dnas.methods import curvature, feature_maps, penalties, reconstruction
from dnas.methods.loop import begin, run
from dnas.methods.rank_and_cut import above_threshold, dense_arch, most_score, only
from dnas.methods.rankings import activity, l1_norms, ranks, sensitivity, taylor
from dnas.nets.channels import ChannelAxis
from dnas.nets.shrink import plain_state
from dnas.nets.timm_space import TimmBase
from dnas.nets.timm_supernet import TimmSupernet
from dnas.spec.budget import Budget
from dnas.training.data import load_data
from dnas.training.loop import cycle

SCORES = {
    "l1": l1_norms,
    "taylor": taylor,
    "hrank": ranks,
    "dropnet": activity,
    "snip": sensitivity,
    "kfac": curvature.saliency,
    "lasso": reconstruction.lasso,
    "ispasp": reconstruction.pursuit,
    "slimming": penalties.scale_sizes,
    "ssl": penalties.ssl_scores,
    "admm": penalties.squared_norms,
}
INNER = "layer2.0.conv1"  # read by layer2.0.conv2 only


def begun(name, space="resnet", **config):
    """A search before its first step, on a network with norms that hide nothing, and its task."""
    net = net_of(space)
    for p, key in [(p, key) for key, p in net.named_parameters() if p.ndim == 1]:
        (nn.init.uniform_(p, 0.5, 1.5) if key.endswith("weight") else nn.init.uniform_(p, 2.0, 3.0))
    task = task_of(net, name, "40%")
    task = replace(task, config=replace(task.config, **config))
    settle(net)
    return begin(METHODS[name], net, task), task


@torch.no_grad()
def settle(net):
    """The statistics of norms are those of images, so that no living channel is dead by chance."""
    for _ in range(20):
        net.train()(digits_batch(), dense_arch(net.space))


@cache
def digits_batch():
    return next(iter(digits().train_batches(64, seed=0)))[0]


def batches(task, count):
    found = cycle(task.held_out_batches(0.0))
    return [next(found) for _ in range(count)]


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


def test_second_order_taylor_is_the_change_of_a_loss_that_is_quadratic_in_a_gate(monkeypatch):
    """The last stream is read by the classifier alone, so a squared error of the logits is quadratic in its gates."""
    monkeypatch.setattr(
        feature_maps.F, "cross_entropy", lambda logits, y: (logits - F.one_hot(y, 10)).square().sum(1).mean()
    )
    search, task = begun("taylor", order=2, score_batches=2)
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


# Reconstruction.


def linear_layer(count, out, rng, scales=None):
    layer = nn.Linear(count, out, bias=False)
    with torch.no_grad():
        weight = torch.from_numpy(rng.normal(size=(out, count))).float()
        layer.weight.copy_(weight * torch.as_tensor(scales if scales is not None else np.ones(count)).float())
    return layer, ChannelAxis(layer, "weight", 1, "in", np.arange(count)[:, None])


def lasso_of(layer, axis, x, monkeypatch):
    """The scores of one layer that reads one width."""

    def once(search, task, see):
        see("w", layer, axis, x)
        return {}

    monkeypatch.setattr(reconstruction, "IMAGES", len(x))
    monkeypatch.setattr(reconstruction, "of_layers_read", once)
    return reconstruction.lasso(None, SimpleNamespace(seed=0))["w"].numpy()


def test_lasso_takes_orthogonal_channels_by_their_energies(monkeypatch):
    rng = np.random.default_rng(0)
    scales = rng.permutation(np.arange(1.0, 9))
    layer, axis = linear_layer(8, 5, rng, scales)
    with torch.no_grad():
        layer.weight /= layer.weight.norm(dim=0)
        layer.weight *= torch.from_numpy(scales).float()
    x = torch.linalg.qr(torch.randn(64, 8, generator=torch.Generator().manual_seed(0)))[0]
    scores = lasso_of(layer, axis, x, monkeypatch)
    np.testing.assert_allclose(scores, scales**2 / (scales**2).sum(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_lasso_is_nearly_the_best_choice_of_channels(seed, monkeypatch):
    """Of 7 channels that depend on each other: the energy that its first n explain, against all choices of n."""
    rng = np.random.default_rng(seed)
    layer, axis = linear_layer(7, 4, rng, rng.uniform(0.3, 2, 7))
    x = torch.from_numpy(rng.normal(size=(50, 7)) @ (np.eye(7) + 0.3 * rng.normal(size=(7, 7)))).float()
    scores = lasso_of(layer, axis, x, monkeypatch)
    order = (-scores).argsort()
    weight = layer.weight.detach().numpy()
    columns = np.stack([np.outer(x[:, k], weight[:, k]).ravel() for k in range(7)], 1)
    target = columns.sum(1)

    def explained(chosen):
        part = columns[:, list(chosen)]
        return (
            1 - np.square(target - part @ np.linalg.lstsq(part, target, rcond=None)[0]).sum() / np.square(target).sum()
        )

    for n in range(1, 8):
        best = max(explained(chosen) for chosen in itertools.combinations(range(7), n))
        assert explained(order[:n]) > best - 0.1
    assert explained(order[:4]) > explained((-scores).argsort()[-4:]) and scores.sum() == pytest.approx(1, abs=1e-3)


def test_contributions_add_up_to_what_a_convolution_writes():
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 4, 3, stride=2, padding=1, bias=False)
    axis = ChannelAxis(layer, "weight", 1, "in", np.array([[0, 3], [1, 4], [2, 5]]))
    x = torch.randn(2, 6, 5, 5)
    found = reconstruction.contributions(layer, axis, x, torch.Generator().manual_seed(0))
    places = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    expected = layer(x).flatten(2)[..., places[: reconstruction.PLACES]].transpose(1, 2).flatten()
    torch.testing.assert_close(found.sum(0), expected.detach(), rtol=1e-4, atol=1e-5)
    alone = x.index_fill(1, torch.tensor([0, 2, 3, 5]), 0)
    torch.testing.assert_close(
        found[1], layer(alone).flatten(2)[..., places].transpose(1, 2).flatten().detach(), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_pursuit_recovers_a_sparse_hidden_layer(kind):
    """8 of 40 channels are active: they are found, and nothing is left of the residual."""
    rng = np.random.default_rng(0)
    active = np.sort(rng.permutation(40)[:8])
    if kind == "linear":
        layer, axis = linear_layer(40, 30, rng)
        x = torch.zeros(64, 40)
    else:
        layer = nn.Conv2d(40, 30, 3, padding=1, bias=False)
        axis, x = ChannelAxis(layer, "weight", 1, "in", np.arange(40)[:, None]), torch.zeros(8, 40, 6, 6)
    x[:, active] = torch.rand(x[:, active].shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        kept, residual = reconstruction.pursue(layer, axis, x, 8)
    assert kept.tolist() == active.tolist() and residual < 1e-6


# Penalties.


def test_slimming_without_a_penalty_is_ordinary_training():
    ours, task = begun("slimming", penalty=0.0)
    plain, other = begun("l1")
    plain.net.load_state_dict(ours.net.state_dict())
    run(METHODS["slimming"], ours, task)
    run(METHODS["l1"], plain, other)
    assert all(map(torch.equal, ours.net.tensors(), plain.net.tensors()))


def test_slimming_adds_the_sign_of_each_scale_to_its_gradient():
    search, task = begun("slimming", penalty=0.01)
    x, y = batches(task, 1)[0]
    gradients = []
    for loss_of in (penalties.slimming_loss, penalties.dense_loss):
        search.net.zero_grad()
        loss_of(search, task, x, y, 0.0).backward()
        gradients.append({n: p.grad.clone() for n, p in search.net.model.named_parameters() if p.grad is not None})
    for name, p in search.net.model.named_parameters():
        extra = (
            0.01 * p.detach().sign()
            if "bn" in name and name.endswith("weight") or name.endswith("downsample.1.weight")
            else 0
        )
        torch.testing.assert_close(
            gradients[0][name] - gradients[1][name], torch.zeros_like(p) + extra, rtol=1e-3, atol=1e-6
        )


def test_a_large_penalty_makes_scales_small():
    sums = []
    for penalty in (0.0, 0.1):
        search, task = begun("slimming", penalty=penalty)
        run(METHODS["slimming"], search, task)
        sums.append(sum(float(s.detach().sum()) for s in penalties.scale_sizes(search, task).values()))
    assert sums[1] < 0.95 * sums[0]


def test_group_norms_and_their_gradient():
    """By hand for a width that one convolution writes and one reads; the gradient of a norm is w / |w|."""
    search, task = begun("ssl", penalty=0.5)
    block = search.net.model.layer2[0]
    norm = (block.conv1.weight.square().sum((1, 2, 3)) + block.conv2.weight.square().sum((0, 2, 3))).sqrt()
    torch.testing.assert_close(penalties.group_norms(search)[INNER], norm)
    x, y = batches(task, 1)[0]
    extra = penalties.ssl_loss(search, task, x, y, 0.0) - penalties.dense_loss(search, task, x, y, 0.0)
    total = sum(float(n.sum().detach()) for n in penalties.group_norms(search).values())
    assert float(extra.detach()) == pytest.approx(0.5 * total, rel=1e-3)
    slope = torch.autograd.grad(penalties.group_norms(search)[INNER].sum(), block.conv1.weight)[0]
    torch.testing.assert_close(slope, (block.conv1.weight / norm[:, None, None, None]).detach())


def test_a_layer_without_weights_is_dropped():
    search, task = begun("ssl", "prunet", depth_penalty=1e-3)
    layers = penalties.layer_norms(search)
    assert len(layers) > 1
    gone = [*layers][1]
    layer = next(layer for layer in search.net.layers if f"{layer.name}/keep" == gone)
    with torch.no_grad():
        for p in layer.blocks.parameters():
            p.zero_()
    arch = METHODS["ssl"].choose(search, task)
    assert {name: arch[name] for name in layers} == {name: "drop" if name == gone else "keep" for name in layers}
    assert_in_band(task.tables, task.budgets, arch)


def test_admm_on_a_quadratic_loss_ends_at_the_projection(monkeypatch):
    """The nearest weights to A of all networks inside the budget: those of the network that keeps the most of A."""
    search, task = begun("admm", penalty=1.0, updates=20)
    with torch.no_grad():
        for weights in penalties.filters(search).values():
            weights.abs_()
    goal = {name: w.detach().clone() for name, w in penalties.filters(search).items()}
    squares = {name: w.square().sum(1) for name, w in goal.items()}
    left, net = search.own.arch, search.net
    monkeypatch.setattr(
        penalties, "dense_loss",
        lambda *_: sum((w - goal[n]).square().sum() for n, w in penalties.filters(search).items()) / 2,
    )  # fmt: skip
    optimizer = torch.optim.SGD(net.weight_parameters(), lr=0.5)
    for k in range(20):
        penalties.admm_step(search, task, k / 20 + 1e-6, None)
        for _ in range(10):
            optimizer.zero_grad()
            penalties.admm_loss(search, task, None, None, 0.0).backward()
            optimizer.step()
    best = penalties.derive(net.space, task.tables, task.budgets, most_score(net.space, squares, left))
    for name, (z, _) in search.own.more.items():
        kept = squares[name].topk(int(best[name]) * len(z) // int(left[name])).indices
        expected = torch.zeros_like(z).index_copy(0, kept, goal[name][kept])
        torch.testing.assert_close(z, expected, rtol=0.05, atol=1e-2)


# Cutting.


def test_a_threshold_keeps_the_best_channels_of_all_layers():
    """By brute force over thresholds: everything that the lowest feasible one keeps is kept, in the band."""
    brute, rng = Brute("widths"), np.random.default_rng(2)
    space, left = brute.space, dense_arch(brute.space)
    for _ in range(5):
        scores = {d.name: torch.from_numpy(rng.exponential(size=d.options[-1])) for d in space.decisions}
        limit = float(rng.choice(brute.costs["macs"]))
        budgets = (Budget("macs", limit),)
        if not brute.band(budgets).any():
            continue
        arch = above_threshold(space, brute.tables, budgets, scores, left)
        assert_in_band(brute.tables, budgets, arch)

        def kept(threshold, scores=scores):
            widths = {}
            for d in space.decisions:
                best = scores[d.name].sort(descending=True).values
                steps = zip(d.options, d.options[1:], strict=False)
                means = [(b, float(best[a:b].mean())) for a, b in steps]
                widths[d.name] = max([d.options[0], *(b for b, mean in means if mean >= threshold)])
            return space.complete(widths)

        thresholds = sorted({float(s) for score in scores.values() for s in score} | {0.0})
        feasible = [kept(t) for t in thresholds if brute.tables["macs"].of(kept(t)) <= limit]
        assert all(arch[name] >= width for name, width in feasible[0].items())


@pytest.mark.parametrize("cut", ["knapsack", "threshold"])
@pytest.mark.parametrize("name", ["l1", "slimming"])
def test_kept_weights_are_those_of_the_best_channels(name, cut):
    """The exported network computes what the dense one does with the factors of all other channels at zero."""
    search, task = begun(name, cut=cut)
    net, x = search.net.eval(), torch.randn(4, 3, 8, 8)
    scores = SCORES[name](search, task)
    with torch.no_grad():
        before = {n: s.clone() for n, s in scores.items()}
        arch = METHODS[name].choose(search, task)
        plain = build_net(net.net_of(arch), num_classes=10, in_chans=3).eval()
        plain.load_state_dict(plain_state(net, arch))
        torch.testing.assert_close(plain(x), net(x, arch), rtol=1e-4, atol=1e-5)
        after = SCORES[name](search, task)
    for decision, width in arch.items():
        units = int(width) * len(before[decision]) // int(search.own.arch[decision])
        torch.testing.assert_close(after[decision][:units], before[decision].sort(descending=True).values[:units])


def test_several_cuts_lower_the_cost_by_the_same_factor():
    search, task = begun("dropnet", cuts=3)
    start = {name: p.detach().clone() for name, p in search.net.named_parameters()}
    dense, costs, live = search.own.arch, [], []
    run(
        METHODS["dropnet"],
        search,
        task,
        on_row=lambda row: (costs.append(task.tables["macs"].of(search.own.arch)), live.append(row["live_macs"])),
    )
    reached = [*dict.fromkeys(costs)]
    total, limit = task.tables["macs"].of(dense), task.limits["macs"]
    for k, cost in enumerate(reached):
        assert 0.98 <= cost / (total ** (1 - k / 3) * limit ** (k / 3)) <= 1
    assert len(reached) == 3 and live == costs
    assert METHODS["dropnet"].choose(search, task).keys() == dense.keys()
    fc = search.net.model.fc.bias
    assert not torch.equal(fc, start["model.fc.bias"])


@pytest.mark.parametrize("cut", ["knapsack", "threshold"])
def test_many_cuts_never_need_what_is_cut_off(cut):
    """On a coarse grid some costs on the way have no network: such a cut is left out, and the search goes on."""
    search, task = begun("l1", cuts=10, cut=cut)
    task = replace(task, budgets=(Budget("macs", 0.2 * task.tables["macs"].of(search.own.arch)),))
    live = []
    run(METHODS["l1"], search, task, on_row=lambda row: live.append(row["live_macs"]))
    assert live == sorted(live, reverse=True) and len(set(live)) > 3
    assert_in_band(task.tables, task.budgets, METHODS["l1"].choose(search, task))


def test_pursuit_of_a_width_that_is_the_narrowest():
    search, task = begun("ispasp", score_batches=1)
    arch = search.net.space.complete(dict(search.own.arch) | {INNER: search.net.space.by_name[INNER].options[0]})
    search.net.cut_to(only(search.net, arch))
    search.own.arch = arch
    with torch.no_grad():
        assert len(reconstruction.pursuit(search, task)[INNER]) == arch[INNER]


def test_lasso_of_layers_that_write_nothing():
    search, task = begun("lasso", score_batches=1)
    with torch.no_grad():
        search.net.model.layer2[0].conv2.weight.zero_()
    assert reconstruction.lasso(search, task)[INNER].tolist() == [1.0] * 16


def test_the_scales_that_weights_rewind_to_are_a_half():
    search, _ = begun("slimming", rewind=True)
    for net in (search.net, search.own.start):
        assert float(net.model.layer2[0].bn1.weight.detach().mean()) == 0.5


def test_snip_leaves_the_statistics_of_norms_as_they_were():
    search, task = begun("snip")
    before = {name: b.clone() for name, b in search.net.named_buffers()}
    search.net.eval()
    sensitivity(search, task)
    assert all(torch.equal(b, before[name]) for name, b in search.net.named_buffers()) and not search.net.training


def test_weights_rewind_to_those_of_the_start():
    """Right after a cut every scale of a norm is one of the start, and the learning rate is that of a start."""
    search, task = begun("dropnet", cuts=2)
    start = {name: set(p.tolist()) for name, p in search.net.model.named_parameters() if p.ndim == 1}
    rates, after = [], []

    def on_row(row):
        rates.append(search.learner.optimizer.param_groups[0]["lr"])
        if row.get("events"):
            after.append({name: p.tolist() for name, p in search.net.model.named_parameters() if p.ndim == 1})

    run(METHODS["dropnet"], search, task, on_row=on_row)
    (found,) = after
    assert all(set(values) <= start[name] for name, values in found.items())
    assert sum(map(len, found.values())) < sum(map(len, start.values()))
    half = len(rates) // 2
    np.testing.assert_allclose(rates[:half], rates[half : 2 * half], rtol=0.15, atol=2e-4)


def test_buffers_of_the_optimizer_go_with_their_channels():
    search, task = begun("l1")
    x, y = batches(task, 1)[0]
    METHODS["l1"].loss(search, task, x, y, 0.0).backward()
    search.learner.optimizer.step()
    conv = search.net.model.layer2[0].conv1
    before = search.learner.optimizer.state[conv.weight]["exp_avg"].clone()
    weight, order = conv.weight.detach().clone(), torch.arange(len(conv.weight)).flip(0)
    search.net.reorder({INNER: order}, [search.learner.optimizer])
    state = search.learner.optimizer.state[conv.weight]["exp_avg"]
    assert torch.equal(conv.weight.detach(), weight[order]) and torch.equal(state, before[order])


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
