"""Searches by methods that score channels, before their first step; what each of them scores by."""

from dataclasses import replace
from functools import cache

import torch
from test_methods import METHODS, digits, net_of, task_of
from torch import nn

from dnas.methods import curvature, penalties, reconstruction
from dnas.methods.loop import begin
from dnas.methods.rank_and_cut import dense_arch
from dnas.methods.rankings import activity, l1_norms, ranks, sensitivity, taylor
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
