"""One ``train`` and one ``evaluate``, for searching and for training from scratch alike, made of timm's parts."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from timm.data import Mixup
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from dnas.runtime.checkpoint import load_optimizer, optimizer_data
from dnas.runtime.distributed import average_gradients, mean, shared_statistics, to_host
from dnas.spec.checks import UserError
from dnas.spec.recipe import Recipe
from dnas.training.batches import Batches, OwnLoss
from dnas.training.onednn_workaround import subsampled
from dnas.training.optimizer import amp_dtype, autocast, make_optimizer, make_scheduler


@dataclass
class Learner:
    """What a training carries from one step to the next: ``update`` steps are done, ``skipped`` of them without effect.

    ``skipped_now`` is how many of the last ones in a row were.
    """

    module: nn.Module
    optimizer: Optimizer
    scheduler: Scheduler
    scaler: torch.amp.GradScaler
    update: int = 0
    skipped: int = 0
    skipped_now: int = 0


def make_scaler(device: torch.device, recipe: Recipe) -> torch.amp.GradScaler:
    """Keeps small gradients of float16 from vanishing; disabled for any other precision."""
    is_half = amp_dtype(device, recipe) == torch.float16
    return torch.amp.GradScaler(device.type, enabled=recipe.amp and is_half)


def make_learner(
    module: nn.Module, parameters: Iterable[nn.Parameter], recipe: Recipe, updates_per_epoch: int
) -> Learner:
    """Of a training of these parameters of ``module`` that is about to begin. Raises UserError for names timm lacks."""
    optimizer = make_optimizer(parameters, recipe)
    scaler = make_scaler(optimizer.param_groups[0]["params"][0].device, recipe)
    return Learner(module, optimizer, make_scheduler(optimizer, recipe, updates_per_epoch), scaler)


def learner_data(learner: Learner) -> dict[str, Any]:
    """All of a learner but its module as plain data (see `dnas.runtime.checkpoint`)."""
    counts = {key: getattr(learner, key) for key in ("update", "skipped", "skipped_now")}
    parts = {"scheduler": learner.scheduler.state_dict(), "scaler": learner.scaler.state_dict()}
    return counts | parts | {"optimizer": optimizer_data(learner.optimizer, learner.module)}


def load_learner(learner: Learner, data: Mapping[str, Any]) -> None:
    """Put a learner of `make_learner`, whose module is as it was, into the state that `learner_data` gave."""
    load_optimizer(learner.optimizer, learner.module, data["optimizer"])
    learner.scheduler.load_state_dict(data["scheduler"])
    if learner.scaler.is_enabled():
        learner.scaler.load_state_dict(data["scaler"])
    for key in ("update", "skipped", "skipped_now"):
        setattr(learner, key, data[key])


def steps_per_epoch(batches: Batches, recipe: Recipe) -> int:
    """The optimizer steps of one epoch, each of ``grad_accum_steps`` batches; the last one may have fewer."""
    return -(-len(batches) // recipe.grad_accum_steps)


def batches_of_step(step: int, batches: Batches, recipe: Recipe) -> int:
    """How many batches the optimizer step number ``step`` of a training takes."""
    done = step % steps_per_epoch(batches, recipe) * recipe.grad_accum_steps
    return min(recipe.grad_accum_steps, len(batches) - done)


MAX_SKIPPED = 25  # steps in a row; float16 needs up to 16 to find its scale


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether there is no NaN and no infinity in any of them."""
    return math.isfinite(to_host(nn.utils.get_total_norm(tensors)).item())


@torch.no_grad()
def _step(learner: Learner, recipe: Recipe, loss: Tensor) -> float:
    """A step of the optimizer, or none if a gradient is not finite: one bad batch must not cost the whole training.

    Returns the loss, over all processes, which is read together with the norm of the gradients. Statistics of batch
    norms that such a batch has spoilt start anew. Raises UserError after too many in a row.
    """
    optimizer, scaler = learner.optimizer, learner.scaler
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    scaler.unscale_(optimizer)
    total = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    value, norm = to_host(torch.stack([mean(loss).double(), total.double()])).tolist()
    if math.isfinite(norm):
        if recipe.clip_grad:
            nn.utils.clip_grads_with_norm_(parameters, recipe.clip_grad, total)
        scaler.step(optimizer)
        learner.skipped_now = 0
    else:
        learner.skipped, learner.skipped_now = learner.skipped + 1, learner.skipped_now + 1
        for m in [m for m in learner.module.modules() if isinstance(m, _BatchNorm)]:
            if not all_finite([t for t in (m.running_mean, m.running_var) if t is not None]):
                m.reset_running_stats()
    scaler.update()
    if learner.skipped_now >= MAX_SKIPPED:
        raise UserError(
            f"the loss is {value} at step {learner.update}, and {MAX_SKIPPED} steps in a row had gradients that "
            f"are not finite: a lower --lr than {recipe.lr}, or --clip-grad, is needed"
        )
    return value


def train(
    loss_of: Callable[[Tensor, Tensor], Tensor],
    learner: Learner,
    batches: Batches,
    recipe: Recipe,
    *,
    mixup: Mixup | None = None,
) -> Iterator[float]:
    """Weight steps from ``learner.update`` to the end of the last epoch; each yields its loss.

    ``loss_of(images, labels)`` is the loss, a scalar. As in timm's train.py, a step takes ``grad_accum_steps`` batches,
    one after the other, and the means of their losses and gradients; a batch norm sees one batch at a time. What is to
    come between two steps is the caller's: the search's gates, the EMA, the progress bar. A step whose gradients are
    not finite is skipped; UserError after `MAX_SKIPPED` in a row.
    """
    optimizer, scaler = learner.optimizer, learner.scaler
    safe, per_epoch = subsampled(learner.module, recipe), steps_per_epoch(batches, recipe)
    while learner.update < recipe.epochs * per_epoch:
        epoch, taken = divmod(learner.update, per_epoch)
        batches.set_epoch(epoch)
        losses: list[Tensor] = []
        for x, y in batches.starting_at(taken * recipe.grad_accum_steps):
            of_step = batches_of_step(learner.update, batches, recipe)
            if mixup is not None:
                even = len(x) // 2 * 2  # timm mixes images in pairs
                x, y = mixup(x[:even], y[:even])
            if recipe.channels_last:
                x = x.to(memory_format=torch.channels_last)
            with autocast(x.device, recipe), shared_statistics(), safe:
                loss = loss_of(x, y) / of_step
            if not losses:
                optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            losses.append(loss.detach())
            del loss  # and its graph: what follows may change the shape of parameters
            if len(losses) < of_step:
                continue
            average_gradients(p for group in optimizer.param_groups for p in group["params"])
            value = _step(learner, recipe, torch.stack(losses).sum())
            losses.clear()
            learner.update += 1
            learner.scheduler.step_update(learner.update)
            yield value


def cycle(batches: Batches, taken: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches for ever, a new epoch number each time round; ``taken`` of them have been seen already."""
    while True:
        epoch, done = divmod(taken, len(batches))
        batches.set_epoch(epoch)
        for pair in batches.starting_at(done):
            taken += 1
            yield pair


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], recipe: Recipe) -> None:
    """Give batch norms the statistics of these images, all with the same weight. The training mode is restored.

    A narrower network has other statistics behind its norms than the one that it was cut from.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    momenta, was_training = [m.momentum for m in norms], model.training
    for m in norms:
        m.reset_running_stats()
        m.momentum = None  # the mean over all batches
    model.eval()  # without dropout
    for m in norms:
        m.train()
    for x, _ in batches:
        if recipe.channels_last:
            x = x.to(memory_format=torch.channels_last)
        with autocast(x.device, recipe), shared_statistics():
            model(x)
    for m, momentum in zip(norms, momenta, strict=True):
        m.momentum = momentum
    model.train(was_training)


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], recipe: Recipe, own: OwnLoss | None = None
) -> dict[str, Any]:
    """What a network reaches on these images, in eval mode; its training mode is restored.

    Returns ``top1`` in percent, ``loss`` (mean cross entropy), ``class_top1`` (by class in percent; None for a class
    without an image) and ``balanced_accuracy``, the mean of those (scikit-learn's name for it). With a program's
    ``own`` loss: ``top1`` is its score, which has to be finite, ``loss`` is its loss, and there are no others.
    """
    was_training = model.training
    sums: Tensor | float = 0.0  # the loss; then images, and right ones, by class
    model.eval()
    try:
        for x, y in batches:
            if recipe.channels_last:
                x = x.to(memory_format=torch.channels_last)
            with autocast(x.device, recipe):
                logits = model(x)
            if own:
                means = torch.tensor([float(own.score(logits, y)), float(own.loss(logits, y)), 1.0], dtype=torch.double)
                sums = sums + len(x) * means
                continue
            logits = logits.float()
            loss = nn.functional.cross_entropy(logits, y, reduction="sum")
            counts = [part.bincount(minlength=logits.shape[1]) for part in (y, y[logits.argmax(1) == y])]
            sums = sums + torch.cat([loss[None], *counts]).cpu().double()
    finally:
        model.train(was_training)
    assert isinstance(sums, Tensor)  # there is at least one image
    if own:
        score, total, count = mean(sums).tolist()
        if not math.isfinite(score):  # nothing could be compared, and JSON has no such numbers
            raise UserError(f"score is {score / count}: a finite number is expected")
        return {"top1": score / count, "loss": total / count}
    total, *by_class = mean(sums).tolist()
    images, right = by_class[: len(by_class) // 2], by_class[len(by_class) // 2 :]
    class_top1 = [100 * hit / count if count else None for hit, count in zip(right, images, strict=True)]
    known = [top1 for top1 in class_top1 if top1 is not None]
    scores: dict[str, Any] = {"top1": 100 * sum(right) / sum(images), "loss": total / sum(images)}
    return scores | {"balanced_accuracy": fmean(known), "class_top1": class_top1}
