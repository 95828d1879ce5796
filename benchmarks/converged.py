#!/usr/bin/env python3
"""Nets of equal cost trained until little is left to gain: all of CIFAR-10 at 32 px, 20 epochs.

python benchmarks/converged.py resnet_50 --jobs 2      # hours of two cores: --jobs trainings side by side
python benchmarks/converged.py --report

One net of each way to choose, trained with three seeds; a training is a row in results/converged_<setup>.jsonl,
appended when it ends, and is not done again. Intervals are over training seeds: they say nothing about other searches.
"""

import argparse
import multiprocessing
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from datetime import date
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import iso_flops as lab_of  # noqa: E402
import iso_stats as stats  # noqa: E402
from iso_flops import Table, net_row, run_search, train_all, work  # noqa: E402
from iso_report import markdown, number, with_ends  # noqa: E402
from iso_setups import RESULTS, SEARCH, SETUPS, Lab, open_lab  # noqa: E402

from dnas.methods.rules import RULES  # noqa: E402
from dnas.report.metrics import interval  # noqa: E402
from dnas.runtime.run_folder import provenance  # noqa: E402
from dnas.spec.recipe import Recipe  # noqa: E402

SEEDS = 3
FULL = {"num_train": 50_000, "img_size": 32, "search": replace(SEARCH, epochs=3)}
RECIPE = Recipe(epochs=20, batch_size=128, opt="sgd", lr=0.2, weight_decay=5e-4, warmup_epochs=2)
CONVERGED = {
    f"{name}_{percent}": replace(SETUPS[like], budget=f"{percent}%", recipe=RECIPE, **FULL)
    for name, like, percent in (
        ("resnet", "timm_resnet_50", 50),
        ("resnet", "timm_resnet_50", 25),
        ("prunet", "prunet", 25),
    )
}
SEARCHES = ("default", "torch-pruning")


def choose(lab: Lab, way: str) -> dict:
    """The row of the net that a way chooses; for a process of `iso_flops`."""
    if way == "widest":
        return net_row(lab, way, lab.tables["macs"].extremes()[1])
    if way in RULES:
        return net_row(lab, way, RULES[way](lab.net.space, lab.tables, lab.budgets))
    return run_search(lab, way, 0) | {"net": way}


def run(args: argparse.Namespace) -> None:
    """Add to the table what it lacks: nets first, then trainings, one seed of every net after the other."""
    setup, table = CONVERGED[args.setup], Table(f"converged_{args.setup}")
    info = {"date": date.today().isoformat()} | provenance(open_lab(setup, args.data_dir, args.device).device)
    RESULTS.mkdir(exist_ok=True)
    entered = (setup, args.data_dir, args.device)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.jobs, spawn, initializer=lab_of._enter, initargs=entered) as pool:
        do = partial(work, pool=pool, info=info)
        ways = [*RULES, *args.method, "widest"]
        for _ in do([(choose, way) for way in ways if way not in table.nets()], table=table):
            pass
        train_all(ways, lambda name: range(SEEDS), table, do)


def lines(table: Table) -> Iterator[list[Any]]:
    """A line a net: its cost and top-1, and what it has more than the nets of rules, paired by training seed."""
    scores, nets = stats.scores_of(table.rows), table.nets()
    for way in (w for w in nets if w in scores):
        own = scores[way]
        cells: list[Any] = [way, f"{nets[way]['macs'] / 1e6:.2f}", len(own), number(fmean(own.values()))]
        for rule in RULES:
            common = [own[seed] - scores[rule][seed] for seed in own if seed in scores.get(rule, {})]
            cells.append(with_ends(interval(common)) if way != rule and common else "-")
        yield cells


def report() -> str:
    """The tables of all set-ups that have rows, in Markdown."""
    heads = ["net", "MMACs", "seeds", "top-1", *(f"minus {rule}" for rule in RULES)]
    tables = {name: Table(f"converged_{name}") for name in CONVERGED}
    return "\n\n".join(f"{name}:\n\n{markdown(heads, [*lines(t)])}" for name, t in tables.items() if t.rows)


def main() -> None:
    """Rows, or the tables."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("setup", nargs="?", choices=list(CONVERGED), default="resnet_50")
    p.add_argument("--method", nargs="+", choices=SEARCHES, default=list(SEARCHES), help="default: all")
    lab_of.rows_or_report(p, run, report)


if __name__ == "__main__":
    lab_of.told(main)
