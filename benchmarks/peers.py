#!/usr/bin/env python3
"""What other tools find in the same network of timm's, and what it takes them.

pip install -e '.[peers]'
python benchmarks/peers.py timm_resnet_50 --search 5
python benchmarks/peers.py timm_resnet_50 --report

Each search runs alone, one thread, in a process of its own: its seconds and its peak of memory are set beside those of
dnas's search with the same seed, in the same call. All of them see the training images only, train for the same
number of epochs on the same 70 % of them and may look at the rest. The nets are trained from scratch by the set-up's
recipe, with three seeds. What ends is a row in results/peers_<setup>.jsonl, and is not done again.

torch-pruning: the widest net is trained, then cut by the global rank of its groups' magnitudes (DepGraph, Fang et al.,
    CVPR 2023), in 400 steps, up to the first that is within the budget.
torch-pruning-sparse: the same, with DepGraph's penalty on the norms of groups while it is trained.
fastnas: NVIDIA's modelopt. The widest net is trained; which of its layers are sensitive to their width is looked at on
    500 held-out images; then the widths are a binary search over one threshold.
"""

import argparse
import importlib
import multiprocessing
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from functools import partial
from pathlib import Path
from statistics import fmean, median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import iso_flops as lab_of  # noqa: E402
import iso_stats as stats  # noqa: E402
import torch  # noqa: E402
from iso_flops import Table, net_row, own_seeds, run_search, train_all, work  # noqa: E402
from iso_setups import SETUPS, Lab  # noqa: E402
from speed import forget_peak  # noqa: E402
from torch import nn  # noqa: E402
from torch_pruned import Found, arch_of, example, layers_of, torch_pruning, torch_pruning_sparse, trained  # noqa: E402

from dnas.runtime.run_folder import peak_memory_mb, provenance  # noqa: E402


def fastnas(lab: Lab, seed: int) -> Found:
    """FastNAS, with a grid as fine as the set-up's."""
    import modelopt.torch.prune as prune
    from modelopt.torch.prune.fastnas import FastNASConfig

    model, x, y, seen = trained(lab, seed)
    model.to(memory_format=torch.contiguous_format)  # it refuses a ResNet whose weights lie channels last
    looked = 0

    def top1(net: nn.Module) -> float:
        nonlocal looked
        looked += len(x)
        with torch.no_grad():
            return 100 * float((net(x).argmax(1) == y).float().mean())

    config = FastNASConfig().model_dump()
    for rules in config.values():
        for rule in rules.values() if isinstance(rules, dict) else ():
            for key in ("channel_divisor", "feature_divisor"):
                if key in (rule or {}):
                    rule[key] = lab.setup.divisor
    full = lab.tables["macs"].of(lab.tables["macs"].extremes()[1])
    share = f"{100 * lab.budgets[0].limit / full:.4f}%"
    calibration = [(part,) for part in x.split(100)]
    model, _ = prune.prune(
        model, [("fastnas", config)], {"flops": share}, example(lab),
        {"score_func": top1, "data_loader": calibration, "collect_func": lambda batch: batch[0], "verbose": False},
    )  # fmt: skip
    return arch_of(lab, model, layers_of(lab)), seen + looked // 3


PEERS: dict[str, tuple[str, Callable[[Lab, int], Found]]] = {  # method -> the package that it needs, the method
    "torch-pruning": ("torch_pruning", torch_pruning),
    "torch-pruning-sparse": ("torch_pruning", torch_pruning_sparse),
    "fastnas": ("modelopt.torch.prune", fastnas),
}
METHODS = ("default", *PEERS)


def searched(lab: Lab, method: str, seed: int) -> dict:
    """The row of a method's net, or of what kept it from running; for a process that does nothing else."""
    package, find = PEERS.get(method, ("", None))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a peer's own
            if package:
                importlib.import_module(package)  # its code is not what a search takes
            before, started = forget_peak() if lab.device.type == "cpu" else 0.0, time.perf_counter()
            if find:
                arch, images = find(lab, seed)
                row = net_row(lab, f"{method}/{seed}", arch) | {"search_images": images}
            else:
                row = run_search(lab, method, seed)
    except Exception as error:  # whatever a peer raises is what is to be told of it
        if not find:
            raise
        said = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
        return {"kind": "failed", "net": f"{method}/{seed}", "error": said}
    seconds, peak = time.perf_counter() - started, peak_memory_mb(lab.device) - before
    row |= {"search_seconds": round(seconds, 1), "search_mb": round(peak, 1)}
    return row | {"limit": lab.budgets[0].limit}


def run(args: argparse.Namespace) -> None:
    """Add to the table what it lacks."""
    setup, table = SETUPS[args.setup], Table(f"peers_{args.setup}")
    lab = lab_of.open_lab(setup, args.data_dir, args.device)
    info = {"date": date.today().isoformat()} | provenance(lab.device)
    lab_of.RESULTS.mkdir(exist_ok=True)
    spawn, entered = multiprocessing.get_context("spawn"), (setup, args.data_dir, args.device)
    known = {row["net"] for row in table.rows}
    todo = [(k, method) for k in range(args.search) for method in args.method if f"{method}/{k}" not in known]
    with ProcessPoolExecutor(
        1, spawn, initializer=lab_of._enter, initargs=entered, max_tasks_per_child=1
    ) as alone:  # one after the other
        for k, method in todo:
            for _ in work([(searched, method, k)], alone, table, info):
                pass
    with ProcessPoolExecutor(args.jobs, spawn, initializer=lab_of._enter, initargs=entered) as pool:
        names = [f"{m}/{k}" for k in range(args.search) for m in args.method if f"{m}/{k}" in table.nets()]
        train_all(names, own_seeds, table, partial(work, pool=pool, info=info))


def report(table: Table) -> None:
    """What it came to, as a table in Markdown. Ratios are paired by the search's seed: median [least, most]."""
    scores, nets = stats.scores_of(table.rows), table.nets()
    heads = ("method", "searches", "top-1", "minus default", "MACs / budget", "seconds", "/ default's")
    heads += ("peak, MiB", "/ default's")
    print(f"| {' | '.join(heads)} |\n{'| --- ' * len(heads)}|")
    for method in METHODS:
        failed = [row for row in table.rows if row["kind"] == "failed" and row["net"].split("/")[0] == method]
        own = stats.of_method(scores, method)
        if not own:
            if failed:
                print(f"| {method} | - | does not run: {failed[0]['error']} |" + " |" * (len(heads) - 3))
            continue
        difference = "{:+.2f} [{:+.2f}, {:+.2f}]".format(*stats.minus_method(own, stats.of_method(scores, "default")))
        cells = [method, str(len(own)), f"{fmean(fmean(s.values()) for s in own.values()):.2f}"]
        cells += [
            "-" if method == "default" else difference,
            stats.ranged([nets[n]["macs"] / nets[n]["limit"] for n in own]),
        ]
        for key in ("search_seconds", "search_mb"):
            ratios = [nets[n][key] / nets[f"default/{n.split('/')[1]}"][key] for n in own]
            cells += [f"{median(nets[n][key] for n in own):.0f}", "-" if method == "default" else stats.ranged(ratios)]
        print(f"| {' | '.join(cells)} |")


def parse() -> argparse.Namespace:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("setup", choices=[name for name, setup in SETUPS.items() if name.startswith("timm")])
    p.add_argument("--method", nargs="+", choices=METHODS, default=METHODS)
    lab_of.add_search_flags(p)
    return p.parse_args()


def main() -> None:
    """Rows, then the report."""
    args = parse()
    if not args.report:
        run(args)
    report(Table(f"peers_{args.setup}"))


if __name__ == "__main__":
    lab_of.told(main)
