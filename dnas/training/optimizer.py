"""timm's optimizer and schedule for a recipe, and its mixed precision."""

from collections.abc import Iterable

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.optim import Optimizer

from dnas.spec.checks import UserError
from dnas.spec.recipe import Recipe


def make_optimizer(parameters: Iterable[nn.Parameter], recipe: Recipe) -> Optimizer:
    """timm's optimizer ``recipe.opt``; norms and biases are not decayed. Raises UserError for a name it lacks."""
    parameters = list(parameters)
    if recipe.opt.lower().startswith("adahessian"):
        raise UserError(f"--opt {recipe.opt!r} needs second derivatives, which are not computed here")
    if recipe.opt.lower().startswith("lookahead"):
        raise UserError(f"--opt {recipe.opt!r} keeps its state where a cut or a checkpoint cannot find it")
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    try:
        return create_optimizer_v2(groups, opt=recipe.opt, lr=recipe.lr, weight_decay=recipe.weight_decay)
    except (ValueError, AssertionError, KeyError):
        raise UserError(f"--opt {recipe.opt!r} is not an optimizer that timm knows, such as sgd, adamw, lamb") from None


def make_scheduler(optimizer: Optimizer, recipe: Recipe, updates_per_epoch: int) -> Scheduler:
    """timm's schedule over exactly ``recipe.epochs``, stepped after every update."""
    warmup = min(recipe.warmup_epochs, recipe.epochs - 1)
    scheduler, _ = create_scheduler_v2(
        optimizer,
        recipe.sched,
        num_epochs=recipe.epochs,
        decay_epochs=max(1, recipe.epochs // 3),
        warmup_epochs=warmup,
        warmup_lr=recipe.lr / 20,
        warmup_prefix=False,
        min_lr=min(recipe.min_lr, recipe.lr),
        cooldown_epochs=0,
        step_on_epochs=False,
        updates_per_epoch=updates_per_epoch,
    )
    return scheduler


def to_channels_last(module: nn.Module) -> nn.Module:
    """The same module, its tensors of four dimensions in this layout: torch's own ``to`` fails at those of five."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.ndim == 4:
            tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
    return module


def amp_dtype(device: torch.device, recipe: Recipe) -> torch.dtype:
    """What mixed precision computes in; ``auto`` is what torch takes on the device."""
    return torch.get_autocast_dtype(device.type) if recipe.amp_dtype == "auto" else getattr(torch, recipe.amp_dtype)


def autocast(device: torch.device, recipe: Recipe) -> torch.autocast:
    """The automatic mixed precision that the recipe asks for; does nothing without ``amp``."""
    return torch.autocast(device.type, amp_dtype(device, recipe), enabled=recipe.amp)
