"""The results of a run: figures of its search, costs of its layers, and the verdict over runs of one experiment."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import torch
from scipy.special import stdtrit

from dnas.export.arch_schema import BUDGET
from dnas.latency.measured_parts import parts_of
from dnas.methods.rules import RULES
from dnas.nets.supernet import Supernet
from dnas.runtime.run_folder import peak_memory_mb
from dnas.spec.budget import show
from dnas.spec.checks import MAX_BYTES, UserError, check, read_json
from dnas.spec.cost import CostTable
from dnas.spec.latency_table import LatencyTable
from dnas.spec.recipe import Recipe
from dnas.spec.space import Arch, Site, Space

METRICS = ("macs", "params", "ms")


def search_figures(
    rows: Sequence[dict], recipe: Recipe, seconds: float, plain_ms: float, device: torch.device
) -> dict[str, Any]:
    """The ``search`` part of metrics.json, without figures that the method does not have.

    ``first_step_ms`` and ``last_step_ms`` are medians over up to ten steps. If there are gate steps, only steps with a
    gate step count. The first step is left out: a first gate step mixes all blocks once, to check that every gate gets
    a gradient.
    """
    figures: dict[str, Any] = {"seconds": seconds, "steps": len(rows)}
    if not rows:
        return figures
    gate_rows = [row for row in rows if "gate_ms" in row]
    both = [row["weight_ms"] + row.get("gate_ms", 0.0) for row in gate_rows or rows]
    images = sum(recipe.batch_size * row.get("batches", 1) + row.get("images", 0) for row in rows)
    counted = both[1:] or both
    figures |= {
        "images": images,
        "skipped_steps": sum("skipped" in row or "gates_skipped" in row for row in rows),
        "peak_memory_mb": peak_memory_mb(device),
        "first_step_ms": median(counted[:10]),
        "last_step_ms": median(counted[-10:]),
        "relative_cost": (1e3 * seconds / images) / (plain_ms / recipe.batch_size),
        "plain_step_ms": plain_ms,
    }
    if taught := [row for row in rows if row.get("gate_loss") is not None]:
        last = taught[-max(1, len(taught) // 10) :]
        figures |= {"expected": taught[-1]["expected"], "gate_loss": fmean(row["gate_loss"] for row in last)}
    return figures


def effort(figures: Mapping[str, Any]) -> str:
    """The time that a search took, as a sentence, from the ``search`` part of metrics.json."""
    if not figures["steps"]:
        return f"no training, {figures['seconds']:.1f} s"
    first, last = (figures[f"{which}_step_ms"] for which in ("first", "last"))
    image = f"an image took {figures['relative_cost']:.2f} times as long as in training the widest net"
    steps = f"a step {'of weights and gates ' if 'gate_loss' in figures else ''}went from {first:.0f} to {last:.0f} ms"
    return f"{figures['steps']} steps in {figures['seconds']:.0f} s; {image}; {steps}"


def decision_rows(space: Space, archs: Mapping[str, Arch]) -> list[dict[str, Any]]:
    """All decisions with their options, and each network's choice (None: without effect there), for metrics.json."""
    return [
        {"name": d.name, "kind": d.kind, "layer": d.layer, "options": list(d.options)}
        | {name: arch.get(d.name) for name, arch in archs.items()}
        for d in space.decisions
    ]


def layer_rows(net: Supernet, latency: LatencyTable | None, archs: Mapping[str, Arch]) -> list[dict[str, Any]]:
    """The costs of every layer in these nets, for metrics.json: ``{"name", "macs": {net: cost}, ...}``, in order."""
    space = net.space
    priced: dict[str, tuple[Sequence[Site], Callable[[list[Site]], CostTable]]] = {
        metric: (space.sites, partial(CostTable.build, space, metric)) for metric in ("macs", "params")
    }
    if latency:
        parts = [part.site for part in parts_of(net)]
        priced["ms"] = parts, lambda sites: CostTable.measured(space, sites, latency)
    rows: dict[str, dict[str, Any]] = {}
    for metric, (sites, table_of) in priced.items():
        by_layer: dict[str, list[Site]] = {}
        for site in sites:
            by_layer.setdefault(site.layer, []).append(site)
        for layer, own in by_layer.items():
            table = table_of(own)
            rows.setdefault(layer, {"name": layer})[metric] = {name: table.of(arch) for name, arch in archs.items()}
    return [*rows.values()]


@dataclass(frozen=True)
class Run:
    """The content of a complete run folder: its settings (``args`` of config.json) and its metrics.json."""

    folder: Path
    args: Mapping[str, Any]
    metrics: Mapping[str, Any]

    @property
    def limits(self) -> dict[str, float]:
        """Metric -> its budget."""
        return {row["metric"]: row["limit"] for row in self.metrics["budget"]}

    @property
    def nets(self) -> dict[str, list[Mapping[str, Any]]]:
        """Kind of net (``found``, and ``uniform``, ``balanced`` and ``random`` if there are any) -> its rows."""
        rows = {kind: [self.metrics[kind]] for kind in ("found", *RULES) if kind in self.metrics}
        return rows | ({"random": [*self.metrics["random"]]} if self.metrics.get("random") else {})


def read_run(folder: str | Path) -> Run:
    """The run in a folder, whoever wrote the files. Raises UserError if it is not a complete run."""
    try:
        config, metrics = (read_json(Path(folder) / f"{name}.json", MAX_BYTES) for name in ("config", "metrics"))
        for what, content, keys in (("config", config, ["args"]), ("metrics", metrics, ["budget", "found"])):
            check(what, content, dict)
            if missing := [key for key in keys if key not in content]:
                raise UserError(f"{what} has no {missing[0]!r}")
        run = Run(Path(folder), config["args"], metrics)
        check("config.args", run.args, dict)
        check("metrics.budget", metrics["budget"], BUDGET)
        for row in metrics["budget"]:
            check("metrics.budget.metric", row["metric"], METRICS)
        check("metrics.random", metrics.get("random", []), list)
        check("metrics.validation_images", metrics.get("validation_images", 1), range(1, 2**63))
        for kind, rows in run.nets.items():
            for row in rows:
                check(f"metrics.{kind}", row, dict)
                for key in ("macs", "params", "top1", *(["ms"] if "ms" in row else [])):
                    check(f"metrics.{kind}.{key}", row.get(key), float)
    except UserError as error:
        raise UserError(f"{str(folder)!r} is no complete run folder: {error}") from None
    return run


# Settings in which two runs may differ and still be one experiment with several seeds.
OF_A_RUN = {"seed", "output", "name", "resume", "device", "workers", "checkpoint_every", "log"}


def same_but_seed(run: Run, other: Run) -> bool:
    """Whether two runs are one experiment: same settings, same budget."""
    mine, theirs = ({k: v for k, v in r.args.items() if k not in OF_A_RUN} for r in (run, other))
    return mine == theirs and run.limits == other.limits


def grouped(runs: Sequence[Run]) -> list[list[Run]]:
    """The runs by experiment, in order. Of several runs with the same seed only the first one counts."""
    groups: list[list[Run]] = []
    for run in runs:
        group = next((g for g in groups if same_but_seed(g[0], run)), None)
        if group is None:
            groups.append([run])
        elif run.args.get("seed") not in [r.args.get("seed") for r in group]:
            group.append(run)
    return groups


def sibling_runs(run: Run) -> list[Run]:
    """``run``, and the complete runs in folders beside it that differ in the seed only."""
    here, others = run.folder.absolute(), []
    try:
        folders = sorted(folder for folder in here.parent.iterdir() if folder != here)
    except OSError:  # a folder that may not be listed
        folders = []
    for folder in folders:
        if os.path.isfile(folder / "metrics.json"):
            try:
                others.append(read_run(folder))
            except UserError:  # another folder is not part of this experiment
                continue
    return grouped([run, *others])[0]


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """(mean, low, high): the mean of independent values, and the ends of Student's 95 % interval.

    The ends are infinite for a single value.
    """
    mean, n = fmean(values), len(values)
    half = math.inf if n < 2 else float(stdtrit(n - 1, 0.975)) * stdev(values) / math.sqrt(n)
    return mean, mean - half, mean + half


def top1s(runs: Sequence[Run]) -> dict[str, list[float]]:
    """Kind of net -> top-1 of all trainings in these runs."""
    found: dict[str, list[float]] = {}
    for run in runs:
        for kind, rows in run.nets.items():
            found.setdefault(kind, []).extend(float(row["top1"]) for row in rows)
    return found


def paired_difference(runs: Sequence[Run], kind: str) -> tuple[float, float, float] | None:
    """Top-1 of the found nets minus that of another kind, paired by run, as an `interval`; None if there is none."""
    pairs = [(run.nets["found"], run.nets[kind]) for run in runs if kind in run.nets]
    if not pairs:
        return None
    return interval([fmean(r["top1"] for r in found) - fmean(r["top1"] for r in other) for found, other in pairs])


def started_alike(run: Run, kind: str) -> bool:
    """Whether the nets of this kind and the found net all started with weights of the search, or all from scratch."""
    return len({bool(row.get("inherited")) for row in (*run.nets["found"], *run.nets.get(kind, ()))}) == 1


def verdict(runs: Sequence[Run]) -> tuple[str, str]:
    """(word, sentence): what the runs of one experiment show about the found net and the rules.

    The word is ``better`` (than every rule), ``worse`` (than one of them), ``open`` (neither), or ``alone`` (there is
    no net of a rule that was trained alike).
    """
    found = {
        rule: difference
        for rule in RULES
        if (difference := paired_difference(runs, rule)) and all(started_alike(run, rule) for run in runs)
    }
    if not found:
        return "alone", "The net was trained; there is no net beside it that was trained alike, to compare it with."
    if len(runs) == 1:
        sides = [
            f"{abs(mean):.2f} points {'above' if mean > 0 else 'below'} the {rule}"
            if round(mean, 2)
            else f"level with the {rule}"
            for rule, (mean, _, _) in found.items()
        ]
        images = runs[0].metrics.get("validation_images")
        more = f" One validation image of {images} is {100 / images:.2f} points." if images else ""
        more += " On small runs the noise of a training is over a point: repeat with other values of --seed"
        more += ". The page of a run counts those beside it; tools/compare.py counts any."
        return "open", f"The found net is {' and '.join(sides)} net of the same budget, in one run.{more}"
    sides = [f"{m:+.2f} [{low:+.2f}, {high:+.2f}] against {rule}" for rule, (m, low, high) in found.items()]
    score = score_name(runs[0].metrics)
    text = f"Found net: {', '.join(sides)}, in points of {score} over {len(runs)} seeds, with the 95 % interval."
    worse = [rule for rule, (_, _, high) in found.items() if high < 0]
    same = [rule for rule, (_, low, high) in found.items() if low <= 0 <= high]
    if worse:
        return "worse", f"{text} The {worse[-1]} net is better: --method {worse[-1]} chooses it without a search."
    if same:
        cheaper = f"--method {same[-1]} chooses a net of this quality without a search"
        return "open", f"{text} Against {same[-1]} that is within the noise: {cheaper}."
    return "better", text


def score_name(metrics: Mapping[str, Any]) -> str:
    """The name of what networks are compared by."""
    return str(metrics.get("score", "top-1"))


def arm_rows(metrics: Mapping[str, Any]) -> list[list[str]]:
    """The trainings of the found net that were asked for: name, epochs, top-1, top-1 before the training."""
    arms = metrics.get("arms", {}).items()
    tops = {arm: [f"{row[key]:.2f} %" if key in row else "-" for key in ("top1", "before")] for arm, row in arms}
    return [[arm, str(row["epochs"]), *tops[arm]] for arm, row in arms]


def facts(metrics: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(heads, rows): a table as text. Unknown values are empty.

    The columns are the found net, the nets of the rules, the budget, and the cost that the gates expect.
    """
    nets = [kind for kind in ("found", *RULES) if kind in metrics]
    limits = {row["metric"]: row["limit"] for row in metrics["budget"]}
    expected = metrics.get("search", {}).get("expected")
    heads = ["", *nets, "budget", *(["expected"] if expected else [])]
    rows = []
    for metric, text in (("macs", "MACs"), ("params", "parameters"), ("ms", "latency")):
        values = [*(metrics[kind].get(metric) for kind in nets), limits.get(metric)]
        values += [expected.get(metric) if metric in limits else None] if expected else []
        if any(v is not None for v in values):
            rows.append([text, *("" if v is None else show(metric, v) for v in values)])
    rest = [""] * (len(heads) - 1 - len(nets))
    if "measured_ms" in metrics["found"]:
        rows.append(["measured", *(show("ms", metrics[kind]["measured_ms"]) for kind in nets), *rest])
    tops = (f"{metrics[kind]['top1']:.2f} %" if "top1" in metrics[kind] else "" for kind in nets)
    rows.append([score_name(metrics), *tops, *rest])
    fair = [metrics[kind].get("balanced_accuracy") for kind in nets]
    # Only where classes are of different sizes: elsewhere it is top-1 again.
    if all(f is not None for f in fair) and any(
        abs(f - metrics[k]["top1"]) > 0.5 for f, k in zip(fair, nets, strict=True)
    ):
        rows.append(["balanced accuracy", *(f"{f:.2f} %" for f in fair), *rest])
    return heads, rows
