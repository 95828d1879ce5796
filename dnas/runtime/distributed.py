"""Several processes that train one network: torchrun starts them, and each takes its part of every batch.

Gradients and the statistics of batch norms are means over all processes, so that together they do what one process does
with the whole batch, up to rounding. `DistributedDataParallel` lays out its buckets once and a network that is being
searched changes its shape, so the gradients are averaged here, all in one message. Without torchrun there is one
process, and nothing here does anything.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from dnas.spec.checks import UserError

_group: dist.ProcessGroup | None = None  # those that train together; None: all


def rank() -> int:
    """The number of this process among those that train together, from 0."""
    return dist.get_rank(_group) if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size(_group) if dist.is_initialized() else 1


def split(parts: int) -> int:
    """From here on the processes train in so many groups, each on its own. Returns the number of this one's."""
    global _group
    if parts < 2:
        return 0
    place = parts * rank() // world_size()
    groups: list[Any] = [dist.new_group(ranks) for ranks in _groups(parts)]  # everybody has to make all of them
    _group = groups[place]
    return place


def _groups(parts: int) -> list[list[int]]:
    return [[r for r in range(world_size()) if parts * r // world_size() == part] for part in range(parts)]


def check_shares(batch_size: int, parts: int = 1) -> None:
    """UserError unless a batch divides among all processes, and among those of each group of `split`."""
    for ranks in {world_size(), *map(len, _groups(parts))}:
        if batch_size % ranks:
            raise UserError(
                f"--batch-size {batch_size} does not divide among {ranks} processes: a multiple is expected"
            )


@contextmanager
def processes() -> Iterator[None]:
    """Join the processes that torchrun started (its environment variables say which), and leave them at the end."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def share_of(count: int, batch_size: int) -> tuple[int, Tensor]:
    """This process's part of ``count`` ordered images: how many of a batch, and their positions, int64.

    ``count`` is a multiple of ``batch_size``, or less than one batch. Every process gets as many as every other; what
    is left over of less than one batch is nobody's. UserError if there is not an image for each.
    """
    ranks = world_size()
    check_shares(batch_size)
    own = min(count, batch_size) // ranks
    if not own:
        raise UserError(f"{count} images are too few for {ranks} processes: at least one each is expected")
    batches = torch.arange(count).view(-1, min(count, batch_size))
    return own, batches[:, own * rank() : own * (rank() + 1)].flatten()


def mean(value: Tensor) -> Tensor:
    """The mean of a detached tensor over all processes; on one, the tensor itself."""
    if world_size() == 1:
        return value
    value = value.clone()
    dist.all_reduce(value, group=_group)
    return value / world_size()


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace every gradient that is there by its mean over all processes. All must have the same ones."""
    if world_size() == 1:
        return
    grads = [p.grad for p in parameters if p.grad is not None]
    flat = mean(torch.cat([g.flatten() for g in grads]))
    for grad, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
        grad.copy_(part.view_as(grad))


def gathered(value: Any) -> list[Any]:
    """``value`` of every process, by rank; it is pickled on its way."""
    found = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(found, value, group=_group)
    return found


def to_host(tensor: Tensor) -> Tensor:
    """``tensor`` on the CPU, differentiable. All copies that the steps of a training or a search wait for are here.

    A GPU works behind; whoever reads a number of it waits until it has caught up.
    """
    return tensor.cpu()


def from_first(tensors: Iterable[Tensor]) -> None:
    """Overwrite the tensors of all processes with those of the first one, so that all decide alike.

    One message for each dtype and device, however many tensors there are.
    """
    if world_size() == 1:
        return
    first = dist.get_global_rank(_group, 0) if _group else 0
    alike: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        alike.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    with torch.no_grad():
        for own in alike.values():
            flat = torch.cat([tensor.flatten() for tensor in own])
            dist.broadcast(flat, first, group=_group)
            for tensor, part in zip(own, flat.split([t.numel() for t in own]), strict=True):
                tensor.copy_(part.view(tensor.shape))


def shared_statistics() -> AbstractContextManager:
    """Inside, batch norms that train take their statistics over all processes; on one, nothing changes."""
    return _SharedStatistics() if world_size() > 1 else nullcontext()


class _SharedStatistics(TorchFunctionMode):
    """Inside, batch norms that train use the mean and variance over all processes' parts of the batch, not their own.

    The parts are of equal size. As ``SyncBatchNorm``, but on every device, and without another class of module: a
    network is pruned, exported and counted as what it is.
    """

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Every function of torch comes by here; one of them is replaced."""
        if func is F.batch_norm and kwargs and kwargs["training"]:
            return _batch_norm(*args, **{key: value for key, value in kwargs.items() if key != "training"})
        return func(*args, **(kwargs or {}))


class _Sum(torch.autograd.Function):
    """The sum over all processes; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.clone()
        dist.all_reduce(total, group=_group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total: Tensor = _Sum.apply(grads[0].contiguous())  # which has a gradient itself
        return total


def _batch_norm(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None,
    weight: Tensor | None, bias: Tensor | None, momentum: float, eps: float
) -> Tensor:  # fmt: skip
    dims, shape = [0, *range(2, x.ndim)], [1, -1] + [1] * (x.ndim - 2)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    own = torch.stack([wide.mean(dims), wide.var(dims, correction=0)])
    slots = own.new_zeros(world_size(), *own.shape)
    filled = torch.cat([slots[: rank()], own[None], slots[rank() + 1 :]])
    means, variances = _Sum.apply(filled).unbind(1)
    mean, var = means.mean(0), variances.mean(0) + means.var(0, correction=0)
    if running_mean is not None and running_var is not None:
        count = x.numel() // x.shape[1] * world_size()
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((var * count / max(1, count - 1)).to(running_var.dtype), momentum)
    scale = torch.rsqrt(var + eps) * (1 if weight is None else weight)
    shift = -mean * scale + (0 if bias is None else bias)
    return torch.addcmul(shift.view(shape), wide, scale.view(shape)).to(x.dtype)
