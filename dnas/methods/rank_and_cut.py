"""Rank and cut: train the dense network, score its channels, keep those worth most inside the budget.

A method of this family is a function from a supernet to the scores of its channels; everything else is here.
"""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dnas.methods.derive import derive
from dnas.methods.method import Method, Search, Task
from dnas.nets.supernet import Supernet
from dnas.runtime.distributed import average_gradients
from dnas.spec.space import KEEP, Arch, Space
from dnas.training.loop import cycle
from dnas.training.onednn_workaround import subsampled

Scores = Mapping[str, Tensor]  # width decision -> the score of each of its channels, [widest], or of each unit of them


def dense_arch(space: Space) -> Arch:
    """The base network at full width: base blocks, all layers, every width at its widest."""
    return space.complete(
        {d.name: d.options[-1] if d.is_width else KEEP if KEEP in d.options else d.base for d in space.decisions}
    )


def only(net: Supernet, arch: Arch) -> dict[str, list[int]]:
    """What `Supernet.cut_to` leaves of a supernet for one of its networks."""
    return net.structure() | {name: [net.space.by_name[name].index(option)] for name, option in arch.items()}


def cut_to_dense(net: Supernet, task: Task) -> Arch:
    """Leave a supernet nothing but the dense network, which is all that is trained and ranked. Returns it."""
    dense = dense_arch(net.space)
    net.cut_to(only(net, dense))
    return dense


def dense_loss(search: Search, task: Task, x: Tensor, y: Tensor, progress: float) -> Tensor:
    """Cross entropy of the dense network, with the recipe's label smoothing: a scalar."""
    logits = search.net(x, search.own).float()
    return F.cross_entropy(logits, y, label_smoothing=task.recipe.smoothing)


def most_score(space: Space, scores: Scores) -> dict[str, np.ndarray]:
    """Decision -> the worth of each option: of a width, the sum of its highest scores; only base blocks, all layers."""
    dense = dense_arch(space)
    like = {d.name: np.where(np.array(d.options) == dense.get(d.name), 0.0, -1e4) for d in space.decisions}
    for name, score in scores.items():
        options = np.array(space.by_name[name].options)
        worth = np.concatenate([[0.0], np.cumsum(np.sort(score.double().cpu().numpy())[::-1])])
        like[name] = worth[options * len(score) // options[-1]]
    return like


def rank_and_cut(score: Callable[[Search, Task], Scores], summary: str, source: str) -> Method:
    """The method that trains the dense network and then keeps the most ``score`` that fits, one shot.

    Deviation from the papers, which cut a share of each layer (Li et al.) or all scores below one global threshold:
    `derive` weighs scores against what channels cost.
    """

    def choose(search: Search, task: Task) -> Arch:
        with torch.no_grad():
            scores = score(search, task)
            like = most_score(search.net.space, scores)
        # A narrower network keeps the first channels: now they are the best ones.
        search.net.reorder({name: own.argsort(descending=True, stable=True) for name, own in scores.items()})
        return derive(search.net.space, task.tables, task.budgets, like)

    return Method(summary, source, choose, init=cut_to_dense, loss=dense_loss, work=lambda config: (1.0, 0.0))


def l1_norms(search: Search, task: Task) -> Scores:
    """The L1 norm of each filter, a layer's scaled to mean 1; of channels that several layers write, their sum."""
    scores: dict[str, Tensor] = {}
    for name, axes in search.net.channel_axes().items():
        for axis in axes:
            if axis.role == "out":
                norms = axis.slices().abs().sum(1)
                scores[name] = scores.get(name, 0) + norms / norms.mean()
    return scores


BATCHES = 10  # of training images that first-order scores are taken over


def first_order(search: Search, task: Task) -> Scores:
    """The square of the loss's first-order change when a channel is zeroed, summed over batches; a layer's mean is 1.

    The change is the sum of weight times gradient over all weights that read the channel. Deviation from the paper,
    whose gates follow batch norms: one score for all readers of channels that several layers write.
    """
    net, recipe = search.net, task.recipe
    axes = {n: [a for a in own if a.role == "in"] for n, own in net.channel_axes().items() if n in search.own}
    scores: dict[str, Tensor] = {}
    was_training = net.training
    net.eval()
    for _, (x, y) in zip(range(BATCHES), cycle(task.held_out_batches(0.0)), strict=False):
        net.zero_grad()
        with torch.enable_grad(), subsampled(net, recipe):
            F.cross_entropy(net(x, search.own).float(), y).backward()
        average_gradients(net.weight_parameters())
        for name, own in axes.items():
            change = torch.stack([(axis.slices() * axis.slices(of_gradient=True)).sum(1) for axis in own]).sum(0)
            scores[name] = scores.get(name, 0) + change**2
    net.zero_grad()
    net.train(was_training)
    return {name: score / score.mean().clamp(min=1e-30) for name, score in scores.items()}  # a branch may be at zero


L1 = rank_and_cut(
    l1_norms,
    summary="widths, by the L1 norms of trained filters",
    source="Pruning Filters for Efficient ConvNets, Li et al., ICLR 2017, arXiv 1608.08710",
)
TAYLOR = rank_and_cut(
    first_order,
    summary="widths, by the first-order change of the loss without a channel",
    source="Importance Estimation for Neural Network Pruning, Molchanov et al., CVPR 2019, arXiv 1906.10771",
)
