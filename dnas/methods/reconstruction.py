"""Scores of channels by how well those that are kept reconstruct what the next layers write, one method each."""

from collections.abc import Iterator
from functools import reduce

import numpy as np
import torch
from torch import Tensor, nn

from dnas.methods.feature_maps import channels_of, of_layers_read, patches_of
from dnas.methods.method import Search, Task
from dnas.methods.rank_and_cut import Scores, rank_and_cut
from dnas.nets.channels import ChannelAxis
from dnas.runtime.distributed import mean

PLACES, IMAGES = 10, 32  # at so many places of a map, drawn at random, of so many images of a batch
PART = 2**24  # numbers in a part of the contributions to a layer's outputs


def scores_of(order: np.ndarray, gains: np.ndarray, like: Tensor) -> Tensor:
    """Scores such that ``order`` is the order of the units, and the first n have the sum of the first n ``gains``.

    Gains that rise are averaged (isotonic regression), because a width keeps its highest scores.
    """
    from sklearn.isotonic import isotonic_regression  # here, because few methods need it, and it takes long

    scores = np.empty(len(order))
    scores[order] = isotonic_regression(gains, increasing=False) - 1e-12 * np.arange(len(order))
    return torch.from_numpy(scores).to(like)


def contributions(layer: nn.Module, axis: ChannelAxis, x: Tensor, draws: torch.Generator) -> Iterator[Tensor]:
    """What each unit adds to what a layer writes, at `PLACES` places of each map: [units, numbers] for some outputs.

    The outputs come in parts, because the contributions of a wide layer to all of them would fill gigabytes.
    """
    weight = getattr(layer, axis.name).detach()
    if isinstance(layer, nn.Conv2d):
        patches = patches_of(layer, x[:IMAGES])
        patches = patches.view(len(patches), x.shape[1], -1, patches.shape[-1])  # [B, channels, taps, places]
        patches = patches[..., torch.randperm(patches.shape[-1], generator=draws)[:PLACES].to(x.device)]
    else:
        tokens = x[:IMAGES].reshape(min(len(x), IMAGES), -1, x.shape[-1])
        tokens = tokens[:, torch.randperm(tokens.shape[1], generator=draws)[:PLACES].to(x.device)]
        patches = tokens.reshape(-1, x.shape[-1], 1, 1)
    units = patches[:, torch.from_numpy(axis.places).to(x.device)].flatten(2, 3)  # [B, units, positions * taps, places]
    taps = weight.flatten(2) if weight.ndim > 2 else weight[..., None]
    taps = taps[:, torch.from_numpy(axis.places).to(x.device)].flatten(2)  # [out, units, positions * taps]
    some = max(1, PART // (units.shape[0] * units.shape[1] * units.shape[3]))
    return (torch.einsum("butp,out->ubpo", units, part).flatten(1) for part in taps.split(some))


def lasso(search: Search, task: Task) -> Scores:
    """Units in the order in which LASSO takes them to reconstruct the outputs of the layers that read them.

    The outputs are the sums of all units' contributions, so that their Gram matrix is all that LASSO needs. The score
    of a unit is the share of the outputs' energy that it adds in least squares on the units so far. Deviations: inputs
    are those of the dense net, not of the net pruned so far; the layers' weights are not refitted. Convolutions in
    groups are left out. A convolution that standardises its weights is taken by its raw ones, and one that pads by
    itself (timm's Conv2dSame) without its padding.
    """
    from sklearn.linear_model import lars_path_gram  # here, because few methods need it, and it takes long

    grams: dict[str, Tensor] = {}
    draws = torch.Generator().manual_seed(task.seed)

    def see(name: str, layer: nn.Module, axis: ChannelAxis, x: Tensor) -> None:
        parts = (z.double() for z in contributions(layer, axis, x, draws))
        gram = reduce(torch.add, (z @ z.T for z in parts))
        grams[name] = grams.get(name, 0) + gram / gram.sum().clamp(min=1e-30)

    axes = of_layers_read(search, task, see)
    scores = {name: torch.ones(len(own[0].places)) for name, own in axes.items() if own}  # of what no layer here reads
    for name, shared in grams.items():
        gram = mean(shared).cpu().numpy()
        if gram.sum() <= 0:  # nothing is written
            continue
        _, active, _ = lars_path_gram(gram.sum(1), gram, n_samples=1, method="lasso")
        first = list(dict.fromkeys(int(k) for k in active))
        rest = [int(k) for k in (-gram.diagonal()).argsort(kind="stable") if k not in first]
        order = np.array(first + rest)
        sorted_gram = gram[np.ix_(order, order)] + 1e-9 * np.trace(gram) / len(gram) * np.eye(len(gram))
        gains = np.linalg.solve(np.linalg.cholesky(sorted_gram), gram.sum(1)[order]) ** 2
        scores[name] = scores_of(order, gains / gram.sum(), shared)
    return scores


ITERATIONS = 20  # of the pursuit, at most


def pursue(layer: nn.Module, axis: ChannelAxis, x: Tensor, size: int) -> tuple[Tensor, float]:
    """The ``size`` units that explain what a layer writes, by pursuit. Returns (their indices, the residual's share).

    The residual is what the layer writes without the other units. The units with the largest sums of its gradient, and
    those kept so far, are candidates; of them those with the largest sums of activations are kept.
    """
    places, whole = torch.from_numpy(axis.places).to(x.device), layer.forward(x)
    dim, kept = 1 if isinstance(layer, nn.Conv2d) else x.ndim - 1, torch.empty(0, dtype=torch.long)

    def sums(t: Tensor) -> Tensor:
        return channels_of(t, axis).flatten(2).sum((0, 2))

    def residual() -> Tensor:
        others = x.index_fill(dim, places[[k for k in range(len(places)) if k not in set(kept.tolist())]].flatten(), 0)
        return layer.forward(others)

    for _ in range(ITERATIONS):
        h = x.clone().requires_grad_()
        with torch.enable_grad():
            loss = (layer.forward(h) - (residual() if len(kept) else 0)).square().sum() / 2
            pull = sums(torch.autograd.grad(loss, h)[0])
        candidates = torch.cat([pull.topk(min(2 * size, len(pull))).indices.cpu(), kept]).unique()
        before, kept = kept, candidates[sums(x.abs()).cpu()[candidates].topk(size).indices].sort().values
        if torch.equal(before, kept):
            break
    return kept, float((whole - residual()).norm() / whole.norm().clamp(min=1e-30))


def pursuit(search: Search, task: Task) -> Scores:
    """Units by how often i-SpaSP keeps them, over the sizes of the grid, batches and layers that read them.

    The scores share out the fall of the residual from one size to the next. Deviations: sizes are not given, so that
    the units of all sizes are put in one order; the second layer is without its batch norm; magnitudes of activations
    are summed, because some layers read what no ReLU has made positive.
    """
    often: dict[str, Tensor] = {}
    residuals: dict[str, list[np.ndarray]] = {}

    def see(name: str, layer: nn.Module, axis: ChannelAxis, x: Tensor) -> None:
        units, left = len(axis.places), int(search.own.arch[name])
        options = [int(o) for o in search.net.space.by_name[name].options]
        sizes = [o * units // left for o in options if o < left]
        found = [pursue(layer, axis, x, size) for size in sizes]
        counts = sum((torch.bincount(kept, minlength=units) for kept, _ in found), torch.zeros(units)).double()
        energy = channels_of(x, axis).flatten(2).double().square().sum((0, 2)).cpu()
        often[name] = often.get(name, 0) + counts + energy / (2 * energy.sum().clamp(min=1e-30))  # breaks ties
        curve = np.interp(np.arange(units + 1), [0, *sizes, units], [1.0, *(min(1.0, r) for _, r in found), 0.0])
        residuals.setdefault(name, []).append(curve)

    axes = of_layers_read(search, task, see)
    scores = {name: torch.ones(len(own[0].places)) for name, own in axes.items() if own}
    for name, counts in often.items():
        curve = mean(torch.from_numpy(np.mean(residuals[name], 0))).numpy()
        order = mean(counts).argsort(descending=True, stable=True).numpy()
        scores[name] = scores_of(order, -np.diff(curve), counts)
    return scores


LASSO = rank_and_cut(
    lasso,
    summary="widths, by LASSO on what the next layers write",
    source="Channel Pruning for Accelerating Very Deep Neural Networks, He et al., ICCV 2017, arXiv 1707.06168",
    needs="trained weights, images",
    deviations="all layers see the dense net; weights are not refitted",
)
ISPASP = rank_and_cut(
    pursuit,
    summary="widths, by sparse pursuit of what the next layers write",
    source="i-SpaSP: Structured Neural Pruning via Sparse Signal Recovery, Wolfe and Kyrillidis, arXiv 2112.04905",
    needs="trained weights, images",
    deviations="all sizes of the grid in one order; no batch norm in the second layer",
)
