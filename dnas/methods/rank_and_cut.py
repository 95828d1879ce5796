"""What all methods share that score channels: they train the dense net, score its channels, and cut the worst.

The dense net has the base blocks, all layers and full widths. A method (`dnas.methods.rankings`,
`dnas.methods.penalties`) gives the scores. This module cuts, once or in steps, so that the budget is met.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dnas.methods.derive import derive, in_band, near
from dnas.methods.method import HeldOut, Method, Search, Task
from dnas.methods.settings import RankConfig
from dnas.nets.supernet import Supernet
from dnas.runtime.checkpoint import checkpoint_errors, load_module, module_data
from dnas.spec.budget import Budget
from dnas.spec.checks import UserError
from dnas.spec.cost import CostTable
from dnas.spec.space import DROP, KEEP, Arch, Option, Space
from dnas.training.loop import cycle

Scores = Mapping[str, Tensor]  # width decision -> the score of each of its units of channels, [units that are left]
Score = Callable[[Search, Task], Scores]


@dataclass
class Ranked:
    """The state of such a method: ``arch`` is what is left of the dense net, after ``cuts`` cuts.

    ``start`` has the weights of the start for ``arch``, if the method rewinds. ``more`` are other tensors
    of the method, by width.
    """

    arch: Arch
    start: Supernet | None = None
    cuts: int = 0
    more: dict[str, list[Tensor]] = field(default_factory=dict)


def dense_arch(space: Space) -> Arch:
    """The dense net: base blocks, all layers, every width at its widest."""
    return space.complete(
        {d.name: d.options[-1] if d.is_width else KEEP if KEEP in d.options else d.base for d in space.decisions}
    )


def only(net: Supernet, arch: Arch) -> dict[str, list[int]]:
    """The options (decision -> indices) that `Supernet.cut_to` has to leave for one network of a supernet."""
    return net.structure() | {name: [net.space.by_name[name].index(option)] for name, option in arch.items()}


def init(net: Supernet, task: Task) -> Ranked:
    """Cut a supernet to the dense net, because only the dense net is trained and scored."""
    dense = dense_arch(net.space)
    net.cut_to(only(net, dense))
    return Ranked(dense, copy.deepcopy(net) if getattr(task.config, "rewind", False) else None)


def dense_loss(search: Search, task: Task, x: Tensor, y: Tensor, progress: float) -> Tensor:
    """The task's criterion of what is left of the dense net: a scalar."""
    return task.criterion(search.net(x, search.own.arch), x, y)


def score_batches(task: Task) -> Iterator[tuple[Tensor, Tensor]]:
    """The training images that scores are taken over: as many batches as the settings say."""
    batches = cycle(task.held_out_batches(0.0))
    return (next(batches) for _ in range(task.config.score_batches))


def normalised(scores: Scores) -> dict[str, Tensor]:
    """Scores that can be compared between layers: each width's are divided by their mean."""
    return {name: s / s.mean().clamp(min=1e-30) for name, s in scores.items()}  # all of a branch may be 0


def most_score(space: Space, scores: Scores, left: Arch) -> dict[str, np.ndarray]:
    """The value of each option: decision -> [number of options].

    A width of n units has the sum of its n highest scores. Other decisions, and widths without scores, are held at
    those of ``left``, the network that is scored: its option has 0, and no sum of scores makes up for another one. A
    layer that may be dropped can have a score: it stays if this is above 0, and is dropped otherwise.
    """
    gone = -10 * (1 + sum(float(s.abs().sum()) for s in scores.values()))
    like = {d.name: np.where(np.array(d.options) == left.get(d.name), 0.0, gone) for d in space.decisions}
    for name, score in scores.items():
        if not space.by_name[name].is_width:
            stays = KEEP if float(score) > 0 else DROP
            like[name] = np.where(np.array(space.by_name[name].options) == stays, 0.0, gone)
            continue
        options, widest = np.array(space.by_name[name].options), int(left[name])
        worth = np.concatenate([[0.0], np.cumsum(np.sort(score.double().cpu().numpy())[::-1])])
        units = np.minimum(options, widest) * len(score) // widest
        like[name] = np.where(options <= widest, worth[units], gone)
    return like


def above_threshold(
    space: Space, tables: Mapping[str, CostTable], budgets: Sequence[Budget], scores: Scores, left: Arch
) -> Arch:
    """The channels of ``left`` with the highest scores, by one threshold for all layers, as many as fit the budgets.

    Channels come in steps of the grid of widths, so the score of a step is the mean of its channels. Each width keeps
    its narrowest option. Where the next step does not fit, those with lower scores that still fit are taken. If that
    ends below 98 % of the budget, the nearest network in the band is taken, in squared log widths.

    Raises:
        UserError: no network in the band was found. The message has the nearest costs.
    """
    arch, steps = dict(left), []
    for name, score in scores.items():
        if not space.by_name[name].is_width:
            arch[name] = KEEP if float(score) > 0 else DROP
            continue
        options = [int(o) for o in space.by_name[name].options if int(o) <= int(left[name])]
        best = np.sort(score.double().cpu().numpy())[::-1]
        units = [o * len(score) // int(left[name]) for o in options]
        arch[name] = options[0]
        for a, b, before, option in zip(units, units[1:], options, options[1:], strict=False):
            steps.append((float(best[a:b].mean()), name, before, option))
    costs = [tables[b.metric] for b in budgets]
    for _, name, before, option in sorted(steps, key=lambda step: -step[0]):
        wider = space.complete(arch | {name: option})
        if arch[name] == before and all(t.of(wider) <= b.limit for t, b in zip(costs, budgets, strict=True)):
            arch[name] = option
    found = space.complete(arch)
    ratio = max(t.of(found) / b.limit for t, b in zip(costs, budgets, strict=True))
    if in_band(ratio):
        return found
    like = {d.name: np.where(np.array(d.options) == found.get(d.name), 0.0, -1e4) for d in space.decisions}
    for d in (space.by_name[name] for name in scores if name in found and space.by_name[name].is_width):
        like[d.name] = np.where(np.array(d.options) <= left[d.name], near(d, float(found[d.name])), -1e4)
    return derive(space, tables, budgets, like)


def cut(search: Search, task: Task, score: Score, comparable: bool) -> Arch:
    """Score the channels, and choose a network inside the budgets. The best channels of each width are now the first.

    Deviation: `derive` weighs normalised scores against the costs of channels, where the papers cut a share of each
    layer, or all channels below a threshold. The setting ``cut`` "threshold" does the latter. Where scores of different
    layers are not ``comparable``, they are normalised for it.
    """
    net, left = search.net, search.own.arch
    with torch.no_grad():
        scores = score(search, task)
    # A narrower network keeps the first channels, so the best channels come first.
    orders = {name: own.argsort(descending=True, stable=True) for name, own in scores.items()}
    net.reorder(orders, [search.learner.optimizer] if search.learner else [])
    if search.own.start is not None:
        search.own.start.reorder(orders)
    if task.config.cut == "threshold":
        comparables = scores if comparable else normalised(scores)
        return above_threshold(net.space, task.tables, task.budgets, comparables, left)
    return derive(net.space, task.tables, task.budgets, most_score(net.space, normalised(scores), left))


def is_part_of(arch: Arch, left: Arch) -> bool:
    """Whether ``left`` has all channels, blocks and layers of ``arch``."""

    def fits(name: str, option: Option) -> bool:
        widest = left.get(name)
        return option in (widest, DROP) or (isinstance(option, int) and isinstance(widest, int) and option < widest)

    return all(fits(name, option) for name, option in arch.items())


def after_step(search: Search, task: Task, progress: float, score: Score, comparable: bool) -> dict[str, Any]:
    """A cut on the way, if it is time for one. Returns entries of the row in the history.

    Of n cuts the last is `Method.choose`. The costs after the cuts fall by the same factor each.
    """
    own, config, net = search.own, task.config, search.net
    assert search.learner is not None
    if config.rewind:  # each cycle has the whole schedule of the learning rate
        search.learner.scheduler.step_update(int(progress * config.cuts % 1 * task.steps(0.0)))
    if int(progress * config.cuts) <= own.cuts:
        return {}
    own.cuts += 1
    dense, share = dense_arch(net.space), own.cuts / config.cuts
    costs = {b.metric: task.tables[b.metric].of(dense) for b in task.budgets}
    budgets = tuple(replace(b, limit=costs[b.metric] ** (1 - share) * b.limit**share) for b in task.budgets)
    before = own.arch
    try:
        arch = cut(search, replace(task, budgets=budgets), score, comparable)
    except UserError:  # no network costs so much: the next cut goes further
        return {}
    if not is_part_of(arch, before):  # it would need what is cut off
        return {}
    own.arch = arch
    net.cut_to(only(net, own.arch), [search.learner.optimizer])
    if own.start is not None:
        own.start.cut_to(only(own.start, own.arch))
        load_module(net, own.start.state_dict())
        search.learner.optimizer.state.clear()
    return {"events": [{"width": n, "channels": w} for n, w in own.arch.items() if w != before.get(n)]}


def state_dict(search: Search) -> dict[str, Any]:
    """`Ranked` as plain data."""
    own = search.own
    start = module_data(own.start) if own.start else None
    return {"arch": dict(own.arch), "cuts": own.cuts, "start": start, "more": dict(own.more)}


def load_state_dict(search: Search, data: Mapping[str, Any]) -> None:
    """Put the data of `state_dict` into a search that has just begun."""
    own = search.own
    with checkpoint_errors():
        own.arch, own.cuts = search.net.space.complete(data["arch"]), data["cuts"]
        device = next(search.net.parameters()).device
        own.more = {name: [t.to(device) for t in tensors] for name, tensors in data["more"].items()}
        if own.start is not None:
            load_module(own.start, data["start"])


def work(config: RankConfig) -> tuple[float, float]:
    """Until the first cut no budget plays a part."""
    return 1 / config.cuts, 1 - 1 / config.cuts


def rank_and_cut(
    score: Score, summary: str, source: str, *, config: type = RankConfig, comparable: bool = True, **parts: Any
) -> Method:
    """A method that trains the dense net, scores its channels with ``score``, and cuts it (see `cut`).

    ``comparable``: scores of different layers can be compared as they are. ``parts`` replace those of the `Method`, and
    have its ``needs`` and ``deviations``.
    """

    def choose(search: Search, task: Task) -> Arch:
        return cut(search, task, score, comparable)

    def between(search: Search, task: Task, progress: float, held_out: HeldOut) -> dict[str, Any]:
        return after_step(search, task, progress, score, comparable)

    own = {
        "init": init, "loss": dense_loss, "after_step": between, "work": work,
        "state_dict": state_dict, "load_state_dict": load_state_dict,
    }  # fmt: skip
    return Method(summary, source, choose, config=config, **(own | parts))
