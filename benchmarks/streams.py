#!/usr/bin/env python3
"""How much should a stream's width count in the rule for balanced widths? Nets of three rules on other networks.

python benchmarks/streams.py --seeds 3 --jobs 2      # hours of two cores
python benchmarks/streams.py --report

Balanced widths have the largest product at the cost of the budget. There each decision counts once, however many layers
write or read it. A width that counts once for each layer that writes it (``writers``), or that writes or reads it
(``layers``), is the alternative. The networks here decide on this; no other benchmark uses them. A training is a row in
results/streams.jsonl, appended when it ends, and is not done again.
"""

import argparse
import multiprocessing
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from datetime import date
from functools import partial
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import iso_flops as lab_of  # noqa: E402
import iso_stats as stats  # noqa: E402
from iso_flops import Table, net_row, train_all, work  # noqa: E402
from iso_report import markdown, number, with_ends  # noqa: E402
from iso_setups import ADAMW, EIGHT, RESULTS, SEARCH, SLOWER, Lab, Setup, open_lab  # noqa: E402
from public_tables import LAYERS, WRITERS, weighted  # noqa: E402

from dnas.methods.rules import RULES  # noqa: E402
from dnas.report.metrics import interval  # noqa: E402
from dnas.runtime.run_folder import provenance  # noqa: E402
from dnas.spec.recipe import Recipe  # noqa: E402
from dnas.spec.space import Arch  # noqa: E402

SLOW = replace(ADAMW, epochs=8, **SLOWER)


def small(name: str, budget: str, recipe: Recipe, **kwargs: object) -> Setup:
    """A small network of timm's on a tenth of CIFAR-10."""
    return Setup(name, 1, 4, budget, "cifar10", 5000, 32, recipe, SEARCH, 2, kwargs=kwargs)


NETWORKS = {
    "bottleneck": small("resnet26", "30%", EIGHT, layers=[2, 2, 2, 2], channels=[8, 16, 24, 32]),
    "basic": small("resnet34", "30%", EIGHT, layers=[4, 4, 4, 2], channels=[16, 24, 32, 48]),
    "convnext": small("convnext_atto", "30%", SLOW, depths=[2, 2, 4, 2], dims=[24, 40, 64, 96], patch_size=2),
    "vit": small(
        "vit_tiny_patch16_224", "30%", SLOW, img_size=32, patch_size=4, embed_dim=72, depth=6, num_heads=3
    ),
    "mnasnet": small("mnasnet_small", "30%", EIGHT, output_stride=8),
    "regnety": small("regnety_002", "20%", EIGHT, output_stride=8),
}  # fmt: skip


def by_uses(lab: Lab, roles: Sequence[str]) -> Arch:
    """The net of `public_tables.weighted` in which a width counts once for each layer that has it in these roles."""
    return weighted(lab.net.space, lab.tables, lab.budgets, 1, roles)


WAYS = {
    **{name: (lambda lab, rule=rule: rule(lab.net.space, lab.tables, lab.budgets)) for name, rule in RULES.items()},
    "writers": partial(by_uses, roles=WRITERS),
    "layers": partial(by_uses, roles=LAYERS),
}


def run(args: argparse.Namespace) -> None:
    """Add the trainings that the table lacks; equal nets of a network are trained once."""
    table = Table("streams")
    RESULTS.mkdir(exist_ok=True)
    for name in args.network:
        setup = NETWORKS[name]
        lab = open_lab(setup, args.data_dir, args.device)
        info = {"date": date.today().isoformat()} | provenance(lab.device)
        for way, choose in WAYS.items():
            if f"{name}/{way}" not in table.nets():
                table.append(net_row(lab, f"{name}/{way}", choose(lab)) | info)
        spawn, entered = multiprocessing.get_context("spawn"), (setup, args.data_dir, args.device)
        with ProcessPoolExecutor(args.jobs, spawn, initializer=lab_of._enter, initargs=entered) as pool:
            first = [*of_network(table, name)]
            train_all(first, lambda _: range(args.seeds), table, partial(work, pool=pool, info=info))


def of_network(table: Table, name: str) -> dict[str, list[str]]:
    """The different nets of a network: the first row with each -> all ways that choose it."""
    nets, found = table.nets(), dict[str, list[str]]()
    for way in (way for way in WAYS if f"{name}/{way}" in nets):
        arch = nets[f"{name}/{way}"]["arch"]
        first = next((row for row in found if nets[row]["arch"] == arch), f"{name}/{way}")
        found.setdefault(first, []).append(way)
    return found


def lines(table: Table) -> Iterator[list]:
    """A line for each network: the mean top-1 of each way, and its difference to balanced, paired by seed."""
    scores = stats.scores_of(table.rows)
    for name in NETWORKS:
        of_way = {way: scores.get(row, {}) for row, ways in of_network(table, name).items() for way in ways}
        if not all(of_way.get(way) for way in WAYS):
            continue
        seeds = sorted(set.intersection(*({*own} for own in of_way.values())))
        cells = [name, len(seeds), *(number(fmean(of_way[way][s] for s in seeds)) for way in WAYS)]
        for way in ("writers", "layers"):
            apart = [of_way[way][s] - of_way["balanced"][s] for s in seeds]
            cells.append(with_ends(interval(apart)) if any(apart) else "the same net")
        yield cells


def report() -> str:
    """The table, in Markdown."""
    heads = ["network", "seeds", *WAYS, "writers - balanced", "layers - balanced"]
    return markdown(heads, [*lines(Table("streams"))])


def main() -> None:
    """Rows, or the table."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--network", nargs="+", choices=list(NETWORKS), default=list(NETWORKS), help="default: all")
    p.add_argument("--seeds", type=int, default=3, help="trainings of each net (default: %(default)s)")
    lab_of.rows_or_report(p, run, report)


if __name__ == "__main__":
    lab_of.told(main)
