#!/usr/bin/env python3
"""All methods side by side: what their networks reach, and what it costs to find them.

python benchmarks/arena.py --run --search 3 --jobs 1     # what is missing: public tables, then two set-ups; takes days
python benchmarks/arena.py                               # the tables of both README.md, and arena.svg, from the rows

The judges are the public tables (`public_tables.py`) and two set-ups whose networks are trained here (`iso_flops.py`).
``--run`` needs their data: --data-dir or DNAS_CIFAR10, --tables or DNAS_TABLES.
"""

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median

import matplotlib
from iso_flops import OWN, THRESHOLD, Table, judge_method
from iso_report import HERE, markdown, with_ends, write

from dnas.methods.rules import RULES
from dnas.report.metrics import interval

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

SPACES, OWN_SETUPS = ("nats", "mobilenet"), ("timm_resnet_50", "digits_25")
METHODS = ("default", *OWN, *(name + THRESHOLD for name in OWN))
TOP = 8  # lines of the project's README
# Published: networks of the first method are better than those of the second, after fine-tuning.
CLAIMS = {
    ("lasso", "l1"): "Channel Pruning, He et al., ICCV 2017: VGG-16 on ImageNet",
    ("hrank", "l1"): "HRank, Lin et al., CVPR 2020: ResNet-56 on CIFAR-10",
    ("taylor", "l1"): "Importance Estimation, Molchanov et al., CVPR 2019: correlation with an oracle",
}


def run(args: argparse.Namespace) -> None:
    """Everything that is missing, one benchmark after the other; each keeps its rows as they come."""
    how = ["--search", str(args.search), "--jobs", str(args.jobs), "--data-dir", args.data_dir]
    for space in SPACES:
        command = [str(HERE / "public_tables.py"), space, *how, "--tables", args.tables, "--method", *METHODS]
        subprocess.run([sys.executable, *command], check=True)
    for setup in OWN_SETUPS:
        command = [str(HERE / "iso_flops.py"), setup, *how, "--variant", *METHODS]
        subprocess.run([sys.executable, *command], check=True)


def effort(method: str) -> tuple[float, float] | None:
    """Seconds and images of a search in the space of NATS-Bench, at the median; None if there is none."""
    nets = Table("public_nats").nets().items()
    rows = [row for name, row in nets if name.split("/")[1] == method and "search_seconds" in row]
    if not rows:
        return None
    return median(row["search_seconds"] for row in rows), median(row["search_images"] for row in rows)


def rows_of(public: Sequence[Mapping]) -> list[dict]:
    """A row for each method with results: the mean percentile in each public table, and what it reaches in set-ups.

    A table counts where all its budgets have a network of the method.
    """
    cells = {(r["space"], r["dataset"], r["budget"]) for r in public}
    rows = []
    for method in (*RULES, "random", *METHODS):
        row: dict = {"method": method, "effort": effort(method)}
        for space, dataset in sorted({cell[:2] for cell in cells}):
            own = [r for r in public if (r["space"], r["dataset"], r["method"]) == (space, dataset, method)]
            if {r["budget"] for r in own} == {b for s, d, b in cells if (s, d) == (space, dataset)}:
                row[f"{space}, {dataset}"] = fmean(r["percentile"] for r in own)
                of_searches = [fmean(column) for column in zip(*(r["percentiles"] for r in own), strict=False)]
                row["ends"] = row.get("ends", {}) | {f"{space}, {dataset}": interval(of_searches)[1:]}
                row["searches"] = min(row.get("searches", 10**9), *(r["searches"] for r in own))
        for setup in OWN_SETUPS:
            table = Table(setup)
            if method in RULES or method == "random":
                continue
            if judged := judge_method(table, method):
                row[setup] = judged["found_minus_balanced"]
        if len(row) > 2:
            rows.append(row)
    return sorted(rows, key=lambda r: -fmean(v for k, v in r.items() if "," in k) if any("," in k for k in r) else 0.0)


def placed(row: Mapping, judge: str) -> str | None:
    """The mean percentile in a public table, with its 95 % interval over searches if there are two or more."""
    if judge not in row:
        return None
    low, high = row["ends"][judge]
    ends = f" [{max(0.0, low):.1f}, {min(100.0, high):.1f}]" if math.isfinite(low) else ""
    return f"{row[judge]:.2f}{ends}"


def arena_table(rows: Sequence[Mapping]) -> str:
    """One line a method."""
    judges = sorted({key for row in rows for key in row if "," in key})
    lines = []
    for row in rows:
        seconds, images = row["effort"] or (None, None)
        found = [with_ends(row[setup]) if setup in row else "-" for setup in OWN_SETUPS]
        cost = ["-" if seconds is None else f"{seconds:.0f}", "-" if images is None else f"{images:.0f}"]
        places = [placed(row, judge) for judge in judges]
        lines.append([row["method"], row.get("searches"), *places, *found, *cost])
    heads = ["method", "searches", *(f"percentile in {judge}" for judge in judges)]
    heads += [*(f"{setup}, minus balanced" for setup in OWN_SETUPS), "seconds", "images"]
    return markdown(heads, lines)


def claims_table(public: Sequence[Mapping]) -> str:
    """Published claims by the public tables: for each pair and cut, in how many budgets the first method is better."""
    cells = {(r["space"], r["dataset"], r["budget"], r["method"]): r for r in public}
    lines = []
    for pair, source in CLAIMS.items():
        for cut in (THRESHOLD, ""):
            first, second = (name + cut for name in pair)
            both = [(r, cells.get((*key[:3], second))) for key, r in cells.items() if key[3] == first]
            both = [(a, b) for a, b in both if b]
            if not both:
                continue
            gaps = [a["minus_balanced"][0] - b["minus_balanced"][0] for a, b in both]
            tally = f"{sum(g > 0 for g in gaps)} / {sum(g == 0 for g in gaps)} / {sum(g < 0 for g in gaps)}"
            mean = f"{fmean(gaps):+.2f} [{min(gaps):+.2f}, {max(gaps):+.2f}]"
            searches = min(row["searches"] for rows in both for row in rows)
            lines.append([first, second, source, searches, tally, mean])
    heads = ["method", "published as better than", "where", "searches", "better / equal / worse", "points of top-1"]
    return markdown(heads, lines)


def draw(rows: Sequence[Mapping]) -> None:
    """Quality against the cost of the search: the mean percentile on NATS-Bench's CIFAR-10."""
    judge = "nats, cifar10"
    figure, axes = plt.subplots(figsize=(7, 4))
    for row in rows:
        if judge in row:
            x = max(1.0, (row["effort"] or (1.0, 0.0))[0])
            axes.plot(x, row[judge], "o", color="0.3" if row["method"].endswith(THRESHOLD) else "C0")
            axes.annotate(row["method"], (x, row[judge]), fontsize=7, xytext=(4, 2), textcoords="offset points")
    axes.set_xscale("log")
    axes.set_xlabel("seconds of a search (1: none)")
    axes.set_ylabel("mean percentile among networks of equal cost")
    figure.tight_layout()
    matplotlib.rcParams["svg.hashsalt"] = "dnas"  # the same rows give the same file
    figure.savefig(HERE / "arena.svg", metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    """The missing searches, or the tables."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--run", action="store_true", help="search and train what is missing")
    p.add_argument("--search", type=int, default=3, help="seeds of each method (default 3)")
    p.add_argument("--jobs", type=int, default=2, help="processes of one thread each (default 2)")
    p.add_argument("--data-dir", default=os.environ.get("DNAS_CIFAR10", ""), help="CIFAR-10 as a tar of images")
    p.add_argument("--tables", default=os.environ.get("DNAS_TABLES", ""), help="folder of the public tables")
    args = p.parse_args()
    if args.run:
        run(args)
        return
    public = json.loads((HERE / "results" / "public_tables.json").read_text())
    rows = rows_of(public)
    draw(rows)
    write(HERE / "README.md", {"arena": arena_table(rows), "claims": claims_table(public)})
    write(Path(HERE.parent / "README.md"), {"arena": arena_table(rows[:TOP])})


if __name__ == "__main__":
    main()
