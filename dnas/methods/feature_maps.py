"""Looking into the dense net while it runs: the maps that layers read and write, and gates on channels."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dnas.methods.method import Search, Task
from dnas.methods.rank_and_cut import Scores, score_batches
from dnas.nets.channels import ChannelAxis
from dnas.nets.supernet import Supernet
from dnas.runtime.distributed import mean
from dnas.training.criterion import plain_loss
from dnas.training.onednn_workaround import subsampled

Axes = Mapping[str, list[ChannelAxis]]  # width decision -> axes
See = Callable[[nn.Module, Tensor, Tensor], object]  # (layer, what it reads, what it writes)


def axes_of(search: Search, role: str) -> Axes:
    """Width decision -> its axes with this ``role``, of what is left of the dense net."""
    left = search.own.arch
    return {n: [a for a in own if a.role == role] for n, own in search.net.channel_axes().items() if n in left}


def layers_of(axes: Axes) -> list[nn.Module]:
    """The convolutions and linear layers that have these axes, each once."""
    return list(dict.fromkeys(axis.module for own in axes.values() for axis in own))


@contextmanager
def watching(layers: Iterable[nn.Module], see: See) -> Iterator[None]:
    """Inside, ``see`` is called whenever one of the layers has run; a tensor that it returns is written instead."""
    hooks = [m.register_forward_hook(lambda m, inputs, output: see(m, inputs[0], output)) for m in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def evaluating(net: Supernet) -> Iterator[None]:
    """Inside, the net is in eval mode and its gradients are empty; so they are after it."""
    was_training = net.training
    net.eval()
    net.zero_grad()
    try:
        yield
    finally:
        net.zero_grad()
        net.train(was_training)


def batch_loss(search: Search, task: Task, x: Tensor, y: Tensor) -> Tensor:
    """Cross entropy of what is left of the dense net on a batch: a scalar with a graph."""
    with torch.enable_grad(), subsampled(search.net, task.recipe):
        return plain_loss(search.net(x, search.own.arch), y, task.data, task.class_weights)


def channels_of(tensor: Tensor, axis: ChannelAxis) -> Tensor:
    """What an axis's layer reads or writes: [B, units, positions of a unit, sides of a map]; tokens are one side."""
    linear = getattr(axis.module, axis.name).ndim == 2  # its channels come last
    tensor = tensor.movedim(-1, 1) if linear else tensor
    return tensor[:, torch.from_numpy(axis.places).to(tensor.device)]


def patches_of(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """The numbers under the kernel at every place of a map: [B, channels * taps, places]."""
    padding: Any = layer.padding
    if isinstance(padding, str):  # torch keeps here what "same" means: left, right, top, bottom
        x, padding = F.pad(x, layer._reversed_padding_repeated_twice), 0
    return F.unfold(x, layer.kernel_size, layer.dilation, padding, layer.stride)


def of_layers_read(search: Search, task: Task, see: Callable[[str, nn.Module, ChannelAxis, Tensor], None]) -> Axes:
    """Call ``see(decision, layer, axis, what it reads)`` for every layer that reads a width, on every batch.

    Convolutions in groups are left out: their weights do not have a place for each channel. So are layers other than
    linear ones and convolutions over two dimensions. Returns all axes.
    """
    axes = axes_of(search, "in")

    def look(layer: nn.Module, x: Tensor, _: Tensor) -> None:
        for name, own in axes.items() if isinstance(layer, (nn.Conv2d, nn.Linear)) else ():
            for axis in own:
                if axis.module is layer and getattr(layer, "groups", 1) == 1:
                    see(name, layer, axis, x.detach())

    with evaluating(search.net), watching(layers_of(axes), look), subsampled(search.net, task.recipe):
        for x, _ in score_batches(task):
            search.net(x, search.own.arch)
    return axes


def of_maps_read(search: Search, task: Task, measure: Callable[[Tensor], Tensor]) -> Scores:
    """Scores from the maps that layers read: behind norms and activations, and where branches are added.

    ``measure(maps)`` turns [B * units, height, width] into a number for each. A unit has the mean over images,
    processes, its channels, and the layers that read it at its largest size: squeezed maps of 1 x 1 say little. Units
    that no convolution without groups and no linear layer reads as a map have 1.
    """
    sums: dict[str, dict[int, list[Tensor]]] = {}

    def see(name: str, layer: nn.Module, axis: ChannelAxis, x: Tensor) -> None:
        read = channels_of(x, axis).float()
        maps = read if read.ndim == 5 else read.reshape(*read.shape[:3], 1, -1)
        found = measure(maps.flatten(0, 2)).view(maps.shape[:3]).mean((0, 2))
        sums.setdefault(name, {}).setdefault(maps[0, 0, 0].numel(), []).append(found)

    axes = of_layers_read(search, task, see)
    found = {name: mean(torch.stack(by_size[max(by_size)]).mean(0)) for name, by_size in sums.items()}
    like = next(search.net.parameters())
    return {name: found.get(name, like.new_ones(len(own[0].places))) for name, own in axes.items() if own}


def gated_loss(search: Search, task: Task, axes: Axes, gates: Mapping[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    """The cross entropy with a gate on every unit, [units], wherever it is read: a scalar with a graph."""
    names = {id(p): name for name, p in search.net.named_parameters()}
    factors: dict[tuple[str, int], Tensor] = {}
    for decision, own in axes.items():
        for axis in own:
            weight = getattr(axis.module, axis.name)
            key = names[id(weight)], axis.dim
            places = torch.from_numpy(axis.places).to(weight.device)
            before = factors.get(key, weight.new_ones(weight.shape[axis.dim]))
            factors[key] = before.index_put((places,), gates[decision][:, None].expand(places.shape))
    weights = {}
    for (name, dim), factor in factors.items():
        weight = search.net.get_parameter(name)
        weights[name] = weight.detach() * factor.view(-1, *[1] * (weight.ndim - 1 - dim))
    with subsampled(search.net, task.recipe):
        logits = torch.func.functional_call(search.net, weights, (x, search.own.arch))
        return plain_loss(logits, y, task.data, task.class_weights)
