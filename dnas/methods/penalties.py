"""Methods that train the dense net with a penalty that makes channels small, one each, and cut what is small."""

from typing import Any

import torch
from torch import Tensor

from dnas.methods.derive import derive
from dnas.methods.feature_maps import axes_of
from dnas.methods.method import HeldOut, Search, Task
from dnas.methods.rank_and_cut import Ranked, Scores, dense_loss, init, most_score, rank_and_cut
from dnas.methods.settings import AdmmConfig, PenaltyConfig, SslConfig
from dnas.nets.supernet import Supernet
from dnas.spec.checks import UserError


def norm_scales(search: Search) -> dict[str, list[Tensor]]:
    """Width decision -> the scales of the norms of its channels, [units, positions of a unit] each, with a graph."""
    found = axes_of(search, "norm").items()
    return {name: scales for name, own in found if (scales := [a.slices() for a in own if a.name == "weight"])}


def init_slimming(net: Supernet, task: Task) -> Ranked:
    """The dense net with all scales at 1/2, as in the authors' code. UserError if there is no norm with a scale.

    Deviation: scales that are not all alike have been trained, and stay.
    """
    own = init(net, task)
    nets = [net] if own.start is None else [net, own.start]
    every = [a for one in nets for axes in one.channel_axes().values() for a in axes]
    axes = [a for a in every if a.role == "norm" and a.name == "weight"]
    if not axes:
        raise UserError(f"{net.name} has no norm with a scale for each channel, which slimming needs")
    with torch.no_grad():
        for axis in axes:
            scale = getattr(axis.module, axis.name)
            if (scale == scale.flatten()[0]).all():
                scale.fill_(0.5)
    return own


def slimming_loss(search: Search, task: Task, x: Tensor, y: Tensor, progress: float) -> Tensor:
    """Cross entropy, plus ``penalty`` times the sum of the magnitudes of the norms' scales."""
    scales = [scale.abs().sum() for own in norm_scales(search).values() for scale in own]
    return dense_loss(search, task, x, y, progress) + task.config.penalty * torch.stack(scales).sum()


def scale_sizes(search: Search, task: Task) -> Scores:
    """The magnitude of the scale of each channel's norm; the sum where several layers write a channel."""
    return {name: torch.stack([s.abs().sum(1) for s in own]).sum(0) for name, own in norm_scales(search).items()}


def group_norms(search: Search) -> dict[str, Tensor]:
    """The L2 norm of all weights that write or read a unit, [units] for each width, with a graph."""
    squares: dict[str, Tensor] = {}
    for role in ("out", "in"):
        for name, own in axes_of(search, role).items():
            for axis in own:
                squares[name] = squares.get(name, 0) + axis.slices().square().sum(1)
    return {name: (s + 1e-24).sqrt() for name, s in squares.items()}


def layer_norms(search: Search) -> dict[str, Tensor]:
    """The L2 norm of all weights of each layer that may be dropped: its decision -> [1], with a graph."""
    weights = search.net.layer_weights().items()
    squares = {name: torch.stack([p.square().sum() for p in own]).sum() for name, own in weights if own}
    return {name: (s + 1e-24).sqrt()[None] for name, s in squares.items()}


def ssl_loss(search: Search, task: Task, x: Tensor, y: Tensor, progress: float) -> Tensor:
    """Cross entropy, plus ``penalty`` times the group norms, plus ``depth_penalty`` times the norms of layers."""
    loss = dense_loss(search, task, x, y, progress)
    for weight, norms in ((task.config.penalty, group_norms(search)), (task.config.depth_penalty, layer_norms(search))):
        if weight and norms:
            loss = loss + weight * torch.cat([*norms.values()]).sum()
    return loss


def ssl_scores(search: Search, task: Task) -> Scores:
    """The group norms. A layer whose norm is below 1 % of the mean over layers has 0 and is dropped, others have 1."""
    layers = layer_norms(search) if task.config.depth_penalty else {}
    least = 0.01 * torch.cat([*layers.values()]).mean() if layers else 0
    return group_norms(search) | {name: (norm > least).double() for name, norm in layers.items()}


def filters(search: Search) -> dict[str, Tensor]:
    """All weights that write the units of a width, [units, numbers], with a graph."""
    own = axes_of(search, "out").items()
    return {name: torch.cat([a.slices() for a in axes], 1) for name, axes in own if axes}


def admm_loss(search: Search, task: Task, x: Tensor, y: Tensor, progress: float) -> Tensor:
    """Cross entropy, plus ``penalty`` / 2 times the squared distance of the filters W from Z - U."""
    loss, weights = dense_loss(search, task, x, y, progress), filters(search)
    apart = [(weights[n] - z + u).square().sum() for n, (z, u) in search.own.more.items()]
    return loss + task.config.penalty / 2 * torch.stack(apart).sum() if apart else loss


@torch.no_grad()
def admm_step(search: Search, task: Task, progress: float, held_out: HeldOut) -> dict[str, Any]:
    """An update of Z and U, ``updates`` times over the search: Z = W + U on the best network in the budget, else 0.

    That is the exact projection: of all networks inside the budget, the one that keeps the most squared weight. The
    paper projects on given numbers of filters for each layer, which another search chooses.
    """
    own = search.own
    if int(progress * task.config.updates) < own.cuts:
        return {}
    own.cuts += 1
    weights = filters(search)
    shifted = {name: w + own.more[name][1] if own.more else w for name, w in weights.items()}
    squares = {name: s.square().sum(1) for name, s in shifted.items()}
    arch = derive(search.net.space, task.tables, task.budgets, most_score(search.net.space, squares, own.arch))
    for name, s in shifted.items():
        width = int(arch.get(name, 0))  # none where the layer or block is not in the network
        kept = squares[name].topk(width * len(s) // int(own.arch[name])).indices
        z = torch.zeros_like(s).index_copy(0, kept, s[kept])
        own.more[name] = [z, s - z]
    return {"events": []}


def squared_norms(search: Search, task: Task) -> Scores:
    """The squared L2 norm of each filter."""
    return {name: w.square().sum(1) for name, w in filters(search).items()}


SLIMMING = rank_and_cut(
    scale_sizes,
    summary="widths, by the scales of batch norms, which a penalty makes small",
    source="Learning Efficient Convolutional Networks through Network Slimming, Liu et al., ICCV 2017, "
    "arXiv 1708.06519",
    config=PenaltyConfig,
    init=init_slimming,
    loss=slimming_loss,
    needs="labels, norms with scales",
    deviations="if several layers write a channel, their scales are added; channels of residual streams are cut, too",
)
SSL = rank_and_cut(
    ssl_scores,
    summary="widths and layers, by norms of groups of weights, which a penalty makes small",
    source="Learning Structured Sparsity in Deep Neural Networks, Wen et al., NIPS 2016, arXiv 1608.03665",
    config=SslConfig,
    loss=ssl_loss,
    needs="labels",
    deviations="one group per channel: the weights that write or read it; no filter shapes; subgradients",
)
ADMM = rank_and_cut(
    squared_norms,
    summary="widths, by norms of filters that are pulled to a network inside the budget",
    source="AutoCompress, Liu et al., AAAI 2020, arXiv 1907.03141 (its ADMM)",
    config=AdmmConfig,
    loss=admm_loss,
    after_step=admm_step,
    work=lambda config: (0.0, 1.0),
    needs="labels",
    deviations="the budget gives the number of filters of each layer; no separate purification",
)
