"""Rank and cut: train the dense net, score its channels, keep the channels with the highest scores inside the budget.

A method of this family is a function that scores the channels of a supernet. This file has everything else.
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
    """The dense net: base blocks, all layers, every width at its widest."""
    return space.complete(
        {d.name: d.options[-1] if d.is_width else KEEP if KEEP in d.options else d.base for d in space.decisions}
    )


def only(net: Supernet, arch: Arch) -> dict[str, list[int]]:
    """The options (decision -> indices) that `Supernet.cut_to` has to leave for one network of a supernet."""
    return net.structure() | {name: [net.space.by_name[name].index(option)] for name, option in arch.items()}


def cut_to_dense(net: Supernet, task: Task) -> Arch:
    """Cut a supernet to the dense net, because only the dense net is trained and ranked. Returns its arch."""
    dense = dense_arch(net.space)
    net.cut_to(only(net, dense))
    return dense


def dense_loss(search: Search, task: Task, x: Tensor, y: Tensor, progress: float) -> Tensor:
    """Cross entropy of the dense net, with the recipe's label smoothing: a scalar."""
    logits = search.net(x, search.own).float()
    return F.cross_entropy(logits, y, label_smoothing=task.recipe.smoothing)


def most_score(space: Space, scores: Scores) -> dict[str, np.ndarray]:
    """The value of each option: decision -> [number of options].

    A width of n units has the sum of its n highest scores. Other decisions, and widths without scores, are held at the
    dense net: its option has 0, every other option has -10000.
    """
    dense = dense_arch(space)
    like = {d.name: np.where(np.array(d.options) == dense.get(d.name), 0.0, -1e4) for d in space.decisions}
    for name, score in scores.items():
        options = np.array(space.by_name[name].options)
        worth = np.concatenate([[0.0], np.cumsum(np.sort(score.double().cpu().numpy())[::-1])])
        like[name] = worth[options * len(score) // options[-1]]
    return like


def rank_and_cut(score: Callable[[Search, Task], Scores], summary: str, source: str) -> Method:
    """A method that trains the dense net and then cuts it once: it keeps the highest total ``score`` inside the budget.

    Deviation: the papers cut a share of each layer (Li et al.) or all channels with scores below one global threshold.
    Here `derive` weighs the scores against the costs of the channels.
    """

    def choose(search: Search, task: Task) -> Arch:
        with torch.no_grad():
            scores = score(search, task)
            like = most_score(search.net.space, scores)
        # A narrower network keeps the first channels, so the best channels come first.
        search.net.reorder({name: own.argsort(descending=True, stable=True) for name, own in scores.items()})
        return derive(search.net.space, task.tables, task.budgets, like)

    return Method(summary, source, choose, init=cut_to_dense, loss=dense_loss, work=lambda config: (1.0, 0.0))


def l1_norms(search: Search, task: Task) -> Scores:
    """The L1 norm of each filter, divided by the mean of its layer.

    If several layers write the same channels, their scores are added.
    """
    scores: dict[str, Tensor] = {}
    for name, axes in search.net.channel_axes().items():
        for axis in axes:
            if axis.role == "out":
                norms = axis.slices().abs().sum(1)
                scores[name] = scores.get(name, 0) + norms / norms.mean()
    return scores


BATCHES = 10  # of training images that first-order scores are taken over


def first_order(search: Search, task: Task) -> Scores:
    """The squared first-order change of the loss when a channel is zeroed, summed over `BATCHES` batches.

    The change is the sum of weight times gradient over all weights that read the channel. The scores of a width are
    divided by their mean. Deviation: the paper's gates follow batch norms. Here channels that several layers write have
    one score for all their readers.
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
    return {name: score / score.mean().clamp(min=1e-30) for name, score in scores.items()}  # all of a branch may be 0


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
