"""A plain timm model trained from scratch, and the time of one of its steps."""

import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from statistics import fmean
from typing import Any

import torch
from timm.data import Mixup
from timm.utils import ModelEmaV3, random_seed
from torch import nn

from dnas.runtime.checkpoint import checkpoint_errors, load_module, module_data
from dnas.runtime.distributed import from_first, rank
from dnas.spec.recipe import Recipe
from dnas.training.batches import Data
from dnas.training.criterion import Criterion, make_criterion
from dnas.training.freeze import freeze
from dnas.training.loop import cycle, evaluate, learner_data, load_learner, make_learner, steps_per_epoch, train
from dnas.training.onednn_workaround import subsampled
from dnas.training.optimizer import autocast, make_optimizer, to_channels_last


def train_from_scratch(
    model: nn.Module,
    data: Data,
    recipe: Recipe,
    *,
    seed: int,
    on_step: Callable[[Callable[[], dict]], None] | None = None,
    saved: Mapping[str, Any] | None = None,
    first: int = 0,
    criterion: Criterion | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """Train a plain timm model by the recipe. Returns (the trained model, or its EMA; what it reached: `evaluate`).

    The figure is the last epoch's: picking the best epoch would select on the data that is reported.
    ``on_step`` is called after every step with a function that gives the state of the training as plain data, and
    ``saved`` is such a state, to go on from. ``first`` steps count as done: the schedule begins there. ``criterion`` is
    the loss; by default that of the recipe on these data.
    """
    from_first(model.state_dict().values())
    if rank():  # what dropout drops here is not what it drops in the first process
        random_seed(seed, rank())
    if recipe.channels_last:
        to_channels_last(model)
    ema = ModelEmaV3(model, decay=recipe.model_ema_decay, use_warmup=True) if recipe.model_ema_decay else None
    loss_of, mixup = criterion or make_criterion(recipe, data), None
    if recipe.mixup or recipe.cutmix:
        mixup = Mixup(recipe.mixup, recipe.cutmix, label_smoothing=recipe.smoothing, num_classes=data.num_classes)

    started = time.perf_counter()
    freeze(model, recipe.freeze)
    batches = data.train_batches(recipe.batch_size, seed=seed)
    per_epoch = steps_per_epoch(batches, recipe)
    learner = make_learner(model, (p for p in model.parameters() if p.requires_grad), recipe, per_epoch)
    losses: deque[float] = deque(maxlen=per_epoch)
    if first:
        learner.update = first
        learner.scheduler.step_update(first)
    with checkpoint_errors():
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

    for loss in train(lambda x, y: loss_of(model(x), x, y), learner, batches, recipe, mixup=mixup):
        losses.append(loss)
        if ema is not None:
            ema.update(model, step=learner.update - 1)
        if on_step:
            on_step(state)
    final = model if ema is None else ema.module
    scores = evaluate(final, data.val_batches(recipe.batch_size), recipe, data.own_loss)
    seconds = time.perf_counter() - started
    finite = [loss for loss in losses if math.isfinite(loss)]  # the loss of a step that was skipped may be none
    scores["train_loss"] = fmean(finite) if finite else None
    scores["loss"] = scores["loss"] if math.isfinite(scores["loss"]) else None
    skipped = {"skipped": learner.skipped} if learner.skipped else {}
    return final, {**scores, **skipped, "epochs": recipe.epochs, "seconds": round(seconds, 2), "seed": seed}


def time_step(model: nn.Module, data: Data, recipe: Recipe, criterion: Criterion, repeats: int = 3) -> float:
    """Milliseconds of one plain training step of ``model``, its batch included: the median, after one more."""
    device = next(model.parameters()).device
    if recipe.channels_last:
        to_channels_last(model)
    optimizer, seconds = make_optimizer(model.parameters(), recipe), []
    batches, safe = cycle(data.train_batches(recipe.batch_size, seed=0)), subsampled(model, recipe)
    model.train()
    for _ in range(repeats + 1):
        started = time.perf_counter()
        x, y = next(batches)
        if recipe.channels_last:
            x = x.to(memory_format=torch.channels_last)
        with autocast(device, recipe), safe:
            loss = criterion(model(x), x, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return 1e3 * sorted(seconds[1:])[repeats // 2]
