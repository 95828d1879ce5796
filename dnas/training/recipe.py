"""How weights are trained: the recipe, and timm's optimizer and schedule for it."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.optim import Optimizer

from dnas.spec.checks import UserError


@dataclass(frozen=True)
class Recipe:
    """How weights are trained: the flags of the command line, with timm's names and meanings.

    ``model_ema_decay`` 0: no EMA. Raises UserError for a number or a name that makes no sense, naming the flag.
    """

    epochs: int = 10
    batch_size: int = 64
    opt: str = "adamw"
    lr: float = 5e-3
    weight_decay: float = 0.05
    sched: str = "cosine"
    warmup_epochs: int = 2
    min_lr: float = 1e-5
    smoothing: float = 0.1
    mixup: float = 0.0
    cutmix: float = 0.0
    drop: float = 0.0
    drop_path: float = 0.0
    model_ema_decay: float = 0.0
    clip_grad: float = 0.0
    amp: bool = False
    amp_dtype: str = "auto"
    channels_last: bool = True

    def __post_init__(self) -> None:
        for name, low, high in (
            ("epochs", 1, 100_000), ("batch_size", 2, 65536), ("lr", 1e-9, 1e3), ("weight_decay", 0, 10),
            ("min_lr", 0, 1e3),
            ("smoothing", 0, 0.99), ("mixup", 0, 10), ("cutmix", 0, 10), ("drop", 0, 0.99), ("drop_path", 0, 0.99),
            ("model_ema_decay", 0, 0.999999), ("warmup_epochs", 0, 100_000), ("clip_grad", 0, 1e6),
        ):  # fmt: skip
            value = getattr(self, name)
            if not low <= value <= high:
                raise UserError(f"--{name.replace('_', '-')} {value} is not between {low} and {high}")
        if self.amp_dtype not in AMP_DTYPES:
            raise UserError(f"--amp-dtype {self.amp_dtype!r} is not one of {', '.join(AMP_DTYPES)}")
        make_scheduler(make_optimizer([nn.Parameter(torch.zeros(1))], self), self, 1)  # do their names exist?


# auto: what torch takes on the device, float16 on a GPU and bfloat16 on a CPU.
AMP_DTYPES = {"auto": None, "float16": torch.float16, "bfloat16": torch.bfloat16}


def make_optimizer(parameters: Iterable[nn.Parameter], recipe: Recipe) -> Optimizer:
    """timm's optimizer ``recipe.opt``; norms and biases are not decayed. Raises UserError for a name it lacks."""
    parameters = list(parameters)
    if recipe.opt.lower().startswith("adahessian"):
        raise UserError(f"--opt {recipe.opt!r} needs second derivatives, which are not computed here")
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
    """timm's schedule over exactly ``recipe.epochs``, stepped after every update. Raises UserError for its name."""
    if recipe.sched not in ("cosine", "tanh", "step", "poly"):
        raise UserError(f"--sched {recipe.sched!r} is not one of cosine, tanh, step, poly")
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


def autocast(device: torch.device, recipe: Recipe) -> torch.autocast:
    """The automatic mixed precision that the recipe asks for; does nothing without ``amp``."""
    return torch.autocast(device.type, AMP_DTYPES[recipe.amp_dtype], enabled=recipe.amp)
