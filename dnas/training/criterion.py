"""The loss of a weight step: cross entropy with label smoothing and class weights, and distillation."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dnas.runtime.distributed import mean
from dnas.spec.checks import UserError
from dnas.spec.recipe import BALANCED, Recipe, parse_class_weights
from dnas.training.batches import Data
from dnas.training.teacher import Teacher, distillation_loss

Criterion = Callable[[Any, Tensor, Tensor], Tensor]  # (logits, images, labels or soft targets) -> a scalar


def class_weights(recipe: Recipe, data: Data) -> Tensor | None:
    """The weight of each class in the loss, float32 [num_classes] on the CPU; None if all weigh alike.

    ``balanced`` is scikit-learn's rule: n / (classes * count of the class), over the n training labels, so that all
    classes weigh alike in an epoch.

    Raises:
        UserError: there are more or fewer weights than classes; a class without a training image would be balanced.
    """
    if not recipe.class_weights:
        return None
    if recipe.class_weights == BALANCED:
        counts = data.class_counts.double()
        if missing := [name for name, count in zip(data.class_names, counts.tolist(), strict=True) if not count]:
            raise UserError(f"--class-weights {BALANCED}: a training image of the class {missing[0]!r} is needed")
        return (counts.sum() / (len(counts) * counts)).float()
    weights = parse_class_weights(recipe.class_weights)
    if len(weights) != data.num_classes:
        raise UserError(
            f"--class-weights {recipe.class_weights!r}: {data.num_classes} numbers are expected, one for each class"
        )
    return torch.tensor(weights)


def cross_entropy(logits: Tensor, y: Tensor, weights: Tensor | None = None, smoothing: float = 0.0) -> Tensor:
    """The mean cross entropy of ``logits`` [B, classes]: a scalar.

    ``y`` are labels, int64 [B], or soft targets t, float [B, classes], which are not smoothed again. With ``weights`` w
    [classes], each term -t_ic log p_ic of image i and class c is multiplied by w_c. The sum is divided by the sum of
    the w_c of all labels, as torch's ``CrossEntropyLoss(weight=, label_smoothing=)``; with soft targets, by the sum of
    w_c t_ic. Deviation: with soft targets torch divides by B, so that a factor of all weights is one of the loss.

    Of several processes, the divisor is the mean of theirs, so that the mean of their losses is that of the batch.
    """
    soft = y.is_floating_point()
    if weights is None:
        return F.cross_entropy(logits, y, label_smoothing=0.0 if soft else smoothing)
    weights = weights.to(logits)
    total = F.cross_entropy(logits, y, weights, reduction="sum", label_smoothing=0.0 if soft else smoothing)
    return total / mean((y.to(logits) @ weights if soft else weights[y]).sum())


def plain_loss(outputs: Any, y: Tensor, data: Data, weights: Tensor | None) -> Tensor:
    """What scores of channels are taken from: cross entropy without smoothing, or the program's own loss. A scalar."""
    return data.own_loss.loss(outputs, y) if data.own_loss else cross_entropy(outputs.float(), y, weights)


def make_criterion(recipe: Recipe, data: Data, teacher: Teacher | None = None) -> Criterion:
    """The loss of logits [B, classes] of these images: a scalar.

    It is the `cross_entropy` with the recipe's label smoothing and class weights. With a teacher it is w times that,
    plus 1 - w times the `distillation_loss`, where w is the ``task_loss_weight``.

    Where a program has a loss of its own (`OwnLoss`), it is that, of whatever the network returns.

    Raises UserError for class weights that do not fit the data.
    """
    if data.own_loss:
        own = data.own_loss.loss
        return lambda outputs, x, y: own(outputs, y)
    weights, w = class_weights(recipe, data), recipe.task_loss_weight

    def criterion(logits: Tensor, x: Tensor, y: Tensor) -> Tensor:
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # half precision is too coarse for a loss
        loss = cross_entropy(logits, y, weights, recipe.smoothing)
        if teacher is None:
            return loss
        return w * loss + (1 - w) * distillation_loss(logits, teacher(x), recipe.kd_temperature)

    return criterion
