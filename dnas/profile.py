"""Milliseconds of networks and of their parts, measured on the device where they will run.

A table begins with a coarse grid of widths for each unit. Between two neighbours on it the unit is tried once more, and
where interpolation misses what was measured there, the grid gets that width: a device with a smooth latency ends with
few rows, one with a staircase with many.
"""

import math
import platform
import random
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dnas.arch import Arch, Space
from dnas.cost import CostTable
from dnas.deployed import RUN, Build, Part
from dnas.latency import RUNTIMES, SLOTS, Unit, units_of
from dnas.runs import provenance
from dnas.units import UserError

TOGETHER = 48  # calls that are kept ready side by side, and measured in turn
MOST_WIDTHS = {0: 1, 1: 33, 2: 9, 3: 5}  # of an axis: from there on it is not refined; by the number of axes


@dataclass(frozen=True)
class Target:
    """How networks run where they are deployed. ``batch`` images a run; ``threads`` of the CPU."""

    device: torch.device
    runtime: str = "eager"
    dtype: str = "float32"
    batch: int = 1
    threads: int = 1
    channels_last: bool = False

    def header(self) -> dict[str, Any]:
        """The part of a table's header that says so."""
        known = provenance(self.device)
        driver = platform.platform()
        if self.device.type == "cuda":
            driver = f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
        if self.runtime == "onnxruntime":
            driver += f", onnxruntime {_onnxruntime().__version__}"
        told = {"device": known["device"], "driver": driver[:128], "runtime": self.runtime, "dtype": self.dtype}
        told |= {"batch": self.batch, "threads": self.threads, "channels_last": self.channels_last}
        return told | {"torch": torch.__version__}


def target_of(header: Mapping[str, Any], device: torch.device) -> Target:
    """The target that a table was measured on, which is ``device`` here."""
    return Target(device, *(header[key] for key in ("runtime", "dtype", "batch", "threads", "channels_last")))


def check_target(target: Target) -> Target:
    """``target`` itself if this machine can run it. Raises UserError otherwise."""
    if target.runtime not in RUNTIMES:
        raise UserError(f"--runtime {target.runtime!r} is not one of {', '.join(RUNTIMES)}")
    if target.runtime == "cudagraph" and target.device.type != "cuda":
        raise UserError(f"--runtime cudagraph needs --device cuda, not {target.device.type}")
    if target.runtime == "onnxruntime":
        if target.device.type != "cpu" or target.dtype != "float32":
            raise UserError(f"--runtime onnxruntime runs float32 on cpu, not {target.dtype} on {target.device.type}")
        _onnxruntime()
    if not 1 <= target.batch <= 65_536 or not 1 <= target.threads <= 1024:
        given = f"--batch-size {target.batch} --threads {target.threads}"
        raise UserError(f"{given}: 1 to 65536 images and 1 to 1024 threads are allowed")
    return target


def _onnxruntime() -> Any:
    try:
        import onnx  # noqa: F401  (torch's exporter needs it)
        import onnxruntime
    except ImportError:
        raise UserError("--runtime onnxruntime needs the packages of `pip install 'dnas[onnx]'`") from None
    return onnxruntime


# One call.


def ready(module: nn.Module, inputs: Sequence[Tensor], target: Target) -> Callable[[], object]:
    """A function that runs ``module`` on ``inputs`` once, as the target does."""
    layout = torch.channels_last if target.channels_last else torch.contiguous_format
    dtype = getattr(torch, target.dtype)

    def placed(t: Tensor) -> Tensor:
        t = t.to(target.device, dtype if t.is_floating_point() else t.dtype)
        return t.to(memory_format=layout) if t.ndim == 4 else t

    module, given = module.eval().to(target.device, dtype).to(memory_format=layout), [placed(t) for t in inputs]
    if target.runtime == "onnxruntime":
        return _onnx_call(module, given, target.threads)
    if target.runtime == "cudagraph":
        return _graph_call(module, given)
    run = torch.compile(module, fullgraph=True, dynamic=False) if target.runtime == "compile" else module

    def call() -> None:
        with torch.inference_mode():
            run(*given)

    return call


def _onnx_call(module: nn.Module, given: Sequence[Tensor], threads: int) -> Callable[[], object]:
    ort, names = _onnxruntime(), [f"x{k}" for k in range(len(given))]
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), torch.no_grad():
        # The exporter that torch now prefers takes seconds for each of a thousand units; the graphs are the same.
        warnings.simplefilter("ignore")
        file = f"{folder}/part.onnx"
        torch.onnx.export(module, tuple(given), file, input_names=names, output_names=["y"], dynamo=False)
        session = ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    taken = {node.name for node in session.get_inputs()}
    binding = session.io_binding()
    for name, t in zip(names, given, strict=True):
        if name in taken:
            binding.bind_cpu_input(name, t.numpy())
    binding.bind_output("y")
    return lambda: session.run_with_iobinding(binding)


def _graph_call(module: nn.Module, given: Sequence[Tensor]) -> Callable[[], object]:
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside), torch.inference_mode():
        for _ in range(3):  # what is chosen at the first runs (algorithms, workspaces) must not be captured
            module(*given)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.graph(graph):
        module(*given)

    def call() -> None:
        graph.replay()

    call.__dict__["kept"] = (module, given)  # the graph reads their memory, and does not own it
    return call


class Pace:
    """Whether a CPU runs at its own pace just now: on a shared machine a neighbour may halve it for a minute.

    Told by a small convolution, which must be as quick as the quickest so far, but for a tenth. ``best`` is its time in
    seconds, ``left`` how many seconds may still be spent on waiting; then everything counts. A GPU is not asked.
    """

    def __init__(self, target: Target, patience: float, best: float = math.inf) -> None:
        self.asked, self.best, self.left = target.device.type == "cpu", best, patience
        self.x, self.w = torch.rand(1, 64, 20, 20), torch.rand(64, 64, 3, 3)
        for _ in range(20 if self.asked and patience > 0 else 0):
            self.steady()
            time.sleep(0.1)

    def steady(self) -> bool:
        if not self.asked or self.left <= 0:
            return True
        least = math.inf
        for _ in range(3):
            start = time.perf_counter()
            with torch.inference_mode():
                nn.functional.conv2d(self.x, self.w)
            least = min(least, time.perf_counter() - start)
        self.best = min(self.best, least)
        return least < 1.1 * self.best

    def wait(self, start: float) -> None:
        """Sleep a moment; all since ``start`` was in vain."""
        time.sleep(0.05)
        self.left -= time.perf_counter() - start


def time_calls(
    calls: Sequence[Callable[[], object]], target: Target, pace: Pace, rounds: int, block_ms: float, seed: int = 0
) -> np.ndarray:
    """Milliseconds of a run, [len(calls), rounds]: the mean over a block of runs of about ``block_ms``.

    A round takes a block of every call, in an order of its own: what else the machine does, and what it does with its
    clock, spreads over all of them. A block begins with a run that does not count (caches, other threads asleep), and
    is repeated where the machine was slowed down before or after it (see `Pace`).
    """
    sync = torch.cuda.synchronize if target.device.type == "cuda" else (lambda: None)

    def block(call: Callable[[], object], runs: int) -> float:
        while True:
            began, steady = time.perf_counter(), pace.steady()
            call()
            sync()
            start = time.perf_counter()
            for _ in range(runs):
                call()
            sync()
            ms = 1e3 * (time.perf_counter() - start) / runs
            if steady and pace.steady():
                return ms
            pace.wait(began)

    runs = []
    for call in calls:
        call()
        runs.append(max(1, math.ceil(block_ms / max(1e-3, block(call, 1)))))
    order, rng = list(range(len(calls))), random.Random(seed)
    found = np.empty((len(calls), rounds))
    for k in range(rounds):
        rng.shuffle(order)
        for c in order:
            found[c, k] = block(calls[c], runs[c])
    return found


# A table.

Point = tuple[str, tuple[tuple[str, int], ...]]  # a unit, and its width in each slot
Measured = dict[Point, dict[str, Any]]


def row_of(point: Point, ms: np.ndarray) -> dict[str, Any]:
    """The row of a table for one unit at one choice of widths, from [rounds] milliseconds."""
    low, middle, high = (float(f"{q:.5g}") for q in np.quantile(ms, (0.1, 0.5, 0.9)))
    return {"unit": point[0], "widths": dict(point[1]), "ms": middle, "p10": low, "p90": high}


def point_of(row: Mapping[str, Any]) -> Point:
    """Where a row belongs."""
    return row["unit"], tuple((slot, row["widths"][slot]) for slot in SLOTS if slot in row["widths"])


@dataclass
class _Grid:
    """The widths at which a unit is (to be) measured, ascending, out of all that it may have."""

    build: Build
    options: dict[str, tuple[int, ...]]
    widths: dict[str, list[int]]

    def points(self, unit: str) -> list[Point]:
        return [(unit, at) for at in product(*([(slot, w) for w in self.widths[slot]] for slot in self.widths))]

    def probes(self, unit: str) -> Iterator[tuple[str, int, Point]]:
        """Slot, width between two of the grid, and where to try it: all other widths at their least, and most."""
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
    """Unit -> the ends of its widths and, where it has one or two, the middle."""
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


def refine(grids: Mapping[str, _Grid], measured: Measured, tolerance: float) -> bool:
    """Give grids the widths where interpolation is off by more than ``tolerance`` and the noise. False: none."""
    grew = False
    for unit, grid in grids.items():
        known = _unit(unit, grid, measured)
        news: dict[str, set[int]] = {}
        for slot, middle, point in grid.probes(unit):
            row = measured[point]
            guess = float(known.at(**{s: np.array(w) for s, w in point[1]}))
            if abs(guess - row["ms"]) > max(tolerance * row["ms"], row["p90"] - row["p10"]):
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
    pace: Pace,
    tolerance: float,
    rounds: int,
    block_ms: float,
    on_rows: Callable[[list[dict[str, Any]], int], None],
) -> list[dict[str, Any]]:
    """All rows of a table of ``parts``. ``measured`` holds those that are known already, and gets the others.

    ``on_rows`` gets the rows of every batch of calls that has been measured, and how many are still to come at least.
    """
    grids, rng = first_grids(parts, space), random.Random(0)
    while True:
        wanted = {point for unit, grid in grids.items() for point in grid.points(unit)}
        wanted |= {point for unit, grid in grids.items() for *_, point in grid.probes(unit)}
        todo = sorted(wanted - measured.keys())
        rng.shuffle(todo)  # neighbours on a grid are measured at different times
        for start in range(0, len(todo), TOGETHER):
            some = todo[start : start + TOGETHER]
            calls = [ready(*grids[unit].build(dict(at), target.batch), target) for unit, at in some]
            times = time_calls(calls, target, pace, rounds, block_ms, seed=start)
            rows = [row_of(point, ms) for point, ms in zip(some, times, strict=True)]
            measured |= zip(some, rows, strict=True)
            on_rows(rows, len(todo) - start - len(some))
        if not refine(grids, measured, tolerance):
            return without_run([measured[point] for unit, grid in grids.items() for point in grid.points(unit)])


def without_run(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of parts that run one after the other, from rows of parts that were started one by one.

    A network is started once. So what starting takes is a unit of its own, `RUN`, and is taken off all others, down to
    a hundredth of what was measured.
    """
    (run,) = (row["ms"] for row in rows if row["unit"] == RUN)

    def rest(ms: float) -> float:
        return float(f"{max(0.01 * ms, ms - run):.5g}")

    return [row if row["unit"] == RUN else row | {key: rest(row[key]) for key in ("ms", "p10", "p90")} for row in rows]


def scale_of(table: CostTable, archs: Sequence[Arch], ms: np.ndarray) -> float:
    """What whole networks take, [len(archs), rounds], over what their parts take: the median over the networks.

    A part that runs again and again finds its weights and maps in the caches, and a network does not, quite; and what
    parts have between them takes time, too.
    """
    return float(np.median(np.median(ms, 1) / [table.of(arch) for arch in archs]))


# Whole networks.


def spread_archs(space: Space, count: int, seed: int) -> list[Arch]:
    """Random networks from narrow to wide: blocks and layers drawn evenly, widths within a quarter of a common share.

    With every width drawn evenly and alone, all networks would cost much the same, and any table would look good.
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
    nets: Sequence[nn.Module], shape: Sequence[int], target: Target, pace: Pace, rounds: int, block_ms: float
) -> np.ndarray:
    """Milliseconds of whole networks on images of (channels, height, width), [len(nets), rounds]."""
    calls = [ready(net, [torch.rand(target.batch, *shape)], target) for net in nets]
    return time_calls(calls, target, pace, rounds, block_ms)


def kendall_tau(a: np.ndarray, b: np.ndarray) -> float:
    """Agreement of two orders, -1 to 1: pairs in the same order minus pairs in the opposite one, over all pairs."""
    upper = np.triu_indices(len(a), 1)
    signs = np.sign(np.subtract.outer(a, a)[upper] * np.sign(np.subtract.outer(b, b)[upper]))
    return float(signs.mean())


def check_figures(table: CostTable, archs: Sequence[Arch], ms: np.ndarray) -> dict[str, Any]:
    """Prediction against measurement, [len(archs), rounds], of whole networks; and half of the rounds against the rest.

    Errors are relative to the measured latency. The halves say what no table can be better than on this machine.
    """
    halves = np.median(ms[:, 0::2], 1), np.median(ms[:, 1::2], 1)
    found, predicted = np.median(ms, 1), np.array([table.of(arch) for arch in archs])
    errors, noise = predicted / found - 1, halves[0] / halves[1] - 1
    return {
        "nets": len(archs),
        "fastest_ms": float(found.min()),
        "slowest_ms": float(found.max()),
        "median_error": float(np.median(np.abs(errors))),
        "p90_error": float(np.quantile(np.abs(errors), 0.9)),
        "bias": float(np.median(errors)),
        "kendall_tau": kendall_tau(predicted, found),
        "noise_median_error": float(np.median(np.abs(noise))),
        "noise_kendall_tau": kendall_tau(*halves),
    }
