#!/usr/bin/env python3
"""Is a search for milliseconds worth more than one for FLOPs, at equal measured latency?

python tools/profile_latency.py --supernet prunet --width-mult 0.35 --divisor 2 --img-size 8 --num-classes 10 \
    --threads 1 --batch-size 32 --runtime onnxruntime --out digits.json
python benchmarks/iso_latency.py digits --latency-table digits.json --search 5
python benchmarks/iso_latency.py digits --report

For each seed: a search for the set-up's FLOPs; its net is measured; a search for that many milliseconds, and the
uniform net of as many, both by what networks measure (`dnas.latency.profile.calibrated`). All three are measured once
more, side by side, with nothing else running, and trained with three seeds.
What ends is a row in results/latency_<setup>.jsonl, and is not done again.
"""

import argparse
import multiprocessing
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from datetime import date
from functools import partial
from pathlib import Path
from statistics import fmean, median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import iso_flops as lab_of  # noqa: E402
import iso_stats as stats  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from iso_flops import Table, net_row, own_seeds, run_search, searched, train_all, work  # noqa: E402
from iso_setups import SETUPS, Lab  # noqa: E402
from variants import VARIANTS  # noqa: E402

from dnas.cli.process import keep_freed_memory  # noqa: E402
from dnas.export.model_file import build_net  # noqa: E402
from dnas.latency.measured_parts import parts_of  # noqa: E402
from dnas.latency.profile import calibrated, time_nets  # noqa: E402
from dnas.latency.timing import CpuSpeedReference, check_target, target_of  # noqa: E402
from dnas.methods.derive import Likelihood, derive, gate_likelihood  # noqa: E402
from dnas.methods.rules import uniform_arch  # noqa: E402
from dnas.runtime.run_folder import provenance  # noqa: E402
from dnas.spec.budget import Budget  # noqa: E402
from dnas.spec.checks import UserError  # noqa: E402
from dnas.spec.cost import CostTable  # noqa: E402
from dnas.spec.latency_table import LatencyTable, check_use, read_table  # noqa: E402
from dnas.spec.space import Arch  # noqa: E402

METHODS = ("macs", "ms", "uniform")


def with_ms(lab: Lab, path: str, ms: float | None = None) -> Lab:
    """The same set-up with costs in milliseconds, and a budget of ``ms`` instead of its own."""
    sites = [part.site for part in parts_of(lab.net)]
    tables = lab.tables | {"ms": CostTable.measured(lab.net.space, sites, read_table(path))}
    return replace(lab, tables=tables, budgets=(Budget("ms", ms),) if ms else lab.budgets)


def search_macs(lab: Lab, path: str, seed: int) -> dict:
    """The net of a search for the set-up's own budget."""
    return run_search(with_ms(lab, path), "default", seed) | {"net": f"macs/{seed}", "asked_ms": None}


def search_ms(lab: Lab, path: str, ms: float, seed: int) -> tuple[Likelihood, dict]:
    """What the gates of a search for milliseconds say, and what it took."""
    done, found = searched(with_ms(lab, path, ms), VARIANTS["default"], seed)
    return gate_likelihood(done.net, done.own.temperature), found


def settle(lab: Lab, path: str, name: str, ms: float, like: Likelihood | None) -> dict:
    """The net that a search is for, or the uniform one, such that it measures what was asked for."""
    lab, table = with_ms(lab, path, ms), read_table(path)
    space, seen = lab.net.space, []

    def find(costs: CostTable) -> Arch:
        tables = lab.tables | {"ms": costs}
        return derive(space, tables, lab.budgets, like) if like else uniform_arch(space, tables, lab.budgets)

    def measured(arch: Arch) -> float:
        seen.append(measure(lab, table, [arch])[0])
        return seen[-1]

    arch, _ = calibrated(lab.tables["ms"], ms, find, measured)
    return net_row(lab, name, arch) | {"asked_ms": ms, "tried_ms": seen}


def measure(lab: Lab, table: LatencyTable, archs: Sequence[Mapping]) -> list[float]:
    """Milliseconds of nets, taken in turn, at the table's pace: the median of 50 blocks of 20 ms."""
    sizes = {"num_classes": lab.data.num_classes, "in_chans": lab.data.in_chans}
    models = [build_net(lab.net.net_of(arch), **sizes) for arch in archs]
    target = check_target(target_of(table.header, torch.device(lab.device)))
    torch.set_num_threads(target.threads)
    shape = (lab.data.in_chans, lab.setup.img_size, lab.setup.img_size)
    ms = time_nets(models, shape, target, CpuSpeedReference(target, table.header["pace_us"]), 50, 20.0)
    return [round(float(value), 6) for value in np.median(ms, 1)]


def run(args: argparse.Namespace) -> None:
    """Add to the table what it lacks."""
    setup, rows = SETUPS[args.setup], Table(f"latency_{args.setup}")
    lab, table = lab_of.open_lab(setup, args.data_dir, args.device), read_table(args.latency_table)
    check_use(table, {"device": provenance(lab.device)["device"]})
    with_ms(lab, args.latency_table)  # is it complete?
    keys = ("device", "runtime", "dtype", "batch", "threads")
    info = {"date": date.today().isoformat()} | provenance(lab.device) | {"table": {k: table.header[k] for k in keys}}
    lab_of.RESULTS.mkdir(exist_ok=True)
    measured = {row["net"]: row["ms"] for row in rows.rows if row["kind"] == "measured"}

    def measure_all(names: Sequence[str]) -> None:
        nets = rows.nets()
        for name, ms in zip(names, measure(lab, table, [nets[name]["arch"] for name in names]), strict=True):
            rows.append({"kind": "measured", "net": name, "ms": ms} | info)
            measured[name] = ms

    entered = (setup, args.data_dir, args.device)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.jobs, spawn, initializer=lab_of._enter, initargs=entered) as pool:
        do, seeds = partial(work, pool=pool, info=info, table=rows), range(args.search)
        missing = [k for k in seeds if f"macs/{k}" not in rows.nets()]
        for _ in do([(search_macs, args.latency_table, k) for k in missing]):
            pass
        if todo := [f"macs/{k}" for k in seeds if f"macs/{k}" not in measured]:
            measure_all(todo)
        known = rows.nets()
        asked = {k: known[f"ms/{k}"]["asked_ms"] if f"ms/{k}" in known else measured[f"macs/{k}"] for k in seeds}
        wanted = [k for k in seeds if f"ms/{k}" not in rows.nets()]
        jobs = [pool.submit(lab_of._call, search_ms, (args.latency_table, asked[k], k)) for k in wanted]
        ended = [job.result() for job in jobs]  # nothing else runs while nets are measured
        for k, (like, found) in zip(wanted, ended, strict=True):
            rows.append(settle(lab, args.latency_table, f"ms/{k}", asked[k], like) | found | info)
        for k in seeds:
            if f"uniform/{k}" not in rows.nets():
                rows.append(settle(lab, args.latency_table, f"uniform/{k}", asked[k], None) | info)
        for k in seeds:
            if f"ms/{k}" not in measured:  # the first net once more, beside the others: its last row counts
                measure_all([f"{m}/{k}" for m in METHODS])
        train_all([f"{m}/{k}" for k in seeds for m in METHODS], own_seeds, rows, partial(work, pool=pool, info=info))


def report(rows: Table) -> None:
    """What it came to, as a table in Markdown."""
    scores, nets = stats.scores_of(rows.rows), rows.nets()
    measured = {row["net"]: row["ms"] for row in rows.rows if row["kind"] == "measured"}
    heads = ("net", "seeds", "top-1", "minus searched for ms", "MACs", "settled / asked", "measured / asked")
    print(f"| {' | '.join((*heads, 'measured / searched for FLOPs'))} |\n{'| --- ' * (len(heads) + 1)}|")
    for method in METHODS:
        own = stats.of_method(scores, method)
        difference = "{:+.2f} [{:+.2f}, {:+.2f}]".format(*stats.minus_method(own, stats.of_method(scores, "ms")))
        top1, macs = fmean(fmean(s.values()) for s in own.values()), round(median(nets[name]["macs"] for name in own))
        to_budget = [nets[name] for name in own if nets[name]["asked_ms"]]
        settled = [_settled(row["tried_ms"], row["asked_ms"]) / row["asked_ms"] for row in to_budget]
        asked = [measured[row["net"]] / row["asked_ms"] for row in to_budget]
        beside = [measured[name] / measured[f"macs/{name.split('/')[1]}"] for name in own]
        compared = "-" if method == "ms" else difference
        row = (method, len(own), f"{top1:.2f}", compared, macs, *map(stats.ranged, (settled, asked, beside)))
        print(f"| {' | '.join(map(str, row))} |")


def _settled(tried: Sequence[float], limit: float) -> float:
    """What the net that `calibrated` chose measured then."""
    return max((ms for ms in tried if ms <= limit), default=min(tried))


def parse() -> argparse.Namespace:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("setup", choices=list(SETUPS))
    p.add_argument("--latency-table", help="of the set-up's space, on this device")
    lab_of.add_search_flags(p)
    return p.parse_args()


def main() -> None:
    """Rows, then the report."""
    args = parse()
    if not args.report:
        if not args.latency_table:
            raise UserError("--latency-table is needed: see tools/profile_latency.py")
        keep_freed_memory()  # as the tools do: else what a network takes hangs on what glibc has given back
        run(args)
    report(Table(f"latency_{args.setup}"))


if __name__ == "__main__":
    lab_of.told(main)
