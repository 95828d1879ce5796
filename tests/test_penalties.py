"""Slimming, structured sparsity, ADMM: gradients, norms and projections by hand."""

from dataclasses import replace

import pytest
import torch
from scoring import INNER, batches, begun
from spaces import assert_in_band
from test_methods import METHODS, net_of, task_of

from dnas.methods import penalties
from dnas.methods.loop import begin, run
from dnas.methods.loop import search as search_by
from dnas.methods.rank_and_cut import dense_arch, most_score
from dnas.nets.layer_supernet import MacroSupernet
from supernets.toy import toy


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


def test_scales_of_a_fresh_network_start_at_a_half_and_trained_ones_stay():
    net = net_of("resnet")
    trained = net.model.layer3[0].bn1.weight.detach().uniform_(0.5, 1.5).clone()
    task = task_of(net, "slimming", "40%")
    search = begin(METHODS["slimming"], net, replace(task, config=replace(task.config, rewind=True)))
    for own in (search.net, search.own.start):  # and what weights rewind to
        assert (own.model.layer2[0].bn1.weight == 0.5).all() and (own.model.layer2[0].bn2.weight == 0.5).all()
        assert torch.equal(own.model.layer3[0].bn1.weight, trained)


def test_admm_where_the_budget_needs_other_blocks():
    """At 85 % some layers have more expensive blocks than the dense network: their widths are not in it."""
    net = MacroSupernet(toy(num_classes=10, img_size=8))
    task = task_of(net, "admm", "85%")
    arch = search_by(METHODS["admm"], net, task)[1]
    assert_in_band(task.tables, task.budgets, arch)
    assert set(arch) != set(dense_arch(net.space))
