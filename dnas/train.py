"""One ``train`` and one ``evaluate``, for searching and for training from scratch alike, made of timm's parts."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3, random_seed
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

from dnas.checkpoint import load_module, load_optimizer, module_data, of_this_run, optimizer_data
from dnas.data import Batches, Data
from dnas.distributed import average_gradients, from_first, mean, rank, shared_statistics
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
    amp_dtype: str = "auto"
    channels_last: bool = True


# auto: what torch takes on the device, float16 on a GPU and bfloat16 on a CPU.
AMP_DTYPES = {"auto": None, "float16": torch.float16, "bfloat16": torch.bfloat16}


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


def make_learner(
    module: nn.Module, parameters: Iterable[nn.Parameter], recipe: Recipe, updates_per_epoch: int
) -> Learner:
    """Of a training of these parameters of ``module`` that is about to begin. Raises UserError for names timm lacks."""
    optimizer = make_optimizer(parameters, recipe)
    device = optimizer.param_groups[0]["params"][0].device.type
    dtype = AMP_DTYPES[recipe.amp_dtype] or torch.get_autocast_dtype(device)
    scaler = torch.amp.GradScaler(device, enabled=recipe.amp and dtype == torch.float16)
    return Learner(module, optimizer, make_scheduler(optimizer, recipe, updates_per_epoch), scaler)


def learner_data(learner: Learner) -> dict[str, Any]:
    """All of a learner but its module as plain data (see `dnas.checkpoint`)."""
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


MAX_SKIPPED = 25  # steps in a row; float16 needs up to 16 to find its scale


def all_finite(gradients: Iterable[Tensor | None]) -> bool:
    """Whether there is no NaN and no infinity in any of them. Waits for a GPU."""
    return bool(torch.nn.utils.get_total_norm([g for g in gradients if g is not None]).isfinite())


@torch.no_grad()
def _step(learner: Learner, recipe: Recipe, loss: Tensor) -> None:
    """A step of the optimizer, or none if a gradient is not finite: one bad batch must not cost the whole training.

    Statistics of batch norms that such a batch has spoilt start anew. Raises UserError after too many in a row.
    """
    optimizer, scaler = learner.optimizer, learner.scaler
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    scaler.unscale_(optimizer)
    total = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if total.isfinite():
        if recipe.clip_grad:
            nn.utils.clip_grads_with_norm_(parameters, recipe.clip_grad, total)
        scaler.step(optimizer)
        learner.skipped_now = 0
    else:
        learner.skipped, learner.skipped_now = learner.skipped + 1, learner.skipped_now + 1
        norms = (m for m in learner.module.modules() if isinstance(m, nn.BatchNorm2d))
        for norm in norms:
            if norm.running_mean is not None and not all_finite((norm.running_mean, norm.running_var)):
                norm.reset_running_stats()
    scaler.update()
    if learner.skipped_now >= MAX_SKIPPED:
        raise UserError(
            f"the loss is {float(loss)} at step {learner.update}, and {MAX_SKIPPED} steps in a row had gradients that "
            f"are not finite: a lower --lr than {recipe.lr}, or --clip-grad, is needed"
        )


class _Subsampled(TorchFunctionMode):
    """Inside, a narrow 1x1 convolution with a stride takes every n-th pixel first, and has none: the same function.

    With fewer than 16 input channels in channels_last (8 on processors without AVX-512), the backward of a strided one
    writes past a buffer of oneDNN's: gradients may be wrong, and the process dies sooner or later
    (uxlfoundation/oneDNN#6035; torch 2.14).
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.conv2d and len(args) == 7:  # all convolutions of modules are called so
            x, weight, bias, stride, padding, *rest = args
            narrow = weight.shape[1] < 16 and weight.shape[2:] == (1, 1) and padding in (0, (0, 0), "valid")
            if narrow and stride not in (1, (1, 1)):
                rows, columns = stride if isinstance(stride, tuple) else (stride, stride)
                args = (x[..., ::rows, ::columns], weight, bias, 1, 0, *rest)
        return func(*args, **(kwargs or {}))


def subsampled(model: nn.Module, recipe: Recipe) -> AbstractContextManager:
    """What a forward pass that gets a backward one has to be in, for memory to stay whole: see `_Subsampled`."""
    on_cpu = all(p.device.type == "cpu" for p in model.parameters())
    convs = (m for m in model.modules() if isinstance(m, nn.Conv2d))
    strided = any(c.kernel_size == (1, 1) and c.stride != (1, 1) for c in convs)
    return _Subsampled() if on_cpu and recipe.channels_last and strided else nullcontext()


def train(
    forward: Callable[[Tensor], Tensor],
    learner: Learner,
    batches: Batches,
    recipe: Recipe,
    *,
    criterion: Callable[[Tensor, Tensor], Tensor] | None = None,
    mixup: Mixup | None = None,
) -> Iterator[Tensor]:
    """Weight steps from ``learner.update`` to the end of the last epoch; each yields its loss, a scalar.

    What is to come between two steps is the caller's: the search's gates, the EMA, the progress bar.
    ``criterion(forward(images), labels)`` is the loss, by default the recipe's cross entropy. A step whose gradients
    are not finite is skipped; UserError after `MAX_SKIPPED` in a row.
    """
    optimizer, scaler = learner.optimizer, learner.scaler
    criterion = criterion or nn.CrossEntropyLoss(label_smoothing=recipe.smoothing)
    safe = subsampled(learner.module, recipe)
    while learner.update < recipe.epochs * len(batches):
        epoch, taken = divmod(learner.update, len(batches))
        batches.set_epoch(epoch)
        for x, y in batches.starting_at(taken):
            if mixup is not None:
                even = len(x) // 2 * 2  # timm mixes images in pairs
                x, y = mixup(x[:even], y[:even])
            if recipe.channels_last:
                x = x.to(memory_format=torch.channels_last)
            with autocast(x.device, recipe), shared_statistics(), safe:
                loss = criterion(forward(x).float(), y)
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            average_gradients(p for group in optimizer.param_groups for p in group["params"])
            _step(learner, recipe, loss)
            learner.update += 1
            learner.scheduler.step_update(learner.update)
            loss = mean(loss.detach())  # frees the graph: what follows may change the shape of parameters
            yield loss


def cycle(batches: Batches, taken: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches for ever, a new epoch number each time round; ``taken`` of them have been seen already."""
    while True:
        epoch, done = divmod(taken, len(batches))
        batches.set_epoch(epoch)
        for pair in batches.starting_at(done):
            taken += 1
            yield pair


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], recipe: Recipe) -> dict[str, float]:
    """``{"top1": percent, "loss": mean cross entropy}`` in eval mode; the training mode is restored."""
    was_training, sums = model.training, torch.zeros(3, dtype=torch.float64)  # right ones, loss, images
    model.eval()
    try:
        for x, y in batches:
            if recipe.channels_last:
                x = x.to(memory_format=torch.channels_last)
            with autocast(x.device, recipe):
                logits = model(x).float()
            loss = nn.functional.cross_entropy(logits, y, reduction="sum")
            sums += torch.stack([(logits.argmax(1) == y).sum(), loss, loss.new_tensor(len(y))]).double().cpu()
    finally:
        model.train(was_training)
    right, total, count = mean(sums).tolist()
    return {"top1": 100 * right / count, "loss": total / count}


def train_from_scratch(
    model: nn.Module,
    data: Data,
    recipe: Recipe,
    *,
    seed: int,
    on_step: Callable[[Callable[[], dict]], None] | None = None,
    saved: Mapping[str, Any] | None = None,
) -> tuple[nn.Module, dict[str, float]]:
    """Train a plain timm model by the recipe. Returns (the trained model, or its EMA; what it reached).

    The figure is the last epoch's: picking the best epoch would select on the data that is reported.
    ``on_step`` is called after every step with a function that gives the state of the training as plain data, and
    ``saved`` is such a state, to go on from.
    """
    from_first(model.state_dict().values())
    if rank():  # what dropout drops here is not what it drops in the first process
        random_seed(seed, rank())
    if recipe.channels_last:
        model.to(memory_format=torch.channels_last)
    ema = ModelEmaV3(model, decay=recipe.model_ema_decay, use_warmup=True) if recipe.model_ema_decay else None
    criterion: nn.Module | None = None
    mixup = None
    if recipe.mixup or recipe.cutmix:
        mixup = Mixup(recipe.mixup, recipe.cutmix, label_smoothing=recipe.smoothing, num_classes=data.num_classes)
        criterion = SoftTargetCrossEntropy()

    started = time.perf_counter()
    model.train()
    batches = data.train_batches(recipe.batch_size, seed=seed)
    learner = make_learner(model, model.parameters(), recipe, len(batches))
    losses: deque[Tensor] = deque(maxlen=len(batches))
    with of_this_run():
        if saved:
            load_module(model, saved["model"])
            load_learner(learner, saved["learner"])
            if ema is not None:
                load_module(ema.module, saved["ema"])
            losses.extend(saved["losses"])
            started -= saved["seconds"]

    def state() -> dict[str, Any]:
        return {
            "model": module_data(model),
            "learner": learner_data(learner),
            "ema": module_data(ema.module) if ema is not None else {},
            "losses": [*losses],
            "seconds": time.perf_counter() - started,
        }

    for loss in train(model, learner, batches, recipe, criterion=criterion, mixup=mixup):
        losses.append(loss)
        if ema is not None:
            ema.update(model, step=learner.update - 1)
        if on_step:
            on_step(state)
    final = model if ema is None else ema.module
    scores = evaluate(final, data.val_batches(max(recipe.batch_size, 256)), recipe)
    seconds = time.perf_counter() - started
    scores["train_loss"] = float(torch.stack([*losses]).mean())
    skipped = {"skipped": learner.skipped} if learner.skipped else {}
    return final, {**scores, **skipped, "epochs": recipe.epochs, "seconds": round(seconds, 2), "seed": seed}


def time_step(model: nn.Module, data: Data, recipe: Recipe, repeats: int = 3) -> float:
    """Milliseconds of one plain training step of ``model``, its batch included: the median, after one more."""
    device = next(model.parameters()).device
    if recipe.channels_last:
        model.to(memory_format=torch.channels_last)
    optimizer, seconds = make_optimizer(model.parameters(), recipe), []
    batches, safe = cycle(data.train_batches(recipe.batch_size, seed=0)), subsampled(model, recipe)
    model.train()
    for _ in range(repeats + 1):
        started = time.perf_counter()
        x, y = next(batches)
        if recipe.channels_last:
            x = x.to(memory_format=torch.channels_last)
        with autocast(device, recipe), safe:
            loss = nn.functional.cross_entropy(model(x).float(), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return 1e3 * sorted(seconds[1:])[repeats // 2]
