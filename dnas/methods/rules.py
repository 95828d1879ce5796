"""Rules: ways to choose a network inside the budget without data or training. A search has to find better networks.

If a space has decisions on blocks and layers, uniform and balanced take the base blocks and keep all layers.
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
    """Log-likelihoods: widths by ``of_width``; blocks and layers are held at those of ``held``.

    Without ``held`` these are the base blocks and all layers. Other options have -1000.
    """
    base = {d.name: KEEP if KEEP in d.options else d.base for d in space.decisions}
    base |= held or {}
    return {
        d.name: of_width(d) if d.is_width else np.where(np.array(d.options) == base[d.name], 0.0, -1e3)
        for d in space.decisions
    }


def uniform_arch(space: Space, tables: Mapping[str, CostTable], budgets: Sequence[Budget]) -> Arch:
    """The uniform net: the base net with all widths scaled by one number, at the cost of the budget.

    Bisection finds the number. Then `derive` takes the network in the band that is nearest to it, in squared log
    widths. If the base blocks are too cheap for the budget even at full width, a few layers take more expensive blocks.

    Raises:
        UserError: no network in the band was found. The message has the nearest costs.
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
    """The net with the largest product of widths at the cost of the budget, with the blocks and layers of ``held``.

    Without ``held`` these are the base blocks and all layers. At the optimum, w dC/dw (C is the cost) is the same for
    all widths w that are not at an end of their grid: each of them accounts for the same share of the cost. If those
    blocks are too cheap even at full width, a few layers take more expensive blocks.

    Raises:
        UserError: no network in the band was found. The message has the nearest costs.
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
    """A random network in the band: every decision is drawn evenly and independently, on condition that the cost fits.

    Plain rejection gives this distribution, but would almost never end. Here a random walk finds one network in the
    band. Then a Metropolis chain of ``proposals`` (by default 50 for each decision) makes the result independent of
    this start. With a ``start`` in the band and few proposals, the result is a neighbour of ``start``.

    Raises:
        UserError: no network in the band was found. The message has the nearest costs.
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
    """Metropolis-Hastings steps inside the band, towards the even distribution over all choices in the band.

    A proposal redraws one to three decisions evenly. Then it redraws another decision evenly among those of its options
    with a cost in the band: n options, and m before the others changed. It is accepted with probability min(1, n / m).
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


# The nets beside the found net in every run, by their names in metrics.json.
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
