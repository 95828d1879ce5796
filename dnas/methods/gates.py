"""The method ``gates``: weights learn on hard nets, gates on held-out images. Unlikely options are cut off meanwhile.

Sources: PruNet (arXiv 2209.11785) for blocks, layers and the inner widths of bi-path blocks, DMCP (CVPR 2020) for all
other widths.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer

from dnas.methods.budget_loss import budget_penalty, ramp, target
from dnas.methods.derive import derive, gate_likelihood
from dnas.methods.method import HeldOut, Method, Search, Task
from dnas.methods.rules import balanced_arch
from dnas.methods.settings import GatesConfig
from dnas.nets.layer_choice import SkipGate
from dnas.nets.markov_gate import MarkovGate
from dnas.nets.shrink import cut_width, shrink
from dnas.nets.supernet import Supernet
from dnas.runtime.checkpoint import load_optimizer, optimizer_data
from dnas.runtime.distributed import average_gradients, from_first, mean, shared_statistics, to_host, world_size
from dnas.spec.checks import UserError
from dnas.spec.cost import CostTable
from dnas.spec.space import Arch, Space
from dnas.training.loop import MAX_SKIPPED, make_scaler
from dnas.training.onednn_workaround import subsampled
from dnas.training.optimizer import autocast


@dataclass
class GatesState:
    """The state of this method outside the supernet. The supernet holds the gates."""

    optimizer: Optimizer
    scaler: torch.amp.GradScaler
    draws: torch.Generator
    first: dict[str, float]  # metric -> expected cost at the start
    steps: int  # of the whole search
    taught: int = 0  # gate steps so far
    skipped: int = 0  # gate steps in a row, because gradients were not finite
    temperature: float = 1.0
    tables: tuple[Any, dict[str, CostTable]] = ((), {})  # (names that they depend on, `live_tables`)


def check_length(steps: int, config: GatesConfig) -> None:
    """Raise UserError if a search of ``steps`` weight steps has no gate step."""
    if not any(update / steps >= config.warmup for update in range(0, steps, config.gate_every)):
        given = f"--warmup {config.warmup} and --gate-every {config.gate_every}"
        raise UserError(
            f"the gates learn nothing in {steps} steps with {given}: more epochs or smaller values are needed"
        )


def init(net: Supernet, task: Task) -> GatesState:
    """The state at the start of a search. Raises UserError if the search is too short for a gate step."""
    config: GatesConfig = task.config
    steps = task.steps(config.gate_fraction)
    check_length(steps, config)
    gate_steps = max(1.0, steps * (1 - config.warmup) / config.gate_every)
    gate_lr = config.gate_lr or min(0.3, max(0.01, 20 / gate_steps))
    return GatesState(
        torch.optim.Adam(net.gate_parameters(), lr=gate_lr, betas=(0.5, 0.99)),
        make_scaler(next(net.parameters()).device, task.recipe),
        torch.Generator().manual_seed(task.seed),
        expected_costs(net, task),
        steps,
    )


def expected_costs(net: Supernet, task: Task) -> dict[str, float]:
    """Metric -> the expected cost now."""
    return {m: float(table.expected(net.probabilities()).detach()) for m, table in task.tables.items()}


def weight_loss(search: Search, task: Task, x: Tensor, y: Tensor, progress: float) -> Tensor:
    """The loss of a weight step, a scalar.

    ``weights_on`` says which nets the weights learn on:

    * ``hard``: in turn the widest net (with drawn blocks) and a drawn net;
    * ``soft``: the soft net that the gates see.
    """
    net, draws, config = search.net, search.own.draws, task.config
    even, at = progress < config.warmup, {"temperature": search.own.temperature}
    if config.weights_on == "soft":
        logits = net(x, net.soft(draws, config.paths, **at, with_scale=config.scale_in_gradient))
    else:
        widest = search.learner is not None and search.learner.update % 2 == 0
        logits = net(x, net.widest(draws, **at) if widest else net.draw(draws, even, **at))
    return task.criterion(logits.float(), x, y)


def check_gradients(net: Supernet, step: int) -> None:
    """Raise RuntimeError if an open gate got no gradient, or one with entries that are zero or not finite.

    A search with such a gate would go on, and would learn nothing about this decision.
    """
    for name, gate in net.gates().items():
        for p in () if gate.settled else gate.parameters():
            if p.numel() and (p.grad is None or not bool((p.grad != 0).all()) or not bool(p.grad.isfinite().all())):
                raise RuntimeError(
                    f"the gate of {name} gets no gradient at step {step}: nothing can be learnt about it"
                )


def log_widths(space: Space, probabilities: Mapping[str, Tensor]) -> Tensor:
    """The sum over widths of the expected log width, a float64 scalar. It is largest for balanced widths.

    A width is weighted by the probability that its block and layer are there. This weight gets no gradient, because
    otherwise blocks and layers with more widths would be preferred.
    """
    seen = {name: p.detach().numpy() for name, p in probabilities.items()}
    total = torch.zeros((), dtype=torch.float64)
    for name, p in probabilities.items():
        d = space.by_name[name]
        if d.is_width:
            there = math.prod(seen[n][space.by_name[n].index(o)] for n, o in d.when if n in seen)
            total = total + there * (p @ torch.from_numpy(np.log(d.options)))
    return total


SNAPSHOTS = 100  # of the gates, over a whole search


def snapshot(net: Supernet, temperature: float) -> dict[str, float | list[float]]:
    """The state of every gate: the expected width, or the probabilities of its options."""
    found: dict[str, float | list[float]] = {}
    for name, p in net.seen(temperature).items():
        decision, shares = net.space.by_name[name], p.tolist()
        if decision.is_width:
            found[name] = sum(width * share for width, share in zip(decision.options, shares, strict=True))
        else:
            found[name] = shares
    return found


def along_scale(logits: Tensor, y: Tensor, weights: Tensor | None, total: float | Tensor) -> Tensor:
    """A scalar whose gradient is the part of the cross entropy's gradient along all ``logits`` [B, classes].

    The logits of all processes count as one vector. The cross entropy is a sum over images, with the ``weights`` of
    their classes, divided by ``total``. A loss without this part gives a network nothing for being less confident.
    """
    z = logits.detach()
    w = 1.0 if weights is None else weights[y][:, None]
    slope = ((w * z.softmax(1) * z).sum() - (w * z.gather(1, y[:, None])).sum()) / total
    slope, square = mean(torch.stack([slope, z.square().sum()]))
    return slope / square.clamp(min=torch.finfo(z.dtype).tiny) * logits.square().sum() / 2


def image_loss(
    search: Search, task: Task, paths: int, x: Tensor, y: Tensor, parts: int, taken: int, p: Mapping[str, np.ndarray]
) -> tuple[Tensor, int]:
    """The backward passes of the gates' cross entropy on ``taken`` of ``parts`` parts of a batch, one after the other.

    So a mixture of blocks needs the memory of one block. The images are weighted by their classes, as in
    `dnas.training.criterion.cross_entropy`. ``p`` are the gates' probabilities. Gradients are scaled by
    `GatesState.scaler`. Returns (the mean loss, a scalar; the number of images).
    """
    net, own, recipe = search.net, search.own, task.recipe
    soft = partial(net.soft, own.draws, paths, own.temperature, p, task.config.scale_in_gradient)
    device, safe = x.device, subsampled(net, recipe)
    chosen = [(x[k::parts], y[k::parts]) for k in range(taken)]
    seen, losses = sum(len(labels) for _, labels in chosen), []
    total: float | Tensor = seen
    if (weights := task.class_weights) is not None:
        weights = weights.to(device)
        total = mean(weights[torch.cat([labels for _, labels in chosen])].sum())
    for images, labels in chosen:
        if recipe.channels_last:
            images = images.to(memory_format=torch.channels_last)
        with autocast(device, recipe), shared_statistics(), safe:
            logits = net(images, soft()).float()
        losses.append(F.cross_entropy(logits, labels, weights, reduction="sum") / total)
        asked = losses[-1] if task.config.confidence else losses[-1] - along_scale(logits, labels, weights, total)
        scaled = own.scaler.scale(asked)
        if scaled.requires_grad:  # False if every gate is settled
            scaled.backward()
    return torch.stack(losses).detach().sum(), seen


def gate_step(search: Search, task: Task, progress: float, held_out: HeldOut) -> dict[str, Any]:
    """One step of the gates on held-out images: cross entropy of soft nets, plus the distance to the budget.

    The settings may add the prior of balanced widths. Returns entries of the row in the history.
    Raises UserError if `MAX_SKIPPED` steps in a row had gradients that are not finite.
    """
    net, own, config = search.net, search.own, task.config
    sharpness = ramp(progress, (config.budget_from + config.budget_by) / 2, 1.0)
    own.temperature = config.temperature**sharpness
    checking = own.taught == 0
    for gate in net.gates().values() if progress >= config.skip_at else ():
        if isinstance(gate, SkipGate) and not gate.is_open:
            gate.open(config.skip_from, own.temperature)
            checking = True
    fallen = ramp(progress, config.budget_from, config.budget_by)
    targets = {m: target(own.first[m], limit, fallen) for m, limit in task.limits.items()}
    accumulated = task.recipe.grad_accum_steps
    x, y = map(torch.cat, zip(*(next(held_out) for _ in range(accumulated)), strict=True))
    mixed = max((len(layer.blocks) for layer in net.layers), default=1)
    mixed = mixed if checking else min(mixed, config.paths)
    parts = max(1, min(mixed * accumulated, len(x) // 2))
    weights = net.weight_parameters()
    for w in weights:
        w.requires_grad_(False)
    own.optimizer.zero_grad()
    # One part of the images is enough to check that every gate gets a gradient.
    paths, taken = (0, 1) if checking else (config.paths, parts)
    probabilities = net.probabilities_on_host(own.temperature)
    seen = {name: p.detach().numpy() for name, p in probabilities.items()}
    loss, images = image_loss(search, task, paths, x, y, parts, taken, seen)
    for w in weights:
        w.requires_grad_(True)
    of = (*probabilities, *targets)
    if own.tables[0] != of:
        own.tables = of, live_tables(net, task)
    expected = {m: own.tables[1][m].expected(probabilities) for m in targets}
    pull = config.budget_weight * budget_penalty(expected, targets)  # all of it on the CPU
    if config.prior:
        pull = pull - config.prior * log_widths(net.space, probabilities)
    (pull * own.scaler.get_scale() if own.scaler.is_enabled() else pull).backward()
    average_gradients(net.gate_parameters())
    own.scaler.unscale_(own.optimizer)
    norm = torch.nn.utils.get_total_norm([w.grad for w in net.gate_parameters() if w.grad is not None])
    value, size = to_host(torch.stack([mean(loss).double(), norm.double()])).tolist()
    sound = math.isfinite(size)
    own.skipped = 0 if sound else own.skipped + 1
    if own.skipped >= MAX_SKIPPED:
        raise UserError(f"{MAX_SKIPPED} gate steps in a row had gradients that are not finite: lower --lr")
    if sound:
        if checking:
            check_gradients(net, search.learner.update - 1 if search.learner else 0)
        own.scaler.step(own.optimizer)
    own.scaler.update()
    from_first(net.gate_parameters())  # all processes must cut off the same options
    own.taught += 1
    return {
        "images": images * world_size(),
        "gate_loss": value,
        "expected": {m: e.detach().numpy().item() for m, e in expected.items()},
        "target": targets,
    } | ({} if sound else {"gates_skipped": own.skipped})


def live_tables(net: Supernet, task: Task) -> dict[str, CostTable]:
    """The cost tables of the budgets' metrics without removed blocks. `gate_step` renews them if a block is removed."""
    gone = {d.name for d in net.space.decisions} - set(net.gates())
    return {m: task.tables[m].without(gone) for m in task.limits}


def narrow(search: Search, task: Task) -> list[dict]:
    """Cut off widths that no network inside the budgets needs. Returns one record for each event.

    A reference net is the balanced net with the cheapest blocks and the fewest layers. Each Markov gate in it keeps its
    widths up to the first one that is at least ``headroom`` times the width in the reference net. Without a reference
    net in the band, nothing is cut off.
    """
    net, cheapest = search.net, task.tables[task.budgets[0].metric].extremes()[0]
    try:
        balanced = balanced_arch(net.space, task.tables, task.budgets, cheapest)
    except UserError:  # the grids are too coarse for a reference net in the band, which says nothing about the search
        return []
    optimizers = (*([search.learner.optimizer] if search.learner else []), search.own.optimizer)
    events = []
    for name, gate in net.gates().items():
        if isinstance(gate, MarkovGate) and name in balanced:
            most = task.config.headroom * int(balanced[name])
            width = next((w for w in gate.widths if w >= most), gate.widths[-1])
            if width < gate.widths[-1]:
                cut_width(net, name, width, optimizers)
                events.append({"width": name, "channels": width})
    if events:
        net.fit(optimizers)
        search.own.first = expected_costs(net, task)
    return events


def may_end_with(task: Task, options: Mapping[str, Sequence[int]]) -> bool:
    """Whether networks of these options (decision -> indices) can still keep every budget and reach at least one.

    For each metric this looks at the cheapest and the most expensive network.
    """
    limits, tables = task.limits, task.tables
    ends = {m: [tables[m].of(a) for a in tables[m].extremes(options)] for m in limits}
    return all(ends[m][0] <= limits[m] for m in limits) and any(ends[m][1] >= limits[m] for m in limits)


def after_step(search: Search, task: Task, progress: float, held_out: HeldOut) -> dict[str, Any]:
    """After the warm-up, every ``gate_every`` weight steps: a gate step, then `shrink`. Returns a history row."""
    net, own, config, learner = search.net, search.own, task.config, search.learner
    if learner is None or progress < config.warmup or (learner.update - 1) % config.gate_every:
        return {}
    started = time.perf_counter()
    narrowed = narrow(search, task) if own.taught == 0 and config.headroom else []
    row = gate_step(search, task, progress, held_out)
    taught = time.perf_counter()
    row["events"] = narrowed + shrink(
        net, (learner.optimizer, own.optimizer), partial(may_end_with, task),
        move_above=0.9 - 0.2 * progress, block_below=0.5 * ramp(progress, config.block_from, config.block_by),
        layer_below=0.5 * ramp(progress, config.skip_at, 1.0), width_below=config.width_below,
        patience=config.patience, temperature=own.temperature,
    )  # fmt: skip
    if row["events"]:
        row["shrink_ms"] = 1e3 * (time.perf_counter() - taught)
    row["gate_ms"] = 1e3 * (time.perf_counter() - started)
    before = max(config.warmup, progress - config.gate_every / own.steps)
    if own.taught == 1 or int(SNAPSHOTS * progress) > int(SNAPSHOTS * before):
        row["gates"] = snapshot(net, own.temperature)
    return row


def choose(search: Search, task: Task) -> Arch:
    """The most likely network inside the budgets, by the gates."""
    like = gate_likelihood(search.net, search.own.temperature, only_present=task.keep_weights)
    return derive(search.net.space, task.tables, task.budgets, like)


def state_dict(search: Search) -> dict[str, Any]:
    """The gates' optimizer and counters. The gates themselves are part of the supernet."""
    own = search.own
    return {
        "optimizer": optimizer_data(own.optimizer, search.net),
        "draws": own.draws.get_state(),
        "first": own.first,
        "taught": own.taught,
        "skipped": own.skipped,
        "temperature": own.temperature,
        "scaler": own.scaler.state_dict(),
    }


def load_state_dict(search: Search, data: Mapping[str, Any]) -> None:
    """The inverse of `state_dict`. The supernet must be loaded first."""
    own = search.own
    load_optimizer(own.optimizer, search.net, data["optimizer"])
    own.draws.set_state(data["draws"].cpu())
    if own.scaler.is_enabled():
        own.scaler.load_state_dict(data["scaler"])
    own.first = dict(data["first"])
    own.taught, own.skipped, own.temperature = data["taught"], data["skipped"], data["temperature"]


GATES = Method(
    of_classes=True,
    needs="labels, gradients; 30 % of the training images are held out",
    deviations="one search for both papers' decisions; see the algorithms",
    summary="widths, blocks and depth, by gates that learn with the weights; the supernet shrinks as it trains",
    source="PruNet, Kierat et al., arXiv 2209.11785; DMCP, Guo et al., CVPR 2020",
    choose=choose,
    config=GatesConfig,
    init=init,
    loss=weight_loss,
    after_step=after_step,
    held_out=lambda config: config.gate_fraction,
    work=lambda config: (config.warmup, (1 - config.warmup) * (1 + 2 / config.gate_every)),
    distributions=lambda search: {n: p.detach() for n, p in search.net.probabilities(search.own.temperature).items()},
    state_dict=state_dict,
    load_state_dict=load_state_dict,
)
