"""Scores of the channels of a trained dense net, one method each. `dnas.methods.rank_and_cut` does the rest."""

import torch
from torch import Tensor

from dnas.methods.feature_maps import (
    axes_of,
    batch_loss,
    evaluating,
    gated_loss,
    of_maps_read,
)
from dnas.methods.method import Search, Task
from dnas.methods.rank_and_cut import Scores, rank_and_cut, score_batches
from dnas.methods.settings import DropnetConfig, SnipConfig, TaylorConfig
from dnas.runtime.distributed import average_gradients, mean, shared_statistics


def l1_norms(search: Search, task: Task) -> Scores:
    """The L1 norm of each filter. If several layers write the same channels, their normalised norms are added."""
    scores: dict[str, Tensor] = {}
    for name, own in axes_of(search, "out").items():
        for axis in own:
            norms = axis.slices().abs().sum(1)
            scores[name] = scores.get(name, 0) + norms / norms.mean().clamp(min=1e-30)
    return scores


def taylor(search: Search, task: Task) -> Scores:
    """The squared change of the loss without a channel, expanded at a gate z = 1 wherever it is read, over batches.

    First order (g z)^2, or second order (-g z + h / 2)^2 with h the exact second derivative by this gate alone: one
    backward pass for each unit and batch. ``group`` units in a row share the sum of their scores. Deviation: the
    paper's gates follow batch norms and are divided by their number of uses.
    """
    axes, config = axes_of(search, "in"), task.config
    sums: dict[str, Tensor] = {}
    with evaluating(search.net), torch.enable_grad():
        for x, y in score_batches(task):
            gates = {n: x.new_ones(len(own[0].places), requires_grad=True) for n, own in axes.items() if own}
            loss = gated_loss(search, task, axes, gates, x, y)
            slopes = torch.autograd.grad(loss, [*gates.values()], create_graph=config.order == 2)
            for (name, gate), slope in zip(gates.items(), slopes, strict=True):
                change = -mean(slope.detach())
                if config.order == 2:
                    bends = [torch.autograd.grad(slope[k], gate, retain_graph=True)[0][k] for k in range(len(gate))]
                    change = change + mean(torch.stack(bends)) / 2
                sums[name] = sums.get(name, 0) + change**2
    groups = {name: [part.sum().expand(len(part)) for part in s.split(config.group)] for name, s in sums.items()}
    return {name: torch.cat(parts) for name, parts in groups.items()}


def ranks(search: Search, task: Task) -> Scores:
    """The mean rank of the maps of each channel, divided by the largest possible one."""
    return of_maps_read(search, task, lambda maps: torch.linalg.matrix_rank(maps) / min(maps.shape[1:]))


def activity(search: Search, task: Task) -> Scores:
    """The mean magnitude of each channel's activations."""
    return of_maps_read(search, task, lambda maps: maps.abs().mean((1, 2)))


def sensitivity(search: Search, task: Task) -> Scores:
    """The sum of |w dL/dw| over all weights that write, normalise or read a channel; L is summed over batches."""
    net = search.net
    before, was_training = {name: b.clone() for name, b in net.named_buffers()}, net.training
    net.train()
    with shared_statistics():
        for x, y in score_batches(task):
            batch_loss(search, task, x, y).backward()
    average_gradients(net.parameters())
    for name, buffer in net.named_buffers():  # statistics of norms, as they were
        buffer.copy_(before[name])
    net.train(was_training)
    scores: dict[str, Tensor] = {}
    for role in ("out", "norm", "in"):
        for name, own in axes_of(search, role).items():
            for axis in own:
                scores[name] = scores.get(name, 0) + (axis.slices() * axis.slices(of_gradient=True)).abs().sum(1)
    net.zero_grad()
    return scores


L1 = rank_and_cut(
    l1_norms,
    summary="widths, by the L1 norms of trained filters",
    source="Pruning Filters for Efficient ConvNets, Li et al., ICLR 2017, arXiv 1608.08710",
    comparable=False,
    needs="trained weights",
    deviations="the share of each layer follows from the budget, not by hand",
)
TAYLOR = rank_and_cut(
    taylor,
    summary="widths, by the change of the loss without a channel, expanded to first or second order",
    source="Importance Estimation for Neural Network Pruning, Molchanov et al., CVPR 2019, arXiv 1906.10771",
    config=TaylorConfig,
    needs="trained weights, labels, gradients",
    deviations="the gate is where a channel is read, not behind its norm; no division by the number of uses",
)
HRANK = rank_and_cut(
    ranks,
    summary="widths, by the ranks of feature maps",
    source="HRank: Filter Pruning using High-Rank Feature Map, Lin et al., CVPR 2020, arXiv 2002.10179",
    needs="trained weights, images",
    deviations="no fine-tuning between layers",
)
DROPNET = rank_and_cut(
    activity,
    summary="widths, by mean activations, in several cuts that each rewind the weights to their start",
    source="DropNet: Reducing Neural Network Complexity via Iterative Pruning, Tan and Motani, ICML 2020",
    config=DropnetConfig,
    needs="trained weights, images",
    deviations="cuts until the budget, not until the accuracy falls",
)
SNIP = rank_and_cut(
    sensitivity,
    summary="widths, by the sensitivity of the loss to weights at initialisation; no training",
    source="SNIP: Single-shot Network Pruning based on Connection Sensitivity, Lee et al., ICLR 2019, arXiv 1810.02340",
    config=SnipConfig,
    loss=None,
    work=lambda config: (0.0, 0.0),
    needs="labels, gradients",
    deviations="sums over the weights of a channel, not single weights",
)
