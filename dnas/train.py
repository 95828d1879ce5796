"""One ``train`` and one ``evaluate``, for searching and for training from scratch alike, made of timm's parts."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim import Optimizer

from dnas.data import Batches, Data
from dnas.units import UserError


@dataclass(frozen=True)
class Recipe:
    """How weights are trained: the tools' flags, with timm's names and meanings. ``model_ema_decay`` 0: no EMA."""

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
    amp_dtype: str = "float16"
    channels_last: bool = True


AMP_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def check_recipe(recipe: Recipe) -> Recipe:
    """``recipe`` itself if every number makes sense. Raises UserError naming the flag."""
    for name, low, high in (
        ("epochs", 1, 100_000), ("batch_size", 2, 65536), ("lr", 1e-9, 1e3), ("weight_decay", 0, 10),
        ("min_lr", 0, 1e3),
        ("smoothing", 0, 0.99), ("mixup", 0, 10), ("cutmix", 0, 10), ("drop", 0, 0.99), ("drop_path", 0, 0.99),
        ("model_ema_decay", 0, 0.999999), ("warmup_epochs", 0, 100_000), ("clip_grad", 0, 1e6),
    ):  # fmt: skip
        value = getattr(recipe, name)
        if not low <= value <= high:
            raise UserError(f"--{name.replace('_', '-')} {value} is not between {low} and {high}")
    if recipe.amp_dtype not in AMP_DTYPES:
        raise UserError(f"--amp-dtype {recipe.amp_dtype!r} is not one of {', '.join(AMP_DTYPES)}")
    make_scheduler(make_optimizer([nn.Parameter(torch.zeros(1))], recipe), recipe, 1)  # do their names exist?
    return recipe


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


def train(
    forward: Callable[[Tensor], Tensor],
    optimizer: Optimizer,
    batches: Batches,
    recipe: Recipe,
    *,
    criterion: Callable[[Tensor, Tensor], Tensor] | None = None,
    mixup: Mixup | None = None,
    after_step: Callable[[int, Tensor], None] | None = None,
) -> float:
    """All epochs of weight steps; the last one's mean loss. Raises UserError if training diverged.

    ``criterion(forward(images), labels)`` is the loss, by default the recipe's cross entropy.
    ``after_step(update, loss)`` comes after each step: the search's gates, the EMA, the progress bar.
    """
    scheduler = make_scheduler(optimizer, recipe, len(batches))
    criterion = criterion or nn.CrossEntropyLoss(label_smoothing=recipe.smoothing)
    scales = recipe.amp and recipe.amp_dtype == "float16"
    scaler = torch.amp.GradScaler(optimizer.param_groups[0]["params"][0].device.type, enabled=scales)
    losses: list[Tensor] = []
    for epoch in range(recipe.epochs):
        batches.set_epoch(epoch)
        losses.clear()
        for k, (x, y) in enumerate(batches):
            update = epoch * len(batches) + k
            if mixup is not None:
                even = len(x) // 2 * 2  # timm mixes images in pairs
                x, y = mixup(x[:even], y[:even])
            if recipe.channels_last:
                x = x.to(memory_format=torch.channels_last)
            with autocast(x.device, recipe):
                loss = criterion(forward(x).float(), y)
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            if recipe.clip_grad:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], recipe.clip_grad)
            scaler.step(optimizer)
            scaler.update()
            scheduler.step_update(update + 1)
            loss = loss.detach()  # frees the graph: what follows may change the shape of parameters
            losses.append(loss)
            if after_step:
                after_step(update, loss)
        if not losses[-1].isfinite():
            given = f"the loss is {float(losses[-1])} after epoch {epoch}"
            raise UserError(f"{given}: a lower --lr than {recipe.lr} is needed")
    return float(torch.stack(losses).mean())


def cycle(batches: Batches) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches for ever, a new epoch number each time round."""
    epoch = 0
    while True:
        batches.set_epoch(epoch)
        yield from batches
        epoch += 1


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], recipe: Recipe) -> dict[str, float]:
    """``{"top1": percent, "loss": mean cross entropy}`` in eval mode; the training mode is restored."""
    was_training, right, loss, count = model.training, 0.0, 0.0, 0
    model.eval()
    try:
        for x, y in batches:
            if recipe.channels_last:
                x = x.to(memory_format=torch.channels_last)
            with autocast(x.device, recipe):
                logits = model(x).float()
            right += float((logits.argmax(1) == y).sum())
            loss += float(nn.functional.cross_entropy(logits, y, reduction="sum"))
            count += len(y)
    finally:
        model.train(was_training)
    return {"top1": 100 * right / count, "loss": loss / count}


def train_from_scratch(
    model: nn.Module, data: Data, recipe: Recipe, *, seed: int, on_step: Callable[[int, Tensor], None] | None = None
) -> tuple[nn.Module, dict[str, float]]:
    """Train a plain timm model by the recipe. Returns (the trained model, or its EMA; what it reached).

    The figure is the last epoch's: picking the best epoch would select on the data that is reported.
    """
    if recipe.channels_last:
        model.to(memory_format=torch.channels_last)
    ema = ModelEmaV3(model, decay=recipe.model_ema_decay, use_warmup=True) if recipe.model_ema_decay else None
    criterion: nn.Module | None = None
    mixup = None
    if recipe.mixup or recipe.cutmix:
        mixup = Mixup(recipe.mixup, recipe.cutmix, label_smoothing=recipe.smoothing, num_classes=data.num_classes)
        criterion = SoftTargetCrossEntropy()

    def after_step(update: int, loss: Tensor) -> None:
        if ema is not None:
            ema.update(model, step=update)
        if on_step:
            on_step(update, loss)

    started = time.perf_counter()
    model.train()
    batches, optimizer = data.train_batches(recipe.batch_size, seed=seed), make_optimizer(model.parameters(), recipe)
    loss = train(model, optimizer, batches, recipe, criterion=criterion, mixup=mixup, after_step=after_step)
    final = model if ema is None else ema.module
    scores = evaluate(final, data.val_batches(max(recipe.batch_size, 256)), recipe)
    seconds = time.perf_counter() - started
    return final, {**scores, "train_loss": loss, "epochs": recipe.epochs, "seconds": round(seconds, 2), "seed": seed}


def time_step(model: nn.Module, data: Data, recipe: Recipe, repeats: int = 3) -> float:
    """Milliseconds of one plain training step of ``model``, its batch included: the median, after one more."""
    device = next(model.parameters()).device
    if recipe.channels_last:
        model.to(memory_format=torch.channels_last)
    optimizer, seconds = make_optimizer(model.parameters(), recipe), []
    batches = cycle(data.train_batches(recipe.batch_size, seed=0))
    model.train()
    for _ in range(repeats + 1):
        started = time.perf_counter()
        x, y = next(batches)
        if recipe.channels_last:
            x = x.to(memory_format=torch.channels_last)
        with autocast(device, recipe):
            loss = nn.functional.cross_entropy(model(x).float(), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return 1e3 * sorted(seconds[1:])[repeats // 2]
