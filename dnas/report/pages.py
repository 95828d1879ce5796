"""HTML pages: the report of a run (``report.html``), and several runs side by side. A page loads no other file."""

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from dnas.methods.rules import RULES
from dnas.report import plots
from dnas.report.metrics import (
    METRICS,
    Run,
    arm_rows,
    effort,
    facts,
    grouped,
    paired_difference,
    read_run,
    score_name,
    sibling_runs,
    top1s,
    verdict,
)
from dnas.runtime.run_folder import write_whole
from dnas.spec.budget import show
from dnas.spec.space import DROP
from dnas.training.data_summary import summary_lines

_PAGE = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True).from_string(
    Path(__file__).with_name("report.html").read_text()
)
WORDS = {
    "better": "Better than uniform and balanced",
    "worse": "A net that costs nothing is better",
    "open": "Not better than a net that costs nothing",
    "alone": "Trained",
}
KINDS = ("found", *RULES, "random")  # of nets
Picture = tuple[str, str, Markup]  # heading, what to look at, the picture


def _page(path: Path, **content: Any) -> None:
    empty: dict[str, Any] = {"warnings": [], "tables": [], "pictures": [], "network": [], "command": "", "data": []}
    write_whole(path, _PAGE.render(empty | content).encode())


def write_report(folder: Path) -> None:
    """Write ``report.html`` of a complete run folder, from its files and those of runs beside it (`sibling_runs`)."""
    run = read_run(folder)
    runs, metrics = sibling_runs(run), run.metrics
    config = json.loads((folder / "config.json").read_text())
    history = folder / "history.jsonl"
    rows = [json.loads(line) for line in history.read_text().splitlines()] if history.exists() else []
    word, sentence = verdict(runs)
    tables = [("", *facts(metrics))]
    if len(runs) > 1:
        lines = []
        for one in runs:
            tops = [f"{values[0]:.2f} %" for kind, values in top1s([one]).items() if kind != "random"]
            lines.append([one.folder.name, str(one.args.get("seed", "")), *tops])
        kinds = [kind for kind in run.nets if kind != "random"]
        tables.append(("Runs that differ in the seed", ["run", "seed", *kinds], lines))
    if arms := arm_rows(metrics):
        tables.append(("Trainings of the found net", ["arm", "epochs", score_name(metrics), "before"], arms))
    if by_class := accuracy_by_class(metrics, config.get("class_names", [])):
        tables.append(by_class)
    data, info = config.get("data", {}), config.get("provenance", {})
    told = [f"{key} {info[key]}" for key in ("dnas", "torch", "timm", "python") if key in info]
    _page(
        folder / "report.html",
        title=run.folder.absolute().name,
        word=(word, WORDS[word]),
        sentence=sentence,
        warnings=[*data.get("warnings", []), *metrics.get("warnings", [])],
        data=summary_lines(data) if data else [],
        tables=tables,
        pictures=_pictures(runs, rows),
        network=network(metrics.get("decisions", [])),
        command=again(config.get("argv", [])),
        told=", ".join([*told, str(info.get("device", ""))]),
    )


def accuracy_by_class(
    metrics: Mapping[str, Any], names: Sequence[str], most: int = 20
) -> tuple[str, list[str], list[list[str]]] | None:
    """A table (heading, heads, rows) of top-1 by class; of many classes, those that the found net knows least."""
    kinds = [kind for kind in ("found", *RULES) if metrics.get(kind, {}).get("class_top1")]
    tops = {kind: metrics[kind]["class_top1"] for kind in kinds}
    if not kinds or any(len(of) != len(names) for of in tops.values()):
        return None
    order = [k for k in range(len(names)) if tops[kinds[0]][k] is not None]
    order = sorted(order, key=lambda k: tops[kinds[0]][k])[:most]
    heading = "Accuracy by class" if len(order) == len(names) else f"Accuracy by class, the {len(order)} worst"
    rows = [[names[k], *(f"{tops[kind][k]:.2f} %" for kind in kinds)] for k in sorted(order)]
    return heading, ["class", *kinds], rows


def again(argv: Sequence[str]) -> str:
    """The command line as a user types it, without ``--output``, because this folder exists by now."""
    kept = [w for k, w in enumerate(argv) if w != "--output" and argv[k - 1 : k] != ["--output"]]
    return shlex.join(w for w in kept if not w.startswith("--output="))


def _pictures(runs: Sequence[Run], rows: Sequence[Mapping[str, Any]]) -> list[Picture]:
    run, found = runs[0], []
    metrics = run.metrics

    def add(heading: str, note: str, text: str) -> None:
        found.append((heading, note, Markup(text)))  # SVG that matplotlib has escaped

    note = "Every dot is a training; the bar is a standard deviation."
    if (difference := paired_difference(runs, "random")) and len(runs) > 1:
        note += " Found minus random nets: {:+.2f} [{:+.2f}, {:+.2f}].".format(*difference)
    add("Accuracy", note, plots.top1(top1s(runs), score_name(run.metrics)))
    if metrics.get("layers"):
        note = "Grey is the widest net of the space. Milliseconds, if any, are the latency table's as it was measured."
        add("What every layer costs", note, plots.layers(metrics["layers"]))
    if any("gates" in row for row in rows):
        text = "Dark is narrow or unlikely: a layer that was dropped goes dark, a block that was chosen goes bright."
        add("How it was decided", text, plots.gates(rows, metrics["decisions"]))
    if any("expected" in row for row in rows):
        add("The search", f"{effort(metrics['search'])}.", plots.course(rows, run.limits))
    if {"predicted_ms", "measured_ms"} <= metrics["found"].keys():
        kinds = [kind for kind in run.nets if kind != "random"]
        nets = {kind: (metrics[kind]["predicted_ms"], metrics[kind]["measured_ms"]) for kind in kinds}
        add("Latency", "On the dotted line, the table tells what is measured.", plots.predicted(nets))
    return found


def network(decisions: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The found net layer by layer: sections of rows, from the ``decisions`` of metrics.json.

    A row has ``name``, ``gone`` (whether the layer was dropped) and ``blocks`` [(name, whether it was chosen)]. If it
    has a width, it also has ``found`` and ``widest`` in channels, and ``share`` and ``uniform``: the found and the
    uniform width in percent of the widest. Without a width ``found`` and ``uniform`` are None.
    """
    by_layer: dict[str, list[Mapping[str, Any]]] = {}
    for decision in decisions:
        by_layer.setdefault(decision["layer"], []).append(decision)
    sections: dict[str, list[dict[str, Any]]] = {}
    for name, own in by_layer.items():
        row: dict[str, Any] = {"name": name, "gone": False, "blocks": [], "found": None, "uniform": None}
        for decision in own:
            answer = decision["found"]
            if decision["kind"] == "keep":
                row["gone"] = answer == DROP
            elif decision["kind"] == "block":
                row["blocks"] = [(option, option == answer) for option in decision["options"]]
            elif answer is not None:
                widest = decision["options"][-1]
                row |= {"found": answer, "widest": widest, "share": 100 * answer / widest}
                even = decision["uniform"]
                row["uniform"] = None if even is None else 100 * even / widest
        sections.setdefault(name.split("/")[0], []).append(row)
    return [{"name": name, "rows": rows} for name, rows in sections.items()]


def experiments(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One row for each experiment.

    A row has ``run`` (a name), ``seeds`` (their number), ``budget`` {metric: limit}, and the mean ``macs``, ``params``
    and ``ms`` of the found nets (None if not known). For each kind of net in `KINDS` it has the top-1 of all trainings.
    ``minus_uniform`` and ``minus_balanced`` are [mean, low, high] of the found nets minus these nets (None if not
    known).
    """
    table = []
    for group in grouped(runs):
        found = [row for run in group for row in run.nets["found"]]
        costs = {m: fmean(r[m] for r in found) if all(m in r for r in found) else None for m in METRICS}
        tops, more = top1s(group), len(group) - 1
        differences = {f"minus_{rule}": paired_difference(group, rule) for rule in RULES}
        table.append({
            "run": group[0].folder.absolute().name + (f" and {more} more" if more else ""),
            "seeds": len(group),
            "budget": group[0].limits,
            **costs,
            **{kind: tops.get(kind, []) for kind in KINDS},
            **{key: d and [v if math.isfinite(v) else None for v in d] for key, d in differences.items()},
        })  # fmt: skip
    return table


HEADS = ["run", "seeds", "budget", "MACs", "parameters", "ms", *KINDS, *(f"found - {rule}" for rule in RULES)]


def as_text(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """(heads, cells): the rows of `experiments` as text. Columns of `HEADS` without any content are left out."""

    def spread(values: Sequence[float]) -> str:
        mean = f"{fmean(values):.2f}" if values else ""
        return mean + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")

    def difference(ends: Sequence[float | None]) -> str:
        known = [f"{v:+.2f}" for v in ends if v is not None]
        return known[0] + (f" [{known[1]}, {known[2]}]" if len(known) > 1 else "") if known else ""

    table = []
    for row in rows:
        budget = ", ".join(show(metric, limit) for metric, limit in row["budget"].items())
        costs = ["" if row[m] is None else show(m, row[m]) for m in METRICS]
        tops = [spread(row[kind]) for kind in KINDS]
        differences = [difference(row[f"minus_{rule}"] or []) for rule in RULES]
        table.append([row["run"], str(row["seeds"]), budget, *costs, *tops, *differences])
    told = [k for k in range(len(HEADS)) if any(row[k] for row in table)]
    return [HEADS[k] for k in told], [[row[k] for k in told] for row in table]


def write_comparison(path: Path, runs: Sequence[Run]) -> None:
    """Write a page with the table of `experiments` and, for every metric, a plot of top-1 against cost."""
    groups, drawn = grouped(runs), []
    for metric, text in (("macs", "MACs"), ("params", "parameters"), ("ms", "milliseconds")):
        points = []
        for group in groups:
            for kind, tops in top1s(group).items():
                costs = [row[metric] for run in group for row in run.nets[kind] if metric in row]
                if costs:
                    points.append((group[0].folder.absolute().name, kind, fmean(costs), tops))
        if points:
            drawn.append((f"Top-1 against {text}", "", Markup(plots.pareto(metric, points))))
    _page(
        path,
        title=f"{sum(map(len, groups))} runs",
        word=("open", f"{len(groups)} experiment{'s' * (len(groups) > 1)}"),
        sentence="Runs that differ in the seed only are one experiment: mean and standard deviation of its trainings; "
        "differences paired by run, with the 95 % interval.",
        tables=[("", *as_text(experiments(runs)))],
        pictures=drawn,
        told="",
    )
