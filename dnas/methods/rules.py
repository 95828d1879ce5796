"""Rules: networks inside the budget that cost nothing to choose. What a search has to beat.

Where blocks and depth are open, uniform and balanced take the base blocks and keep all layers.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from dnas.methods.derive import BAND, _walk_into_band, _Walker, derive, near
from dnas.methods.method import Method
from dnas.spec.budget import Budget
from dnas.spec.cost import CostTable
from dnas.spec.space import KEEP, Arch, Decision, Space


def _held_blocks(
    space: Space, of_width: Callable[[Decision], np.ndarray], held: Arch | None = None
) -> dict[str, np.ndarray]:
    """Widths by ``of_width``; blocks and depth of ``held``, by default base blocks and all layers."""
    base = {d.name: KEEP if KEEP in d.options else d.base for d in space.decisions}
    base |= held or {}
    return {
        d.name: of_width(d) if d.is_width else np.where(np.array(d.options) == base[d.name], 0.0, -1e3)
        for d in space.decisions
    }


def uniform_arch(space: Space, tables: Mapping[str, CostTable], budgets: Sequence[Budget]) -> Arch:
    """The base net with every width scaled alike, at equal cost.

    The scale is found by bisection; then the network in the band that is nearest to it, in squared log widths. Where
    the base blocks are too cheap for the budget even at full width, a few layers take dearer ones.
    """

    def likelihood(scale: float) -> dict[str, np.ndarray]:
        return _held_blocks(space, lambda d: near(d, scale * float(d.base)))

    low, high = 0.01, 4.0
    for _ in range(30):
        middle = (low + high) / 2
        like = likelihood(middle)
        arch = space.complete({d.name: d.options[int(np.argmax(like[d.name]))] for d in space.decisions})
        fits = all(tables[b.metric].of(arch) <= b.limit for b in budgets)
        low, high = (middle, high) if fits else (low, middle)
    return derive(space, tables, budgets, likelihood(low))


def balanced_arch(
    space: Space, tables: Mapping[str, CostTable], budgets: Sequence[Budget], held: Arch | None = None
) -> Arch:
    """The net with the largest product of widths at equal cost, and the blocks and depth of ``held`` or the base net.

    At the optimum all widths that are not at an end of their grid account for the same share of the cost: w dC/dw is
    the same for all of them. Where those blocks are too cheap even at full width, a few layers take dearer ones.
    """
    return derive(space, tables, budgets, _held_blocks(space, lambda d: np.log(np.array(d.options, dtype=float)), held))


def random_arch(
    space: Space,
    tables: Mapping[str, CostTable],
    budgets: Sequence[Budget],
    seed: int,
    *,
    start: Arch | None = None,
    proposals: int | None = None,
) -> Arch:
    """A random network in the band: every decision answered evenly and independently, given that the cost fits.

    Plain rejection has this distribution and would almost never end. Here a walk finds one network in the band, and a
    Metropolis chain, by default 50 ``proposals`` a decision, then forgets where it started. With a ``start`` in the
    band and few proposals the result is a neighbour of it.

    Raises:
        UserError: no network in the band was found; the nearest costs are named.
    """
    rng = np.random.default_rng(seed)
    flat = {d.name: np.zeros(len(d.options)) for d in space.decisions}
    walker = _Walker(space, [tables[b.metric] for b in budgets], [b.limit for b in budgets], flat)
    walker.at = {d.name: int(rng.integers(len(d.options))) for d in space.decisions}
    walker.refresh()
    if start is None and not _walk_into_band(walker, rng, most=500):
        start = derive(space, tables, budgets, {name: rng.normal(size=len(row)) for name, row in flat.items()})
    if start is not None:
        walker.at |= {name: space.by_name[name].index(option) for name, option in start.items()}
        walker.refresh()
    _mix(walker, rng, 50 * len(space.decisions) if proposals is None else proposals)
    return walker.arch()


def _mix(walker: _Walker, rng: np.random.Generator, proposals: int) -> None:
    """Metropolis-Hastings steps inside the band towards the even distribution over all answers there.

    A proposal redraws one to three decisions evenly, and then another one evenly among those of its options (n of them;
    m before the others changed) that cost what the band allows: accepted with probability min(1, n / m).
    """

    def landing(d: Decision) -> np.ndarray:
        ratios = walker.ratios(d)
        return np.flatnonzero((ratios >= BAND) & (ratios <= 1))

    decisions = walker.space.decisions
    for _ in range(proposals):
        most = min(3, len(decisions) - 1)
        chosen = rng.permutation(len(decisions))[: 1 + rng.integers(min(1, most), most + 1)]
        last, *others = (decisions[k] for k in chosen)
        held, before = {d: walker.at[d.name] for d in others}, len(landing(last))
        for d in others:
            walker.move(d, int(rng.integers(len(d.options))))
        options = landing(last)
        if len(options) and rng.random() * before < len(options):
            walker.move(last, int(rng.choice(options)))
        else:
            for d, index in held.items():
                walker.move(d, index)
    walker.refresh()


# Beside the found network in every run, by the names that metrics.json has.
RULES: dict[str, Callable[..., Arch]] = {"uniform": uniform_arch, "balanced": balanced_arch}

UNIFORM = Method(
    summary="widths, all scaled alike; no data, no training",
    source="MobileNets, Howard et al., arXiv 1704.04861 (the width multiplier)",
    choose=lambda search, task: uniform_arch(search.net.space, task.tables, task.budgets),
)
BALANCED = Method(
    summary="widths, such that their product is the largest; no data, no training",
    source="this project",
    choose=lambda search, task: balanced_arch(search.net.space, task.tables, task.budgets),
)
RANDOM = Method(
    summary="everything, drawn evenly among the networks inside the budget; no data, no training",
    source="Random Search and Reproducibility for NAS, Li and Talwalkar, UAI 2019, arXiv 1902.07638",
    choose=lambda search, task: random_arch(search.net.space, task.tables, task.budgets, task.seed),
)
