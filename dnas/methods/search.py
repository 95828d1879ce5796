"""The search: weights learn on hard nets, gates on held-out images, dead parts are cut off while both go on."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer

from dnas.methods.budget_loss import budget_penalty, ramp, target
from dnas.nets.bipath_block import PairGate
from dnas.nets.layer_choice import ChoiceGate, SkipGate
from dnas.nets.shrink import cut_to, shrink, standing
from dnas.nets.supernet import Supernet
from dnas.runtime.checkpoint import load_module, load_optimizer, module_data, optimizer_data
from dnas.runtime.distributed import average_gradients, from_first, mean, shared_statistics, world_size
from dnas.spec.budget import Budget
from dnas.spec.cost import CostTable
from dnas.spec.validation import UserError
from dnas.training.data import Batches, Data
from dnas.training.loop import MAX_SKIPPED, Learner, all_finite, cycle, learner_data, load_learner, make_learner, train
from dnas.training.onednn import subsampled
from dnas.training.recipe import Recipe, autocast


def _told(default: Any, text: str) -> Any:
    """A field of a dataclass with a text for ``--help``."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class SearchConfig:
    """Everything about a search beyond the weights' `Recipe`. Times are shares of the whole search, in [0, 1].

    ``gate_lr`` 0 means: such that a logit can travel 20 over all gate steps, within [0.01, 0.3].
    """

    gate_fraction: float = _told(0.3, "of the training images, held out for the gates; 0: they see the weights' images")
    gate_every: int = _told(2, "weight steps to a gate step")
    gate_lr: float = _told(0.0, "learning rate of the gates; 0: by the number of their steps")
    paths: int = _told(2, "candidate blocks mixed in a gate step")
    weights_on: str = _told("hard", "nets that the weights learn on: hard, soft or sandwich")
    entropy: float = _told(0.0, "weight of the gates' mean entropy at the end of the search; it grows from 0")
    budget_weight: float = _told(20.0, "weight of the distance to the budget in the gates' loss")
    warmup: float = _told(0.2, "weights only, nets drawn evenly, until then")
    budget_from: float = _told(0.2, "the target leaves the starting cost ...")
    budget_by: float = _told(0.7, "... and has reached the budget")
    block_from: float = _told(0.25, "the threshold on blocks rises from 0 ...")
    block_by: float = _told(0.8, "... to 1/2")
    skip_at: float = _told(0.2, "layers get their skip; the threshold on them rises from 0 to 1/2 from here to the end")
    skip_from: float = _told(0.9, "the coefficient that they begin with")
    temperature: float = _told(0.3, "at the end; 1 until the budget is reached half-way")
    width_below: float = _told(0.2, "a group of channels goes when its marginal has been below that ...")
    patience: int = _told(5, "... for so many gate steps in a row")


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


SNAPSHOTS = 100  # of the gates, over a whole search


def snapshot(net: Supernet) -> dict[str, float | list[float]]:
    """Where every gate is: the expected width, or the probabilities of its options."""
    found: dict[str, float | list[float]] = {}
    for name, p in net.probabilities().items():
        decision, shares = net.space.by_name[name], p.tolist()
        if decision.is_width:
            found[name] = sum(width * share for width, share in zip(decision.options, shares, strict=True))
        else:
            found[name] = shares
    return found


@dataclass
class SearchState:
    """All that changes while a search goes on. A copy of it (``copy.deepcopy``) can go on to another budget."""

    net: Supernet
    learner: Learner  # of the weights
    gate_optimizer: Optimizer
    draws: torch.Generator
    first: dict[str, float]  # metric -> expected cost at the start
    gates_taught: int = 0
    gates_skipped: int = 0  # in a row


def batches_of(data: Data, recipe: Recipe, config: SearchConfig, seed: int) -> tuple[Batches, Batches]:
    """The images of the weights, and those that are held out for the gates."""
    rest, held_out = data.split(config.gate_fraction, seed) if config.gate_fraction else (None, None)
    batches = data.train_batches(recipe.batch_size, seed=seed, indices=rest)
    return batches, data.train_batches(recipe.batch_size, seed=seed + 1, indices=held_out)


def begin(
    net: Supernet, tables: Mapping[str, CostTable], data: Data, recipe: Recipe, config: SearchConfig, seed: int
) -> SearchState:
    """A search before its first step. Raises UserError if there is nothing to search, or no time for it."""
    if net.space.num_archs() < 2:
        raise UserError(f"nothing can be searched: every decision of the space {net.name} has one option only")
    per_epoch = len(batches_of(data, recipe, config, seed)[0])
    total = recipe.epochs * per_epoch
    check_length(total, config)
    gate_steps = max(1.0, total * (1 - config.warmup) / config.gate_every)
    gate_lr = config.gate_lr or min(0.3, max(0.01, 20 / gate_steps))
    from_first(net.state_dict().values())
    return SearchState(
        net,
        make_learner(net, net.weight_parameters(), recipe, per_epoch),
        torch.optim.Adam(net.gate_parameters(), lr=gate_lr, betas=(0.5, 0.99)),
        torch.Generator().manual_seed(seed),
        {m: float(table.expected(net.probabilities()).detach()) for m, table in tables.items()},
    )


def search_data(state: SearchState) -> dict[str, Any]:
    """A search between two steps as plain data (see `dnas.runtime.checkpoint`)."""
    net, gates = state.net, state.net.gates()
    return {
        "standing": standing(net),
        "open": [name for name, gate in gates.items() if isinstance(gate, SkipGate) and gate.is_open],
        "temperature": {name: gate.temperature for name, gate in gates.items()},
        "net": module_data(net),
        "learner": learner_data(state.learner),
        "gate_optimizer": optimizer_data(state.gate_optimizer, net),
        "draws": state.draws.get_state(),
        "first": state.first,
        "gates_taught": state.gates_taught,
        "gates_skipped": state.gates_skipped,
    }


def load_search(state: SearchState, data: Mapping[str, Any]) -> None:
    """Put a search that has just begun into the state that `search_data` gave."""
    net = state.net
    cut_to(net, data["standing"])
    for name, gate in net.gates().items():
        gate.temperature = data["temperature"][name]
        if isinstance(gate, SkipGate):
            gate.is_open = name in data["open"]
    load_module(net, data["net"])
    load_learner(state.learner, data["learner"])
    load_optimizer(state.gate_optimizer, net, data["gate_optimizer"])
    state.draws.set_state(data["draws"].cpu())
    state.first = dict(data["first"])
    state.gates_taught, state.gates_skipped = data["gates_taught"], data["gates_skipped"]


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
    """Train ``net``'s weights and gates in place until the gates agree with the budgets; ``on_row`` gets every step."""
    state = begin(net, tables, data, recipe, config, seed)
    go_on(state, tables, budgets, data, recipe, config, seed=seed, on_row=on_row)


def go_on(
    state: SearchState,
    tables: Mapping[str, CostTable],
    budgets: Sequence[Budget],
    data: Data,
    recipe: Recipe,
    config: SearchConfig,
    *,
    seed: int,
    on_row: Callable[[dict], None],
    until: float = 1.0,
) -> None:
    """A search from where it is to ``until``, a share of the whole. Up to ``config.warmup`` no budget plays a part.

    Validation images are not touched. A step is a weight step and, after the warm-up, every ``gate_every`` times a gate
    step (soft gates, held-out images, cross entropy plus budget penalty) followed by shrinking. By ``weights_on``,
    weights learn on hard nets, in turn the widest and one drawn; on the soft net that the gates see; or on the widest,
    the narrowest and a drawn one together, the others taught by the widest (the sandwich rule, arXiv 1903.05134).
    Several processes (`dnas.runtime.distributed`) search together; all need the same arguments, and get the same gates.
    """
    net, learner, draws = state.net, state.learner, state.draws
    device, safe = next(net.parameters()).device, subsampled(net, recipe)
    batches, held_out = batches_of(data, recipe, config, seed)
    gate_batches, total = cycle(held_out, state.gates_taught), recipe.epochs * len(batches)
    limits = {b.metric: b.limit for b in budgets}
    current, live = live_tables(net, tables), live_cost(net, tables["macs"])

    def may_end_with(options: Mapping[str, Sequence[int]]) -> bool:
        ends = {m: [tables[m].of(a) for a in tables[m].extremes(options)] for m in limits}
        return all(ends[m][0] <= limits[m] for m in limits) and any(ends[m][1] >= limits[m] for m in limits)

    def forward(x: Tensor) -> Tensor:
        even = learner.update / total < config.warmup
        if config.weights_on == "soft":
            return net(x, net.soft(draws, config.paths))
        if config.weights_on == "sandwich":
            return torch.cat([net(x, a) for a in (net.widest(draws), net.narrowest(draws), net.draw(draws, even))])
        return net(x, net.widest(draws) if learner.update % 2 == 0 else net.draw(draws, even))

    def teach_gates(t: float) -> dict:
        """One step of the gates on held-out images. Returns its row; its graph is gone when shrinking starts."""
        sharpness = ramp(t, (config.budget_from + config.budget_by) / 2, 1.0)
        cooled = config.temperature**sharpness
        checking = state.gates_taught == 0
        for gate in net.gates().values():
            gate.temperature = cooled
            if isinstance(gate, SkipGate) and not gate.is_open and t >= config.skip_at:
                gate.open(config.skip_from)
                checking = True
        progress = ramp(t, config.budget_from, config.budget_by)
        targets = {m: target(state.first[m], limits[m], progress) for m in limits}
        x, y = next(gate_batches)
        mixed = max((len(layer.blocks) for layer in net.layers), default=1)
        mixed = mixed if checking else min(mixed, config.paths)
        parts = max(1, min(mixed, len(x) // 2))  # one after the other, so that mixing takes the memory of one block
        weights = net.weight_parameters()
        for p in weights:
            p.requires_grad_(False)
        state.gate_optimizer.zero_grad()
        taken = [(x[k::parts], y[k::parts]) for k in range(1 if checking else parts)]  # to check, one part will do
        seen, losses = sum(len(labels) for _, labels in taken), []
        for of_part, labels in taken:
            if recipe.channels_last:
                of_part = of_part.to(memory_format=torch.channels_last)
            with autocast(device, recipe), shared_statistics(), safe:
                logits = net(of_part, net.soft(draws, 0 if checking else config.paths)).float()
            losses.append(F.cross_entropy(logits, labels, reduction="sum") / seen)
            if losses[-1].requires_grad:  # not when all that is left is decided
                losses[-1].backward()
        for p in weights:
            p.requires_grad_(True)
        loss = torch.stack(losses).detach().sum()
        probabilities = net.probabilities()
        expected = {m: current[m].expected(probabilities) for m in limits}
        pull = config.budget_weight * budget_penalty(expected, targets)
        if config.entropy:
            pull = pull + config.entropy * sharpness * mean_entropy(probabilities.values())
        pull.backward()
        average_gradients(net.gate_parameters())
        sound = all_finite(p.grad for p in net.gate_parameters())
        state.gates_skipped = 0 if sound else state.gates_skipped + 1
        if state.gates_skipped >= MAX_SKIPPED:
            raise UserError(f"{MAX_SKIPPED} gate steps in a row had gradients that are not finite: lower --lr")
        if sound:
            if checking:
                check_gradients(net, learner.update - 1)
            state.gate_optimizer.step()
        from_first(net.gate_parameters())  # what is cut off hangs on them
        state.gates_taught += 1
        return {
            "images": seen * world_size(),
            "gate_loss": float(mean(loss)),
            "expected": {m: float(e.detach()) for m, e in expected.items()},
            "target": targets,
        } | ({} if sound else {"gates_skipped": state.gates_skipped})

    net.train()
    clock, criterion = time.perf_counter(), partial(distilled_loss, smoothing=recipe.smoothing)
    for loss in train(forward, learner, batches, recipe, criterion=criterion):
        update = learner.update - 1
        row: dict = {"step": update, "loss": float(loss)}
        if learner.skipped_now:
            row["skipped"] = learner.skipped_now
        t, weights_done = update / total, time.perf_counter()
        row["weight_ms"] = 1e3 * (weights_done - clock)
        if t >= config.warmup and update % config.gate_every == 0:
            row |= teach_gates(t)
            taught = time.perf_counter()
            row["events"] = shrink(
                net, (learner.optimizer, state.gate_optimizer), may_end_with,
                move_above=0.9 - 0.2 * t, block_below=0.5 * ramp(t, config.block_from, config.block_by),
                layer_below=0.5 * ramp(t, config.skip_at, 1.0), width_below=config.width_below,
                patience=config.patience,
            )  # fmt: skip
            if row["events"]:
                current, live = live_tables(net, tables), live_cost(net, tables["macs"])
                row["shrink_ms"] = 1e3 * (time.perf_counter() - taught)
            row["gate_ms"] = 1e3 * (time.perf_counter() - weights_done)
            before = max(config.warmup, t - config.gate_every / total)
            if state.gates_taught == 1 or int(SNAPSHOTS * t) > int(SNAPSHOTS * before):
                row["gates"] = snapshot(net)
        row["live_macs"] = live
        on_row(row)
        if learner.update / total >= until:
            return
        clock = time.perf_counter()
