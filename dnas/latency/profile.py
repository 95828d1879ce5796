"""Measure the milliseconds of networks and of their parts, on the device where they will run.

A table begins with a coarse grid of widths for each unit. Between two neighbouring widths the unit is measured once
more. If interpolation misses this measurement, the grid gets this width. So a device with a smooth latency needs few
rows, and a device with a latency in steps needs many.
"""

import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, product
from typing import Any

import numpy as np
import torch
from torch import nn

from dnas.latency.measured_parts import RUN, Build, Part
from dnas.latency.timing import CpuSpeedReference, Target, ready, time_calls
from dnas.runtime.distributed import gathered, rank, world_size
from dnas.spec.checks import UserError
from dnas.spec.cost import CostTable
from dnas.spec.latency_table import SCALES, SLOTS, Unit, units_of
from dnas.spec.space import Arch, Space

TOGETHER = 200, 2**31  # calls that are prepared together and measured in turn; bytes that they read
SIDE_BY_SIDE = 4  # whole networks that are measured in turn
MOST_WIDTHS = {0: 1, 1: 33, 2: 9, 3: 5}  # number of axes -> an axis with this many widths is not refined


# A table.

Point = tuple[str, tuple[tuple[str, int], ...]]  # a unit, and its width in each slot
Measured = dict[Point, dict[str, Any]]


def row_of(point: Point, params: int, ms: np.ndarray) -> dict[str, Any]:
    """The row of a table for one unit at one choice of widths, from its milliseconds [rounds]."""
    low, middle, high = (float(f"{q:.5g}") for q in np.quantile(ms, (0.1, 0.5, 0.9)))
    return {"unit": point[0], "widths": dict(point[1]), "params": params, "ms": middle, "p10": low, "p90": high}


def point_of(row: Mapping[str, Any]) -> Point:
    """The point of a row: its unit, and its width in each slot."""
    return row["unit"], tuple((slot, row["widths"][slot]) for slot in SLOTS if slot in row["widths"])


@dataclass
class _Grid:
    """The widths at which a unit is measured, ascending, and all ``options`` that it may have."""

    build: Build
    options: dict[str, tuple[int, ...]]
    widths: dict[str, list[int]]

    def points(self, unit: str) -> list[Point]:
        return [(unit, at) for at in product(*([(slot, w) for w in self.widths[slot]] for slot in self.widths))]

    def probes(self, unit: str) -> Iterator[tuple[str, int, Point]]:
        """(slot, width between two of the grid, point to measure).

        There are two points for each such width: all other widths at their narrowest, and at their widest.
        """
        for slot, known in self.widths.items():
            if len(known) >= MOST_WIDTHS[len(self.widths)]:
                continue
            for low, high in zip(known, known[1:], strict=False):
                between = [w for w in self.options[slot] if low < w < high]
                if between:
                    middle = min(between, key=lambda w: abs(2 * w - low - high))
                    for end in (0, -1):
                        yield slot, middle, (unit, tuple(
                            (s, middle if s == slot else ws[end]) for s, ws in self.widths.items()
                        ))  # fmt: skip


def first_grids(parts: Sequence[Part], space: Space) -> dict[str, _Grid]:
    """Unit -> the narrowest and the widest width of each slot, and the middle one if there are one or two slots."""
    grids: dict[str, _Grid] = {}
    for part in parts:
        own = part.options(space)
        grid = grids.setdefault(part.site.op, _Grid(part.build, {}, {}))
        for slot in (s for s in SLOTS if s in own):
            grid.options[slot] = tuple(sorted({*grid.options.get(slot, ()), *own[slot]}))
    for grid in grids.values():
        for slot, options in grid.options.items():
            middle = [options[len(options) // 2]] if len(grid.options) < 3 else []
            grid.widths[slot] = sorted({options[0], *middle, options[-1]})
    return grids


def refine(grids: Mapping[str, _Grid], measured: Measured, tolerance: float, rounds: int) -> bool:
    """Give grids the widths where interpolation is off by more than ``tolerance`` (a share) and more than the noise.

    Returns False if no grid has grown.
    """
    grew = False
    # For normal noise, p90 - p10 is 2.56 standard deviations, and the error of a median is 1.25 standard deviations
    # over the root of the rounds. The mean of two medians has half of the variance of one. The limit is three times the
    # error of the difference.
    noise = 3 * math.sqrt(1.5) * 1.25 / 2.56 / math.sqrt(rounds)
    for unit, grid in grids.items():
        known = _unit(unit, grid, measured)
        news: dict[str, set[int]] = {}
        for slot, middle, point in grid.probes(unit):
            row = measured[point]
            guess = float(known.at(**{s: np.array(w) for s, w in point[1]}))
            if abs(guess - row["ms"]) > max(tolerance * row["ms"], noise * (row["p90"] - row["p10"])):
                news.setdefault(slot, set()).add(middle)
        for slot, widths in news.items():
            grid.widths[slot] = sorted({*grid.widths[slot], *widths})
            grew = True
    return grew


def _unit(unit: str, grid: _Grid, measured: Measured) -> Unit:
    return units_of([measured[point] for point in grid.points(unit)])[unit]


def profile(
    parts: Sequence[Part],
    space: Space,
    target: Target,
    measured: Measured,
    *,
    pace: CpuSpeedReference,
    tolerance: float,
    rounds: int,
    block_ms: float,
    on_rows: Callable[[list[dict[str, Any]], int], None],
) -> list[dict[str, Any]]:
    """All rows of a table of ``parts``, without the time to start a run (`without_run`).

    ``measured`` has the rows that are known already, and gets the others; its rows include this time. After each batch
    of calls ``on_rows`` gets the rows of the batch, and how many rows are still to come at least. Several processes,
    each on a device of its own, share the work, and all of them get all rows.
    """
    grids, rng = first_grids(parts, space), random.Random(0)
    while True:
        wanted = {point for unit, grid in grids.items() for point in grid.points(unit)}
        wanted |= {point for unit, grid in grids.items() for *_, point in grid.probes(unit)}
        todo = sorted(wanted - measured.keys())
        rng.shuffle(todo)  # neighbours on a grid are measured at different times
        mine, left = todo[rank() :: world_size()], len(todo)
        while left:
            some: list[tuple[Point, int]] = []
            calls, read = [], 0
            while mine and len(some) < TOGETHER[0] and read < TOGETHER[1]:
                unit, at = mine.pop()
                module, inputs = grids[unit].build(dict(at), target.batch)
                some.append(((unit, at), held_by(module)))
                calls.append(ready(module, inputs, target))
                read += sum(t.nbytes for t in inputs)
            times = time_calls(calls, target, pace, rounds, block_ms, seed=len(measured))
            found = gathered(([row_of(*one, ms) for one, ms in zip(some, times, strict=True)], len(mine)))
            rows, left = [row for own, _ in found for row in own], sum(more for _, more in found)
            measured |= {point_of(row): row for row in rows}
            on_rows(rows, left)
        if not refine(grids, measured, tolerance, rounds):
            return without_run([measured[point] for unit, grid in grids.items() for point in grid.points(unit)])


def held_by(module: nn.Module) -> int:
    """The number of scalars in all parameters and buffers."""
    return sum(t.numel() for t in module.state_dict().values())


def without_run(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of parts that run one after the other, from rows of parts that were started one by one.

    A network is started only once. So the time to start is a unit of its own, `RUN`. It is subtracted from all other
    rows; at least a hundredth of the measured time stays.
    """
    (run,) = (row["ms"] for row in rows if row["unit"] == RUN)

    def rest(ms: float) -> float:
        return float(f"{max(0.01 * ms, ms - run):.5g}")

    return [row if row["unit"] == RUN else row | {key: rest(row[key]) for key in ("ms", "p10", "p90")} for row in rows]


def fit_scale(ms: np.ndarray, mparams: np.ndarray, measured: np.ndarray) -> tuple[float, float]:
    """(scale, ms_per_mparam), from the ``measured`` milliseconds of whole networks, [networks].

    ``ms`` and ``mparams`` are sums over the parts of each network: milliseconds, and millions of parameters and
    buffers, [networks] each. A part that runs again and again finds its weights in the caches. A network has more
    weights and does not find all of them there; so the second number is needed. The fit is least squares of relative
    errors. If the first would be outside `SCALES`, if the second would not be positive, or if there are fewer than
    three networks, the second is 0 and the first is the median of ``measured / ms``.
    """
    columns = np.stack([ms, mparams], 1) / measured[:, None]
    scale, per_mparam = np.linalg.lstsq(columns, np.ones(len(measured)), rcond=None)[0]
    if len(measured) < 3 or not SCALES[0] <= scale <= SCALES[1] or per_mparam <= 0:
        return float(np.median(measured / ms)), 0.0
    return float(scale), float(per_mparam)


# Whole networks.


def spread_archs(space: Space, count: int, seed: int) -> list[Arch]:
    """Random networks from narrow to wide. Blocks and layers are drawn evenly.

    Each network has a random share, and each of its widths is within a quarter of its grid around this share. If every
    width was drawn evenly and alone, all networks would cost much the same, and any table would look good.
    """
    rng, archs = random.Random(seed), []
    for _ in range(count):
        answers, share = {}, rng.random()
        for d in space.decisions:
            own = min(1.0, max(0.0, share + rng.uniform(-0.25, 0.25))) if d.is_width else rng.random()
            answers[d.name] = d.options[min(len(d.options) - 1, int(own * len(d.options)))]
        archs.append(space.complete(answers))
    return archs


def time_nets(
    nets: Iterable[nn.Module],
    shape: Sequence[int],
    target: Target,
    pace: CpuSpeedReference,
    rounds: int,
    block_ms: float,
) -> np.ndarray:
    """Milliseconds of whole networks on images of (channels, height, width), [len(nets), rounds].

    `SIDE_BY_SIDE` networks at a time take turns. If many networks took turns, each would find less of its data in the
    caches, and its memory in more pieces, than after deployment.
    """
    nets, found = iter(nets), []
    while calls := [ready(net, [torch.rand(target.batch, *shape)], target) for net in islice(nets, SIDE_BY_SIDE)]:
        found.append(time_calls(calls, target, pace, rounds, block_ms))
        del calls
    return np.vstack(found)


def calibrated(
    table: CostTable, limit: float, find: Callable[[CostTable], Arch], measure: Callable[[Arch], float], tries: int = 5
) -> tuple[Arch, CostTable]:
    """A network whose measured latency meets the budget, and ``table`` scaled to predict this latency for it.

    A table has an error for networks of one kind, such as narrow ones, and a search prefers networks that the table
    takes for fast. So ``find(table)`` chooses a network, the network is measured, and the table is scaled by this
    measurement. This is repeated up to ``tries`` times. It ends early if a network measures from 96 to 100 % of
    ``limit`` ms, if ``find`` returns a network again, or if it has none. The result is the slowest of the tried
    networks within the budget; if there is none, the fastest.

    Raises:
        UserError: ``find`` has no network in the first try.
    """
    tried: dict[Arch, tuple[float, CostTable]] = {}
    while len(tried) < tries:
        try:
            arch = find(table)
        except UserError:  # no other is left in the band: return one of those tried
            if not tried:
                raise
            break
        if arch in tried:
            break
        ms = measure(arch)
        table = table.scaled(ms / table.of(arch))
        tried[arch] = ms, table
        if 0.96 * limit <= ms <= limit:
            break
    within = [arch for arch in tried if tried[arch][0] <= limit]
    best = max(within, key=lambda arch: tried[arch][0]) if within else min(tried, key=lambda arch: tried[arch][0])
    return best, tried[best][1]


def kendall_tau(a: np.ndarray, b: np.ndarray) -> float:
    """Agreement of two orders, -1 to 1: pairs in the same order minus pairs in the opposite one, over all pairs."""
    upper = np.triu_indices(len(a), 1)
    signs = np.sign(np.subtract.outer(a, a)[upper] * np.sign(np.subtract.outer(b, b)[upper]))
    return float(signs.mean())


def check_figures(table: CostTable, archs: Sequence[Arch], ms: Sequence[np.ndarray]) -> dict[str, Any]:
    """Figures that compare prediction with measurement, and measurement with measurement, of whole networks.

    ``ms`` holds two arrays [len(archs), rounds]: the same networks, built and measured twice. Errors are relative to
    the measured latency. The figures of ``noise`` compare the two measurements: no table can be better on this machine.
    """
    found, predicted = np.median(np.hstack(ms), 1), np.array([table.of(arch) for arch in archs])
    once, again = (np.median(part, 1) for part in ms)
    errors, noise = predicted / found - 1, once / again - 1
    return {
        "nets": len(archs),
        "fastest_ms": float(found.min()),
        "slowest_ms": float(found.max()),
        "median_error": float(np.median(np.abs(errors))),
        "p90_error": float(np.quantile(np.abs(errors), 0.9)),
        "bias": float(np.median(errors)),
        "kendall_tau": kendall_tau(predicted, found),
        "noise_median_error": float(np.median(np.abs(noise))),
        "noise_kendall_tau": kendall_tau(once, again),
    }
