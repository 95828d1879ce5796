"""The method ``kfac``: Kronecker factors of the curvature score filters, and can keep the loss flat while it trains."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dnas.methods.feature_maps import axes_of, batch_loss, channels_of, evaluating, layers_of, patches_of, watching
from dnas.methods.method import Search, Task
from dnas.methods.rank_and_cut import Scores, dense_loss, rank_and_cut, score_batches
from dnas.methods.settings import KfacConfig
from dnas.runtime.distributed import mean

POWER_STEPS = 5  # of the iteration that finds a largest eigenvalue


def saliency(search: Search, task: Task) -> Scores:
    """The second-order change of the loss without the weights of a filter.

    With the factors A = E[a a^T] of what a layer reads and G = E[g g^T] of the gradients of what it writes, it is
    w^T A w G[j, j] / 2 = E[(w a)^2] E[g^2] / 2, where w a is what filter j writes. Units that only frozen layers write,
    or layers that write more than one tensor (torch's MultiheadAttention), have 1.
    """
    axes = axes_of(search, "out")
    sums: dict[str, Tensor] = {}
    written: list[tuple[nn.Module, Tensor]] = []

    def see(layer: nn.Module, _: Tensor, y: Tensor) -> Tensor | None:
        if not isinstance(y, Tensor) or not y.requires_grad:
            return None
        y.retain_grad()
        written.append((layer, y))
        return y.clone()  # an activation may change it in place

    with evaluating(search.net), watching(layers_of(axes), see):
        for x, y in score_batches(task):
            written.clear()
            batch_loss(search, task, x, y).backward()
            for name, axis in [(name, axis) for name, own in axes.items() for axis in own]:
                for out in [out for layer, out in written if layer is axis.module]:
                    slope = torch.zeros_like(out) if out.grad is None else out.grad * len(x)
                    both = (channels_of(t.detach(), axis) for t in (out, slope))
                    made, slopes = (t.reshape(*t.shape[:3], -1).square() for t in both)
                    change = made.mean((0, 3)) * slopes.sum(3).mean(0) / 2  # of each filter of a unit
                    sums[name] = sums.get(name, 0) + mean(change.sum(1))
    like = next(search.net.parameters())
    return {name: sums.get(name, like.new_ones(len(own[0].places))) for name, own in axes.items() if own}


def largest_eigenvalue(rows: Tensor) -> Tensor:
    """Of the matrix R^T R of rows R, [N, D]: a scalar whose gradient is that of |R v|^2 at its eigenvector v."""
    rows = rows.float()
    with torch.no_grad():
        v = torch.randn(rows.shape[1], generator=torch.Generator().manual_seed(0)).to(rows)
        for _ in range(POWER_STEPS):
            v = F.normalize(rows.T @ (rows @ v), dim=0)
    return (rows @ v).square().sum()


def spectral_radius(seen: list[tuple[nn.Module, Tensor, Tensor]], loss: Tensor, images: int) -> Tensor:
    """The largest eigenvalue of the Kronecker-factored curvature of all layers: a scalar with a graph.

    ``seen`` has each layer with what it read and wrote. The largest eigenvalue of a Kronecker product is the product of
    those of its factors.
    """
    slopes = torch.autograd.grad(loss, [y for _, _, y in seen], create_graph=True)
    radii = []
    for (layer, x, _), slope in zip(seen, slopes, strict=True):
        if isinstance(layer, nn.Conv2d):
            if layer.groups > 1:
                continue
            read = patches_of(layer, x).movedim(1, -1)
            slope = slope.flatten(2).movedim(1, -1)
        else:
            read, slope = x.reshape(images, -1, x.shape[-1]), slope.reshape(images, -1, slope.shape[-1])
        rows, flat = read.flatten(0, 1), (slope * images).flatten(0, 1)
        radii.append(largest_eigenvalue(rows) / images * largest_eigenvalue(flat) / len(flat))
    return torch.stack(radii).max()


def flat_loss(search: Search, task: Task, x: Tensor, y: Tensor, progress: float) -> Tensor:
    """Cross entropy, plus ``flatness`` times the part of the spectral radius above ``radius``: a scalar."""
    config, seen = task.config, []
    if not config.flatness:
        return dense_loss(search, task, x, y, progress)
    layers = [m for m in search.net.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]

    def see(layer: nn.Module, read: Tensor, made: Tensor) -> Tensor:
        seen.append((layer, read, made))
        return made.clone()  # an activation may change it in place

    with watching(layers, see):
        loss = dense_loss(search, task, x, y, progress)
    with torch.autocast(x.device.type, enabled=False):  # sums over many rows overflow in float16
        radius = spectral_radius(seen, loss, len(x))
    return loss + config.flatness * (radius - config.radius).relu()


KFAC = rank_and_cut(
    saliency,
    summary="widths, by Kronecker-factored curvature, in several cuts",
    source="Neuron-based Pruning of Deep Neural Networks with Better Generalization using Kronecker Factored Curvature "
    "Approximation, Ebrahimi and Klabjan, arXiv 2111.08577",
    config=KfacConfig,
    loss=flat_loss,
    needs="trained weights, labels, gradients",
    deviations="rebuilt from the abstract; no penalty on the curvature unless asked for",
)
