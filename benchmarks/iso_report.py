#!/usr/bin/env python3
"""Tables and pictures of benchmarks/README.md and of the project's README.md, from the rows in results/ alone.

python benchmarks/iso_report.py
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import iso_stats as stats
import matplotlib
from iso_flops import Table, judge_method, summarise
from iso_setups import SETUPS, Setup
from variants import baseline_of

from dnas.methods.rules import RULES

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

HERE = Path(__file__).parent
RANGED = "{0:.2f} [{1:.2f}, {2:.2f}]"  # median, least, most


def number(value: float | None, digits: int = 2) -> str:
    """A figure, or a dash where there is none."""
    return "-" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def with_ends(interval: stats.Interval) -> str:
    """Mean and 95 % interval; a dash where there is none."""
    if not math.isfinite(interval[0]):
        return "-"
    return f"{interval[0]:+.2f} [{interval[1]:+.2f}, {interval[2]:+.2f}]"


def setup_table(rows: list[dict]) -> str:
    """One line a set-up: is there anything to find, and where do the nets stand that cost nothing to choose?"""
    heads = ["set-up", "random nets", "noise of a net's mean", "spread", "spread / noise", "random mean", "best"]
    heads += RULES
    lines = []
    for row in rows:
        ratio = row["spread"] / row["noise_of_mean"]
        cells = [row["setup"], f"{row['n_random']} x {row['seeds_per_net']:.2g} seeds"]
        cells += [number(row["noise_of_mean"]), number(row["spread"]), number(ratio), number(row["random_mean"])]
        cells.append(number(row["best_random"]))
        lines.append([*cells, *(f"{number(row[r])} (percentile {number(row[f'{r}_percentile'], 0)})" for r in RULES)])
    return markdown(heads, lines)


def method_table(table: Table, baseline: str) -> list[str]:
    """One line a method of one set-up, of those that are compared with ``baseline``; empty if there are none."""
    rules = [f"minus {rule}" for rule in RULES]
    head = ["method", "searches", "top-1", "percentile", *rules, "minus random mean", f"minus {baseline}"]
    lines = ["| " + " | ".join([*head, "cost in trainings"]) + " |", "| --- " * (len(head) + 1) + "|"]
    for method in stats.methods(stats.scores_of(table.rows)):
        if baseline_of(method) == baseline and (row := judge_method(table, method)):
            cells = [method, str(row["search_seeds"]), number(row["found_top1"]), number(row["found_percentile"], 0)]
            cells += [with_ends(row[f"found_minus_{other}"]) for other in (*RULES, "random")]
            cells.append("-" if method == baseline else with_ends(row["found_minus_baseline"]))
            lines.append("| " + " | ".join([*cells, number(row["search_in_trainings"], 1)]) + " |")
    return lines if len(lines) > 2 else []


def widest_top1(setup: Setup, tables: Sequence[Table]) -> float | None:
    """Mean top-1 of the widest net, which is one for set-ups that differ in the budget; None if nobody trained it."""
    alike = (t for t in tables if replace(SETUPS[t.path.stem], budget=setup.budget) == setup)
    scores = [score for table in alike for score in stats.scores_of(table.rows).get("full", {}).values()]
    return fmean(scores) if scores else None


def results_table(tables: Sequence[Table]) -> str:
    """One line a set-up for the project's README: found nets, compared with those of rules and random ones."""

    def difference(ends: stats.Interval) -> str:
        return f"**{with_ends(ends)}**" if ends[1] > 0 or ends[2] < 0 else with_ends(ends)

    lines = []
    for table in tables:
        if row := judge_method(table, "default"):
            setup, scores = SETUPS[table.path.stem], stats.scores_of(table.rows)
            net = f"`{setup.supernet}`" + (" (narrower)" if {"channels", "embed_dim"} & {*setup.kwargs} else "")
            data = f"{'digits' if setup.data == 'digits' else 'CIFAR-10'}, {setup.num_train}, {setup.img_size} px"
            tops = [fmean(scores[rule].values()) if rule in scores else None for rule in RULES]
            tops += [summarise(table)["random_mean"], widest_top1(setup, tables)]
            cells = [net, setup.budget, data, row["search_seeds"], row["found_top1"], *tops]
            lines.append([*cells, *(difference(row[f"found_minus_{other}"]) for other in (*RULES, "random"))])
    heads = ["space", "budget", "images", "searches", "found", *RULES, "random", "widest net"]
    heads += [f"found - {other}" for other in (*RULES, "random")]
    told = [k for k in range(len(heads)) if any(line[k] is not None for line in lines)]
    return markdown([heads[k] for k in told], [[line[k] for k in told] for line in lines])


def draw(table: Table) -> Path:
    """Histogram of the random nets, with those of the rules and every found net marked."""
    name, scores = table.path.stem, stats.scores_of(table.rows)
    means = [fmean(s.values()) for s in stats.of_method(scores, "random").values()]
    figure, axes = plt.subplots(figsize=(7, 3))
    axes.hist(means, bins=20, color="0.8", label=f"{len(means)} random nets")
    for rule, line in zip(RULES, ("--", ":"), strict=True):
        if rule in scores:
            axes.axvline(fmean(scores[rule].values()), color="black", linestyle=line, label=rule)
    methods = stats.methods(scores)
    top = axes.get_ylim()[1]
    for k, method in enumerate(methods):
        x = [fmean(s.values()) for s in stats.of_method(scores, method).values()]
        height = top * (0.95 - 0.9 * k / max(1, len(methods)))
        axes.plot(x, [height] * len(x), "o", markersize=4, label=method)
    axes.set_xlabel("top-1 from scratch, %")
    axes.set_title(f"{name}: nets of equal cost")
    axes.legend(fontsize=6, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.tight_layout()
    path = HERE / f"{name}.svg"
    matplotlib.rcParams["svg.hashsalt"] = "dnas"  # the same rows give the same file
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return path


def markdown(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table; floats with two digits, [median, least, most] as such, nothing as a dash."""

    def cell(value: object) -> str:
        if isinstance(value, list):
            return RANGED.format(*value)
        return "-" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)

    lines = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(map(cell, row))} |" for row in rows)])


SPEED: dict[str, dict[str, str]] = {  # section of speed.json -> key of its rows -> how it is headed
    "search": {
        "net": "network", "plain_ms": "plain step, ms", "relative_cost_mean": "whole search",
        "relative_cost_first": "first steps", "relative_cost_last": "last steps",
        "plain_step_of_last_net": "plain step of the last net", "macs_left": "MACs left",
        "shrink_in_steps": "a shrink, in steps", "shrinks": "shrinks", "measured": "measured",
    },
    "memory": {
        "net": "network", "plain_mb": "plain", "search_mb": "search", "peak_memory_ratio": "ratio",
        "plain_in_use_mb": "in use: plain", "search_in_use_mb": "search", "in_use_ratio": "ratio",
        "heaviest_in_use_mb": "heaviest net", "in_use_ratio_to_heaviest": "ratio to it",
    },
    "modes": {
        "net": "network", "plain_ms": "plain step, ms", "bfloat16": "bfloat16", "compiled": "compiled",
        "compile_s": "s to compile",
    },
    "gates": {
        "model": "network", "plain_ms": "plain step, ms", "open": "every channel", "drawn": "widths drawn evenly",
        "soft": "soft gates",
    },
}  # fmt: skip


def speed_parts(found: dict) -> dict[str, str]:
    """Section -> its table."""
    parts = {
        section: markdown([*heads.values()], [[row.get(key) for key in heads] for row in found[section]])
        for section, heads in SPEED.items()
    }
    shares = [[r["net"], *(100 * v for v in r["expected_cost_share"][:3]), 100 * r["expected_cost_of_search"]]
              for r in found["search"]]  # fmt: skip
    heads = ["network", "% of a step: median", "least", "most", "% of the search"]
    parts["expected"] = markdown(heads, shares)
    scales = []
    for row in found["scale"]:
        for k, count in enumerate(row["counts"]):
            scales.append([row["what"], count, row["step_ratio"][k], row["memory_ratio"][k]])
    parts["scale"] = markdown(["what", "how many", "step", "peak memory"], scales)
    told = f"{found['device']}, {found['threads']} threads, torch {found['torch']}, timm {found['timm']}"
    parts["machine"] = f"{told}, {found['date']}: `python {found['command']}`."
    return parts


def public_table(rows: Sequence[dict]) -> str:
    """Where networks lie in the public tables: percentile (regret) at each budget, and the means over budgets."""
    parts = []
    for space, dataset in dict.fromkeys((r["space"], r["dataset"]) for r in rows):
        own = [r for r in rows if (r["space"], r["dataset"]) == (space, dataset)]
        budgets = list(dict.fromkeys(r["budget"] for r in own))
        lines = []
        for method in dict.fromkeys(r["method"] for r in own):
            at = {r["budget"]: r for r in own if r["method"] == method}
            cells = [f"{at[b]['percentile']:.0f} ({at[b]['regret']:.2f})" if b in at else "-" for b in budgets]
            means: list[float | None] = [None] * 3
            if len(at) == len(budgets):
                means = [fmean(r[key] for r in at.values()) for key in ("percentile", "regret")]
                means.append(fmean(r["minus_balanced"][0] for r in at.values()))
            lines.append([method, min(r["searches"] for r in at.values()), *cells, *means])
        lines.sort(key=lambda line: -(line[-3] or 0))
        heads = ["method", "searches", *budgets, "mean percentile", "mean regret", "minus balanced"]
        parts.append(f"{space}, {dataset}:\n\n{markdown(heads, lines)}")
    return "\n\n".join(parts)


def write(path: Path, parts: dict[str, str]) -> None:
    """Put each part between its marks in a file."""
    text = path.read_text()
    for name, content in parts.items():
        begin, end = f"<!-- iso_report.py: {name} -->", f"<!-- end of {name} -->"
        before, rest = text.split(begin)
        text = f"{before}{begin}\n\n{content}\n\n{end}{rest.split(end)[1]}"
    path.write_text(text)


def main() -> None:
    """Rewrite the parts of both README.md between the marks."""
    tables = [table for table in map(Table, SETUPS) if table.rows]
    parts = [setup_table([summarise(table) for table in tables])]
    for table in tables:
        name, row, best = table.path.stem, summarise(table), judge_method(table, "default")
        setup = SETUPS[name]
        net = f"{setup.supernet} x {setup.width_mult}" if setup.width_mult != 1 else f"timm's {setup.supernet}"
        net += f" with {dict(setup.kwargs)}" if setup.kwargs else ""
        what = f"{net} at {setup.budget}, {setup.num_train} images of {setup.img_size} px"
        parts.append(f"## {name}\n\n{what} ({setup.data}), {setup.recipe.epochs} epochs from scratch.")
        parts.append(f"![top-1 of nets of equal cost]({draw(table).name})")
        if best:
            parts.append("\n".join(method_table(table, "default")))
            parts.append(f"Best of N random nets at equal compute: {number(best['best_of_equal_compute'])}.")
        for baseline, what in (("older", "the older search"), ("half-length", "a search of half its length")):
            if ablations := method_table(table, baseline):
                parts.append(f"Ablations of {what}:\n\n" + "\n".join(ablations))
        if math.isfinite(row["rank_correlation"]):
            agreed = f"{number(row['rank_correlation'])} with norms recalibrated for each net, "
            agreed += f"{number(row['rank_correlation_running'])} with running statistics"
            parts.append(f"Rank correlation of shared weights with training from scratch: {agreed}.")
        seen = sorted({f"{r['device']}, torch {r['torch']}, timm {r['timm']}" for r in table.rows})
        days = sorted({r["date"] for r in table.rows})
        parts.append(f"Machine: {'; '.join(seen)}; {days[0]} to {days[-1]}.")
    speed = json.loads((HERE / "results" / "speed.json").read_text())
    public = json.loads((HERE / "results" / "public_tables.json").read_text())
    found = {**speed_parts(speed), "public": public_table(public), "methods": "\n\n".join(parts)}
    write(HERE / "README.md", found)
    write(HERE.parent / "README.md", {"results": results_table(tables)})


if __name__ == "__main__":
    main()
