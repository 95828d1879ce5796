#!/usr/bin/env python3
"""An outside judge: where a found network lies among all networks of equal cost that others have trained to the end.

python benchmarks/public_tables.py nats --tables DIR --search 3 --method default l1   # DIR, or DNAS_TABLES
python benchmarks/public_tables.py mobilenet --tables DIR --search 3
python benchmarks/public_tables.py --tables DIR --summary --json benchmarks/results/public_tables.json

nats: the size search space of NATS-Bench (Dong et al., TPAMI 2021, arXiv 2009.00437): 32,768 networks of five widths,
    90 epochs each, CIFAR-10 and CIFAR-100. DIR/nats_sss.csv.gz has the columns c0..c4, acc_cifar10, acc_cifar100 (and
    any other acc_*) and macs_cifar10.
mobilenet: Channel-Bench-Macro (Su et al., BCNet, TPAMI 2022): 16,384 MobileNets of seven widths, 60 epochs, three
    trainings each, CIFAR-10. DIR/channel_bench_macro_mobilenet.csv.gz has the columns w0..w6 as digits of ``key``
    (quarters of the full width), mean and macs.

Searches see CIFAR-10 (JPEG) at 16 pixels; a table's networks were trained at 32, and costs are those of 32. A search is
a row in results/public_<space>.jsonl, and is not done again. Accuracies stay in DIR: they are looked up by --summary.
"""

import argparse
import csv
import gzip
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import iso_stats as stats  # noqa: E402
import numpy as np  # noqa: E402
import opponents  # noqa: E402
import table_networks  # noqa: E402
import torch  # noqa: E402
from iso_flops import (  # noqa: E402
    OTHERS,
    Table,
    add_work_flags,
    chosen,
    net_row,
    rounded,
    run_search,
    told,
    training_of,
)
from iso_setups import RESULTS, SEARCH, SGD, Lab, Setup, open_lab, outline_of, supernet_of  # noqa: E402
from variants import VARIANTS  # noqa: E402

from dnas.methods.derive import derive  # noqa: E402
from dnas.methods.rules import RULES, random_arch  # noqa: E402
from dnas.report.metrics import interval  # noqa: E402
from dnas.runtime.run_folder import provenance, write_json  # noqa: E402
from dnas.spec.budget import Budget  # noqa: E402
from dnas.spec.checks import UserError  # noqa: E402
from dnas.spec.cost import CostTable  # noqa: E402
from dnas.spec.space import Arch, Space  # noqa: E402

ONE_EPOCH = replace(SEARCH, epochs=1)
SPACES = {
    "nats": Setup(
        *("nats_size", 1, 8, "50%", "cifar10", 50_000, 16, SGD, ONE_EPOCH, 1),
        ties=table_networks.NATS_TIES,
        cost_size=32,
    ),
    "mobilenet": Setup(
        *("channel_bench_mobilenet", 1, 32, "50%", "cifar10", 50_000, 16, SGD, ONE_EPOCH, 1),
        most_widths=4,
        cost_size=32,
    ),
}
BUDGETS = {"nats": (10, 25, 50, 75), "mobilenet": (15, 25, 35, 50, 75)}  # percent of the widest network's MACs
RANDOM = 20  # random networks a budget: what chance gives


@dataclass(frozen=True)
class Judge:
    """A public table: the networks' widths [N, decisions], MACs [N], and top-1 in % on each data set [N]."""

    widths: np.ndarray
    macs: np.ndarray
    top1: dict[str, np.ndarray]

    def look_up(self, arch: dict[str, int], dataset: str, percent: float) -> dict[str, float]:
        """A network's top-1, and its percentile and regret among all of 98 to 100 % of the budget."""
        limit, top1 = percent / 100 * self.macs.max(), self.top1[dataset]
        (found,) = np.flatnonzero((self.widths == [*arch.values()]).all(1))
        others = top1[(self.macs >= 0.98 * limit) & (self.macs <= limit)]
        percentile = stats.percentile(top1[found], [*others])
        return {"top1": float(top1[found]), "percentile": percentile, "regret": float(others.max() - top1[found])}


def read_judge(space: str, folder: str) -> Judge:
    """The table of a space. Raises UserError if its file is not there or lacks a column."""
    name = {"nats": "nats_sss.csv.gz", "mobilenet": "channel_bench_macro_mobilenet.csv.gz"}[space]
    path = Path(folder) / name
    if not folder or not path.is_file():
        raise UserError(f"--tables {folder!r} (or DNAS_TABLES): a folder with {name} is expected")
    try:
        with gzip.open(path, "rt") as file:
            rows = list(csv.DictReader(file))
        if space == "nats":
            widths = np.array([[int(row[f"c{k}"]) for k in range(5)] for row in rows])
            names, macs = {c.removeprefix("acc_"): c for c in rows[0] if c.startswith("acc_")}, "macs_cifar10"
        else:
            quarters = np.array([[int(digit) for digit in row["key"]] for row in rows])
            widths, names, macs = quarters * table_networks.MOBILENET_WIDTHS // 4, {"cifar10": "mean"}, "macs"
        top1 = {dataset: np.array([float(row[column]) for row in rows]) for dataset, column in names.items()}
        return Judge(widths, np.array([float(row[macs]) for row in rows]), top1)
    except (KeyError, IndexError, ValueError, OSError, EOFError) as error:
        raise UserError(f"{path} is no such table: {type(error).__name__} {error}") from None


# The work, in processes of one thread each.

_lab: Lab | None = None


def _enter(space: str, data_dir: str, device: str) -> None:
    global _lab
    torch.set_num_threads(1)
    _lab = open_lab(SPACES[space], data_dir, device)


def goal(macs: float, percent: int) -> tuple[Budget, ...]:
    """A share of the widest network of the table, which has ``macs``."""
    return (Budget("macs", percent / 100 * macs),)


def search_all(macs: float, methods: list[str], seed: int, percents: tuple[int, ...]) -> list[dict]:
    """The rows of the networks of one method, or of methods that train alike, for these budgets."""
    assert _lab is not None
    method = methods[0]
    goals = [goal(macs, percent) for percent in percents]
    if method == "evolution":
        started = time.perf_counter()
        net, x, y, seen = opponents.shared_weights(_lab, seed)
        shared = {"search_seconds": round(time.perf_counter() - started, 1), "search_images": seen}
        archs = [opponents.evolve(_lab, budgets, net, x, y, seed)[0] for budgets in goals]
        return [row_of(_lab, p, method, seed, arch, shared) for p, arch in zip(percents, archs, strict=True)]
    if training_of(method):
        rows = []
        for name, (archs, found) in chosen(_lab, methods, seed, goals).items():
            rows += [row_of(_lab, p, name, seed, arch, found) for p, arch in zip(percents, archs, strict=True)]
        return rows
    rows = [run_search(replace(_lab, budgets=budgets), method, seed) for budgets in goals]
    return [row | {"net": f"{percent}%/{method}/{seed}"} for percent, row in zip(percents, rows, strict=True)]


def row_of(lab: Lab, percent: int, method: str, seed: int, arch, found: dict) -> dict:
    """A row of results/public_<space>.jsonl."""
    return net_row(lab, f"{percent}%/{method}/{seed}", arch) | found


def run(args: argparse.Namespace) -> None:
    """Add the searches to the rows that are not there yet; rules and random networks, which need no images, always."""
    judge, table = read_judge(args.space, args.tables), Table(f"public_{args.space}")
    RESULTS.mkdir(exist_ok=True)
    lab = open_lab(SPACES[args.space], args.data_dir, args.device)
    info = {"date": date.today().isoformat()} | provenance(lab.device)
    macs, percents = float(judge.macs.max()), tuple(args.budget or BUDGETS[args.space])
    for percent in percents:
        space, budgets = lab.net.space, goal(macs, percent)
        for rule, choose in RULES.items():
            if f"{percent}%/{rule}/0" not in table.nets():
                table.append(row_of(lab, percent, rule, 0, choose(space, lab.tables, budgets), {}) | info)
        for k in range(RANDOM):
            if f"{percent}%/random/{k}" not in table.nets():
                arch = random_arch(space, lab.tables, budgets, k)
                table.append(row_of(lab, percent, "random", k, arch, {}) | info)
    jobs: list[tuple[float, list[str], int, tuple[int, ...]]] = []
    for seed in range(args.search):
        shared: dict[tuple, list[str]] = {}  # (training, budgets that are missing) -> methods
        for method in args.method:
            missing = tuple(p for p in percents if f"{p}%/{method}/{seed}" not in table.nets())
            training = method if method == "evolution" else training_of(method)
            if training and missing:
                shared.setdefault((training, missing), []).append(method)
            elif not training:
                jobs += [(macs, [method], seed, (percent,)) for percent in missing]
        jobs += [(macs, methods, seed, missing) for (_, missing), methods in shared.items()]
    entered = (args.space, args.data_dir, args.device)
    with ProcessPoolExecutor(
        args.jobs, multiprocessing.get_context("spawn"), initializer=_enter, initargs=entered
    ) as pool:
        for future in as_completed([pool.submit(search_all, *job) for job in jobs]):
            for row in future.result():
                table.append(row | info)
                print(f"{row['net']}: {row['macs']} MACs, {row['search_seconds']} s", flush=True)


def summary(folder: str) -> list[dict]:
    """A row for each space, data set, budget and method."""
    rows = []
    for space in SPACES:
        nets = Table(f"public_{space}").nets()
        judge = read_judge(space, folder) if nets else None
        groups: dict[tuple[str, str], list[dict]] = {}
        for name, row in nets.items():
            percent, method, _ = name.split("/")
            groups.setdefault((percent, method), []).append(row)
        for dataset in judge.top1 if judge else ():
            for (percent, method), group in groups.items():
                share = float(percent.rstrip("%"))
                found = [judge.look_up(row["arch"], dataset, share) for row in group]
                (rule,) = groups[percent, "balanced"]
                balanced = judge.look_up(rule["arch"], dataset, share)["top1"]
                rows.append(
                    {
                        **{"space": space, "dataset": dataset, "budget": percent, "method": method},
                        "searches": len(found),
                        "percentile": fmean(f["percentile"] for f in found),
                        "percentiles": [f["percentile"] for f in found],
                        "regret": fmean(f["regret"] for f in found),
                        "minus_balanced": interval([f["top1"] - balanced for f in found]),
                        "widths": [[*row["arch"].values()] for row in group][:10],
                    }
                )
    return rows


WRITERS, LAYERS = ("out",), ("in", "out")  # the layers that write a width; those that read or write it


def uses(space: Space, roles: Sequence[str] = WRITERS) -> Counter[str]:
    """Width decision -> the number of layers that have it in these roles."""
    sites = [site for site in space.sites if site.fixed.get("macs")]
    found = {(role, site.layer, site.widths[role]) for site in sites for role in roles}
    return Counter(width for _, _, width in found if isinstance(width, str))


def weighted(
    space: Space,
    tables: Mapping[str, CostTable],
    budgets: Sequence[Budget],
    power: float,
    roles: Sequence[str] = WRITERS,
) -> Arch:
    """As `dnas.methods.rules.balanced_arch`, but a width counts (its number of `uses`) ** power."""
    count = uses(space, roles)
    like = {d.name: count[d.name] ** power * np.log(d.options) for d in space.decisions}
    return derive(space, tables, budgets, like)


def by_writers(folder: str, powers: list[float]) -> None:
    """Print the mean percentiles of the networks of `weighted`; "layers" counts those that read a width, too."""
    for space, setup in SPACES.items():
        judge, net = read_judge(space, folder), supernet_of(outline_of(setup, 10)).space
        tables = {"macs": CostTable.build(net, "macs")}
        goals = [(percent, goal(float(judge.macs.max()), percent)) for percent in BUDGETS[space]]
        for power, roles in [*((power, WRITERS) for power in powers), (1.0, LAYERS)]:
            archs = [(weighted(net, tables, budgets, power, roles), percent) for percent, budgets in goals]
            for dataset in judge.top1:
                places = [judge.look_up(dict(arch), dataset, percent)["percentile"] for arch, percent in archs]
                what = f"power {power:g}" if roles == WRITERS else "layers"
                print(f"{space} {dataset} {what}: percentile {fmean(places):.1f}")


def in_order(rows: Iterable[dict]) -> list[dict]:
    """By space, data set and method, with the budgets ascending."""
    return sorted(rows, key=lambda r: (r["space"], r["dataset"], r["method"], float(r["budget"].rstrip("%"))))


def parse() -> argparse.Namespace:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("space", nargs="?", choices=list(SPACES), default="nats")
    p.add_argument("--tables", default=os.environ.get("DNAS_TABLES", ""), help="folder of the tables")
    p.add_argument("--search", type=int, default=0, help="search with this many seeds")
    p.add_argument("--budget", type=int, nargs="+", help="percent of the widest network's MACs (default: all)")
    p.add_argument("--method", nargs="+", default=["default"], choices=[*VARIANTS, *OTHERS], help="how")
    add_work_flags(p)
    p.add_argument(
        "--writers", type=float, nargs="+", help="only print what balanced reaches in both tables with these powers"
    )
    p.add_argument("--summary", action="store_true", help="print where the found networks lie")
    p.add_argument("--json", help="write the summary to this file as well")
    return p.parse_args()


def main() -> None:
    """Searches, or what the tables say of them."""
    args = parse()
    if args.writers is not None:
        by_writers(args.tables, args.writers)
        return
    if not (args.summary or args.json):
        run(args)
        return
    rows = rounded(in_order(summary(args.tables)))
    for row in rows:
        ends = ", ".join("-" if value is None else f"{value:+.2f}" for value in row["minus_balanced"])
        cell = f"{row['space']} {row['dataset']} {row['budget']} {row['method']}, {row['searches']} searches"
        print(f"{cell}: percentile {row['percentile']:.1f}, regret {row['regret']:.2f}, minus balanced [{ends}]")
    if args.json:
        write_json(Path(args.json), rows)


if __name__ == "__main__":
    told(main)
