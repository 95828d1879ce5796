"""LASSO and the sparse pursuit: closed forms, brute force, a layer that is sparse."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scoring import INNER, begun
from torch import nn

from dnas.methods import reconstruction
from dnas.methods.rank_and_cut import only
from dnas.nets.channels import ChannelAxis


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


@pytest.mark.parametrize("parts", [4, 3, 1])  # outputs in a part
def test_contributions_add_up_to_what_a_convolution_writes(parts, monkeypatch):
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 4, 3, stride=2, padding=1, bias=False)
    axis = ChannelAxis(layer, "weight", 1, "in", np.array([[0, 3], [1, 4], [2, 5]]))
    x = torch.randn(2, 6, 5, 5)
    monkeypatch.setattr(reconstruction, "PART", parts * 2 * 3 * 9)
    split = [*reconstruction.contributions(layer, axis, x, torch.Generator().manual_seed(0))]
    assert len(split) == -(-4 // parts)
    found = torch.cat([part.view(3, 2, 9, -1) for part in split], 3).flatten(1)  # [units, images * places * outputs]
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
