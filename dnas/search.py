"""The search: weights learn on hard nets, gates on held-out images, dead parts are cut off while both go on."""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from dnas.cost import CostTable
from dnas.data import Data
from dnas.objective import budget_penalty, ramp, target
from dnas.prunode import PairGate
from dnas.stochastic import ChoiceGate, SkipGate
from dnas.supernet import Supernet
from dnas.surgery import shrink
from dnas.train import Recipe, autocast, cycle, make_optimizer, train
from dnas.units import Budget, UserError


@dataclass(frozen=True)
class SearchConfig:
    """Everything about a search beyond the weights' `Recipe`. Times are shares of the whole search, in [0, 1].

    ``gate_lr`` 0 means: such that a logit can travel 20 over all gate steps, within [0.01, 0.3].
    """

    gate_fraction: float = 0.3  # of the training images, held out for the gates; 0: the gates see the weights' images
    gate_every: int = 2  # weight steps to a gate step
    gate_lr: float = 0.0
    paths: int = 2  # candidate blocks mixed in a gate step
    weights_on: str = "hard"  # nets that the weights learn on: "hard", "soft" or "sandwich"
    entropy: float = 0.0  # weight of the gates' mean entropy at the end of the search; it grows from 0
    budget_weight: float = 20.0
    warmup: float = 0.2  # weights only, nets drawn evenly
    budget_from: float = 0.2  # the target leaves the starting cost ...
    budget_by: float = 0.7  # ... and has reached the budget
    block_from: float = 0.25  # the threshold on blocks rises from 0 ...
    block_by: float = 0.8  # ... to 1/2
    skip_at: float = 0.2  # layers get their skip; the threshold on them rises from 0 to 1/2 from here to the end
    skip_from: float = 0.9  # the coefficient that they begin with
    temperature: float = 0.3  # at the end; 1 until the budget is reached half-way
    width_below: float = 0.05
    patience: int = 5


WEIGHTS_ON = ("hard", "soft", "sandwich")


def check_config(config: SearchConfig) -> SearchConfig:
    """``config`` itself if every number makes sense. Raises UserError naming the flag."""
    shares = ("warmup", "budget_from", "budget_by", "block_from", "block_by", "skip_at")
    for name, low, high in (
        ("gate_fraction", 0, 0.9), ("gate_every", 1, 10_000), ("gate_lr", 0, 10), ("paths", 2, 64),
        ("skip_from", 0.51, 0.9999),
        ("patience", 1, 10**6), ("budget_weight", 0, 1e6), ("temperature", 0.01, 10), ("width_below", 0, 0.5),
        ("entropy", 0, 1e3),
        *((name, 0, 1) for name in shares),
    ):  # fmt: skip
        if not low <= getattr(config, name) <= high:
            raise UserError(f"--{name.replace('_', '-')} {getattr(config, name)} is not between {low} and {high}")
    if config.weights_on not in WEIGHTS_ON:
        raise UserError(f"--weights-on {config.weights_on!r} is not one of {', '.join(WEIGHTS_ON)}")
    for first, then in (("budget_from", "budget_by"), ("block_from", "block_by")):
        if getattr(config, first) > getattr(config, then):
            raise UserError(f"--{first.replace('_', '-')} must not come after --{then.replace('_', '-')}")
    return config


def check_length(steps: int, config: SearchConfig) -> None:
    """Raise UserError if a search of so many weight steps has no gate step."""
    if not any(update / steps >= config.warmup for update in range(0, steps, config.gate_every)):
        given = f"--warmup {config.warmup} and --gate-every {config.gate_every}"
        raise UserError(
            f"the gates learn nothing in {steps} steps with {given}: more epochs or smaller values are needed"
        )


def live_tables(net: Supernet, tables: Mapping[str, CostTable]) -> dict[str, CostTable]:
    """The tables without the blocks that were removed."""
    gone = {d.name for d in net.space.decisions} - set(net.gates())
    return {metric: table.without(gone) for metric, table in tables.items()}


def live_cost(net: Supernet, table: CostTable) -> float:
    """Cost of the dearest network that is physically still there: its live widths, blocks and layers."""
    live = net.live_options()
    for name, gate in net.gates().items():
        if isinstance(gate, PairGate):
            live[name] = live[name][: gate.high + 1]
    return table.of(table.extremes(live)[1])


def mean_entropy(distributions: Iterable[Tensor]) -> Tensor:
    """Mean over gates of the entropy of their distributions, in nats."""
    return torch.stack([torch.special.entr(p).sum() for p in distributions]).mean()


def distilled_loss(logits: Tensor, y: Tensor, smoothing: float) -> Tensor:
    """Cross entropy of the first [B] rows of ``logits`` [k * B, classes]; every further [B] rows learn from those."""
    widest, *others = logits.split(len(y))
    teacher = widest.detach().softmax(1)
    loss = F.cross_entropy(widest, y, label_smoothing=smoothing)
    return loss + sum(F.cross_entropy(other, teacher) for other in others)


def check_gradients(net: Supernet, step: int) -> None:
    """RuntimeError if an open gate got no gradient: a search with dead gates would end as it began, in silence."""
    for name, gate in net.gates().items():
        if isinstance(gate, SkipGate):
            settled = gate.is_removed or not gate.is_open
        else:
            settled = isinstance(gate, ChoiceGate) and len(gate.live) == 1
        for p in () if settled else gate.parameters():
            if p.numel() and (p.grad is None or not bool((p.grad != 0).all()) or not bool(p.grad.isfinite().all())):
                raise RuntimeError(
                    f"the gate of {name} gets no gradient at step {step}: nothing can be learnt about it"
                )


def search(
    net: Supernet,
    tables: Mapping[str, CostTable],
    budgets: Sequence[Budget],
    data: Data,
    recipe: Recipe,
    config: SearchConfig,
    *,
    seed: int,
    on_row: Callable[[dict], None],
) -> None:
    """Train ``net``'s weights and gates in place until the gates agree with the budgets; ``on_row`` gets every step.

    Validation images are not touched. A step is a weight step and, after the warm-up, every ``gate_every`` times a gate
    step (soft gates, held-out images, cross entropy plus budget penalty) followed by shrinking. By ``weights_on``,
    weights learn on hard nets, in turn the widest and one drawn; on the soft net that the gates see; or on the widest,
    the narrowest and a drawn one together, the others taught by the widest (the sandwich rule, arXiv 1903.05134).
    """
    if net.space.num_archs() < 2:
        raise UserError(f"nothing can be searched: every decision of the space {net.name} has one option only")
    device = next(net.parameters()).device
    rest, held_out = data.split(config.gate_fraction, seed) if config.gate_fraction else (None, None)
    batches = data.train_batches(recipe.batch_size, seed=seed, indices=rest)
    gate_batches = cycle(data.train_batches(recipe.batch_size, seed=seed + 1, indices=held_out))
    total = recipe.epochs * len(batches)
    check_length(total, config)
    gate_steps = max(1.0, total * (1 - config.warmup) / config.gate_every)
    optimizer = make_optimizer(net.weight_parameters(), recipe)
    gate_lr = config.gate_lr or min(0.3, max(0.01, 20 / gate_steps))
    gate_optimizer = torch.optim.Adam(net.gate_parameters(), lr=gate_lr, betas=(0.5, 0.99))
    draws = torch.Generator().manual_seed(seed)
    limits = {b.metric: b.limit for b in budgets}
    current = live_tables(net, tables)
    first = {m: float(current[m].expected(net.probabilities()).detach()) for m in limits}
    live = live_cost(net, tables["macs"])
    updates, gates_taught, clock = 0, 0, time.perf_counter()

    def may_end_with(options: Mapping[str, Sequence[int]]) -> bool:
        ends = {m: [tables[m].of(a) for a in tables[m].extremes(options)] for m in limits}
        return all(ends[m][0] <= limits[m] for m in limits) and any(ends[m][1] >= limits[m] for m in limits)

    def forward(x: Tensor) -> Tensor:
        even = updates / total < config.warmup
        if config.weights_on == "soft":
            return net(x, net.soft(draws, config.paths))
        if config.weights_on == "sandwich":
            return torch.cat([net(x, a) for a in (net.widest(draws), net.narrowest(draws), net.draw(draws, even))])
        return net(x, net.widest(draws) if updates % 2 == 0 else net.draw(draws, even))

    def teach_gates(t: float) -> dict:
        """One step of the gates on held-out images. Returns its row; its graph is gone when shrinking starts."""
        sharpness = ramp(t, (config.budget_from + config.budget_by) / 2, 1.0)
        cooled = config.temperature**sharpness
        checking = gates_taught == 0
        for gate in net.gates().values():
            gate.temperature = cooled
            if isinstance(gate, SkipGate) and not gate.is_open and t >= config.skip_at:
                gate.open(config.skip_from)
                checking = True
        progress = ramp(t, config.budget_from, config.budget_by)
        targets = {m: target(first[m], limits[m], progress) for m in limits}
        x, y = next(gate_batches)
        if recipe.channels_last:
            x = x.to(memory_format=torch.channels_last)
        weights = net.weight_parameters()
        for p in weights:
            p.requires_grad_(False)
        with autocast(device, recipe):
            logits = net(x, net.soft(draws, 0 if checking else config.paths)).float()
        loss = F.cross_entropy(logits, y)
        probabilities = net.probabilities()
        expected = {m: current[m].expected(probabilities) for m in limits}
        total_loss = loss + config.budget_weight * budget_penalty(expected, targets)
        if config.entropy:
            total_loss = total_loss + config.entropy * sharpness * mean_entropy(probabilities.values())
        gate_optimizer.zero_grad()
        total_loss.backward()
        for p in weights:
            p.requires_grad_(True)
        if checking:  # all live blocks were mixed, so that every gate can show a gradient
            check_gradients(net, updates)
        gate_optimizer.step()
        return {
            "images": len(x),
            "gate_loss": float(loss.detach()),
            "expected": {m: float(e.detach()) for m, e in expected.items()},
            "target": targets,
        }

    def after_step(update: int, loss: Tensor) -> None:
        nonlocal updates, gates_taught, clock, live, current
        row: dict = {"step": update, "loss": float(loss)}
        if not math.isfinite(row["loss"]):
            raise UserError(f"the loss is {row['loss']} at step {update}: a lower --lr than {recipe.lr} is needed")
        t, weights_done = update / total, time.perf_counter()
        row["weight_ms"] = 1e3 * (weights_done - clock)
        if t >= config.warmup and update % config.gate_every == 0:
            row |= teach_gates(t)
            taught = time.perf_counter()
            row["events"] = shrink(
                net, (optimizer, gate_optimizer), may_end_with,
                move_above=0.9 - 0.2 * t, block_below=0.5 * ramp(t, config.block_from, config.block_by),
                layer_below=0.5 * ramp(t, config.skip_at, 1.0), width_below=config.width_below,
                patience=config.patience,
            )  # fmt: skip
            gates_taught += 1
            if row["events"]:
                current = live_tables(net, tables)
                live = live_cost(net, tables["macs"])
                row["shrink_ms"] = 1e3 * (time.perf_counter() - taught)
            row["gate_ms"] = 1e3 * (time.perf_counter() - weights_done)
        row["live_macs"] = live
        updates = update + 1
        on_row(row)
        clock = time.perf_counter()

    net.train()
    criterion = partial(distilled_loss, smoothing=recipe.smoothing)
    train(forward, optimizer, batches, recipe, criterion=criterion, after_step=after_step)
