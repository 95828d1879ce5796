"""A trained network of timm's whose logits another network learns to give: knowledge distillation."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

import timm
import torch
from timm.models import get_pretrained_cfg
from torch import Tensor, nn
from torch.nn import functional as F

from dnas.spec.checks import UserError, first_line, near_names
from dnas.spec.image_size import sides, size_text
from dnas.spec.recipe import Recipe
from dnas.training.batches import Data
from dnas.training.optimizer import to_channels_last
from dnas.training.weights import load_weights, read_weights


class Teacher(nn.Module):
    """A network that learns nothing: in eval mode, without gradients.

    Its images are those of the student, with the mean and deviation of its ``pretrained_cfg`` in place of the data's,
    as in timm's distillation. Batches that a program gives are normalised nobody knows how, and stay as they are.
    """

    scale: Tensor  # [C, 1, 1], and so is the shift
    shift: Tensor

    def __init__(self, model: nn.Module, data: Data) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        cfg: Any = model.pretrained_cfg
        given = (data.mean, data.std)
        is_known = set(data.std) != {1.0}  # pixels in 0..1 cannot deviate so much: a program has normalised them
        means, stds = (
            torch.tensor([_per_channel(values, data.in_chans) for values in pair])[..., None, None]
            for pair in zip(given, (cfg["mean"], cfg["std"]) if is_known else given, strict=True)
        )
        self.register_buffer("scale", stds[0] / stds[1])
        self.register_buffer("shift", (means[0] - means[1]) / stds[1])
        self.eval()

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Images [B, in_chans, H, W], as the student gets them, to logits [B, classes], float32, without a graph."""
        return self.model(x * self.scale + self.shift).float()


def _per_channel(values: Sequence[float], channels: int) -> Sequence[float]:
    """One value for each channel; the mean for all, if timm has another number of them."""
    return values if len(values) == channels else [fmean(values)] * channels


def make_teacher(recipe: Recipe, data: Data, device: torch.device) -> Teacher | None:
    """The teacher of a recipe, on this device; None if it has none.

    It is timm's ``kd_model_name``, with the weights of the file ``kd_checkpoint``, or else timm's own.

    Raises:
        UserError: timm has no such network, or no weights of it; they cannot be loaded, are for another number of
            classes than the data has, or cannot be run on images of this size.
    """
    name, file = recipe.kd_model_name, recipe.kd_checkpoint
    if not name:
        return None
    given = f"--kd-model-name {name!r}"
    if not timm.is_model(name):
        raise UserError(f"{given} is no model of timm's; {near_names(name, timm.list_models())}")
    cfg = get_pretrained_cfg(name)
    classes = cfg.num_classes if cfg and cfg.has_weights else None
    if not file and classes != data.num_classes:
        there = f"weights are for {classes} classes" if classes else "timm has no weights of it"
        raise UserError(f"{given}: {there}: --kd-checkpoint with weights for {data.num_classes} classes is needed")
    try:
        model = timm.create_model(name, pretrained=not file, num_classes=data.num_classes, in_chans=data.in_chans)
        if file:
            found = read_weights(file, "--kd-checkpoint")
            load_weights(model, found, f"{given} for {data.num_classes} classes: --kd-checkpoint {file!r}")
        teacher = Teacher(model, data).to(device)
        logits = teacher(torch.zeros(1, data.in_chans, *sides(data.img_size), device=device))
    except UserError:
        raise
    except (RuntimeError, OSError, ValueError, LookupError, TypeError, AssertionError) as error:
        reason = first_line(error)
        raise UserError(f"{given} cannot be used on images of {size_text(data.img_size)} px: {reason[:200]}") from None
    if logits.shape != (1, data.num_classes):
        raise UserError(f"{given} gives {list(logits.shape)} for an image: {data.num_classes} logits are expected")
    if recipe.channels_last:
        to_channels_last(teacher)
    return teacher


def distillation_loss(logits: Tensor, taught: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher || student) of logits [B, classes] at the temperature T, the mean over images: a scalar.

    Source: Hinton et al., Distilling the Knowledge in a Neural Network, arXiv 1503.02531, section 2; timm's
    ``LogitDistillationTask`` has the same definition.
    """
    student, teacher = ((z / temperature).log_softmax(1) for z in (logits, taught))
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)
