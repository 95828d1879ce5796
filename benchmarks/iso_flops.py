#!/usr/bin/env python3
"""Does a search find, or only run? Nets of equal cost, trained by one recipe: random, uniform, found and opponents'.

python benchmarks/iso_flops.py digits --random 100      # the table that everything is judged by (and the uniform net)
python benchmarks/iso_flops.py digits --search 5        # five searches, the net of each trained with three seeds
python benchmarks/iso_flops.py --summary --json summary.json

A training is a row in results/<setup>.jsonl, appended when it ends; what is there already is not done again.
"""

import argparse
import itertools
import json
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from datetime import date
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import iso_stats as stats  # noqa: E402
import opponents  # noqa: E402
import torch  # noqa: E402
from iso_setups import RESULTS, SETUPS, Lab, Setup, open_lab  # noqa: E402
from timm.utils import random_seed  # noqa: E402
from torch_pruned import plain_net, torch_pruning  # noqa: E402
from variants import VARIANTS, Variant, baseline_of  # noqa: E402

from dnas.methods.catalog import METHODS  # noqa: E402
from dnas.methods.derive import derive  # noqa: E402
from dnas.methods.gates import GATES  # noqa: E402
from dnas.methods.loop import begin, run, search  # noqa: E402
from dnas.methods.method import Method, Search, Task  # noqa: E402
from dnas.methods.rules import RULES, balanced_arch, random_arch  # noqa: E402
from dnas.runtime.run_folder import provenance, write_json  # noqa: E402
from dnas.spec.budget import Budget  # noqa: E402
from dnas.spec.checks import UserError  # noqa: E402
from dnas.spec.space import Arch  # noqa: E402
from dnas.training.from_scratch import train_from_scratch  # noqa: E402

TRAININGS = 3  # of each found net; search k has the training seeds 3k, 3k + 1, 3k + 2
JUDGED = 30  # random nets that a supernet judges


# Beside the variants of gates: what is compared with them.
OPPONENTS = {**opponents.OPPONENTS, "torch-pruning": torch_pruning}
THRESHOLD = "-threshold"  # behind the name of a method that scores channels: the other cut
OWN = [name for name in METHODS if name not in ("gates", "random", *RULES)]
OTHERS = [*OWN, *(name + THRESHOLD for name in OWN), *OPPONENTS]
HELD = "balanced-widths"  # the blocks and depth of the default search's net, and widths by the rule


def run_search(lab: Lab, variant: str, seed: int) -> dict:
    """One search, or an opponent's. Returns the row of the net that it found."""
    started = time.perf_counter()
    if variant in OPPONENTS:
        arch, images = OPPONENTS[variant](lab, seed)
        found = {"search_seconds": round(time.perf_counter() - started, 1), "search_images": images}
        return net_row(lab, f"{variant}/{seed}", arch) | found
    if variant in OTHERS:
        return run_searches(lab, [variant], seed)[0]
    how = VARIANTS[variant]
    done, found = searched(lab, how, seed)
    arch = derive(done.net.space, lab.tables, lab.budgets, how.likelihood(done.net, done.own.temperature))
    return net_row(lab, f"{variant}/{seed}", arch) | found


def method_of(name: str) -> tuple[Method, Any]:
    """One of `OTHERS` as a method, and its settings."""
    method = METHODS[name.removesuffix(THRESHOLD)]
    config = method.config()
    return method, replace(config, cut="threshold") if name.endswith(THRESHOLD) else config


def training_of(name: str) -> Hashable:
    """What a method trains before its only cut; None if the budget plays a part before. Equal values: one training."""
    if name not in OTHERS or name in OPPONENTS:
        return None
    method, config = method_of(name)
    return None if method.work(config)[1] else (method.init, method.loss)


def chosen(
    lab: Lab, names: Sequence[str], seed: int, goals: Sequence[tuple[Budget, ...]]
) -> dict[str, tuple[list[Arch], dict]]:
    """The networks that methods choose with their default settings, and what that took: name -> (archs, figures).

    Several goals and methods share one search: they must train alike, and not look at the budget before the end.
    """
    started, rows = time.perf_counter(), []
    method, config = method_of(names[0])
    random_seed(seed)
    layout = torch.channels_last if lab.setup.search.channels_last else torch.preserve_format
    net = lab.supernet().to(memory_format=layout)
    task = Task(lab.tables, goals[0], lab.data, lab.setup.search, config, seed)
    done = begin(method, net, task)
    run(method, done, task, on_row=rows.append)
    images = sum(lab.setup.search.batch_size + row.get("images", 0) for row in rows)
    trained, found = time.perf_counter() - started, {}
    for name in names:
        started, (method, config) = time.perf_counter(), method_of(name)
        archs = [method.choose(done, replace(task, budgets=budgets, config=config)) for budgets in goals]
        scored = (time.perf_counter() - started) / len(goals)
        found[name] = archs, {"search_seconds": round(trained + scored, 1), "search_images": images}
    return found


def searched(lab: Lab, how: Variant, seed: int) -> tuple[Search, dict]:
    """A search by gates that has ended, and what it took."""
    started = time.perf_counter()
    recipe = replace(lab.setup.search, epochs=round(lab.setup.search.epochs * how.length), **how.recipe)
    random_seed(seed)
    net = lab.supernet(how.bipath)
    rows: list[dict] = []
    if recipe.channels_last:
        net = net.to(memory_format=torch.channels_last)
    done, _ = search(GATES, net, Task(lab.tables, lab.budgets, lab.data, recipe, how.config, seed), on_row=rows.append)
    images = sum(recipe.batch_size + row.get("images", 0) for row in rows)
    return done, {"search_seconds": round(time.perf_counter() - started, 1), "search_images": images}


def run_searches(lab: Lab, variants: Sequence[str], seed: int) -> list[dict]:
    """The rows of searches that share one training (`training_of`)."""
    found = chosen(lab, variants, seed, [lab.budgets])
    return [net_row(lab, f"{name}/{seed}", arch) | took for name, ((arch,), took) in found.items()]


def net_row(lab: Lab, name: str, arch: Arch) -> dict:
    """The row that says what a net is."""
    return {"kind": "net", "net": name, "arch": dict(arch)} | {m: t.of(arch) for m, t in lab.tables.items()}


def judge_nets(lab: Lab, archs: dict[str, dict], seed: int) -> dict:
    """What one supernet's shared weights think of these nets, top-1 in % on held-out training images.

    ``judged`` with norms recalibrated for each net, ``judged_running`` with the supernet's running statistics.
    """
    net, x, y, _ = opponents.shared_weights(lab, seed)
    judged = {name: round(opponents.judge(net, arch, x, y), 3) for name, arch in archs.items()}
    running = {name: round(opponents.judge(net, arch, x, y, recalibrate=False), 3) for name, arch in archs.items()}
    return {"kind": "judged", "net": f"judge/{seed}", "seed": seed, "judged": judged, "judged_running": running}


def train_net(lab: Lab, name: str, arch: dict, seed: int) -> dict:
    """Train one net from scratch. Returns its row."""
    random_seed(seed)
    model = plain_net(lab, arch)
    _, reached = train_from_scratch(model.to(lab.device), lab.data, lab.setup.recipe, seed=seed)
    row = {"kind": "training", "net": name, "seed": seed, "top1": round(reached["top1"], 3)}
    return row | {"loss": round(reached["loss"], 4), "seconds": reached["seconds"]}


# Work in processes of one thread each: small nets train faster side by side than one after the other on all cores.

_lab: Lab | None = None


def _enter(setup: Setup, data_dir: str, device: str) -> None:
    global _lab
    torch.set_num_threads(1)
    _lab = open_lab(setup, data_dir, device)


def _call(job: Callable, args: tuple) -> Any:
    assert _lab is not None
    return job(_lab, *args)


class Table:
    """The rows of one set-up, in a file that only grows."""

    def __init__(self, name: str) -> None:
        self.path = RESULTS / f"{name}.jsonl"
        self.rows = [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []

    def append(self, row: dict) -> None:
        self.rows.append(row)
        with open(self.path, "a") as file:
            file.write(json.dumps(row) + "\n")

    def nets(self) -> dict[str, dict]:
        """Name -> its row of kind ``net``."""
        return {row["net"]: row for row in self.rows if row["kind"] == "net"}


def work(jobs: Iterable[tuple], pool: ProcessPoolExecutor, table: Table, info: dict) -> Iterator[dict]:
    """Do (function of a lab, arguments) side by side; append and yield the row or rows of each as it ends."""
    running = [pool.submit(_call, function, args) for function, *args in jobs]
    for k, future in enumerate(as_completed(running), 1):
        done = future.result()
        for row in done if isinstance(done, list) else [done]:
            table.append(row | info)
            text = f"{row['top1']:.2f} %" if "top1" in row else f"{row.get('macs', '')} MACs"
            print(f"{k}/{len(running)} {row['net']} seed {row.get('seed', '-')}: {text}", flush=True)
            yield row | info


def train_all(names: Sequence[str], seeds: Callable[[str], Iterable[int]], table: Table, do: Callable) -> None:
    """Train these nets with those of their seeds that the table lacks."""
    scores, nets = stats.scores_of(table.rows), table.nets()
    jobs = [(train_net, name, nets[name]["arch"], seed) for name in names for seed in seeds(name)]
    jobs.sort(key=lambda job: job[3])  # a table that is broken off has about as many trainings of every net
    for _ in do([job for job in jobs if job[3] not in scores.get(job[1], {})], table=table):
        pass


def own_seeds(name: str) -> range:
    """Training seeds of a found net: no other search's nets have them."""
    k = int(name.split("/")[1])
    return range(TRAININGS * k, TRAININGS * (k + 1))


def main() -> None:
    """One call adds what is asked for to the table, or sums the tables up."""
    args = parse()
    if args.summary or args.json:
        print_summary(args.json)
        return
    setup, table = SETUPS[args.setup], Table(args.setup)
    lab = open_lab(setup, args.data_dir, args.device)
    info = {"date": date.today().isoformat()} | provenance(lab.device)
    RESULTS.mkdir(exist_ok=True)
    context = multiprocessing.get_context("spawn")
    entered = (setup, args.data_dir, args.device)
    with ProcessPoolExecutor(args.jobs, context, initializer=_enter, initargs=entered) as pool:
        do = partial(work, pool=pool, info=info)
        for rule, choose in RULES.items():
            if rule not in table.nets():
                table.append(net_row(lab, rule, choose(lab.net.space, lab.tables, lab.budgets)) | info)
        if args.full and "full" not in table.nets():
            table.append(net_row(lab, "full", lab.tables["macs"].extremes()[1]) | info)
        train_all(["full"] * (args.full > 0), lambda name: range(args.full), table, do)
        names, nets = [f"random/{k}" for k in range(args.random)], table.nets()
        for k, name in enumerate(names):
            if name not in nets:
                table.append(net_row(lab, name, random_arch(lab.net.space, lab.tables, lab.budgets, k)) | info)
        train_all(names, lambda name: range(setup.seeds), table, do)
        if args.judge:
            if f"random/{JUDGED - 1}" not in (nets := table.nets()):
                raise UserError(f"--judge needs the first {JUDGED} random nets in the table: --random {JUDGED}")
            judged = {name: nets[name]["arch"] for name in (f"random/{k}" for k in range(JUDGED))}
            have = {row["seed"] for row in table.rows if row["kind"] == "judged"}
            for _ in do([(judge_nets, judged, k) for k in range(args.judge) if k not in have], table=table):
                pass
        wanted, nets = list(itertools.product(args.variant, range(args.search))), table.nets()
        missing = [(method, k) for method, k in wanted if f"{method}/{k}" not in nets]
        searches = [(run_search, method, k) for method, k in missing if not training_of(method)]
        shared: dict[tuple, list[str]] = {}
        for method, k in missing:
            if training := training_of(method):
                shared.setdefault((training, k), []).append(method)
        searches += [(run_searches, together, k) for (_, k), together in shared.items()]
        for _ in do(searches, table=table):
            pass
        chosen_nets = [f"{method}/{k}" for method, k in wanted]
        if "default" in args.variant and any(not d.is_width and len(d.options) > 1 for d in lab.net.space.decisions):
            for k in range(args.search):
                chosen_nets.append(name := f"{HELD}/{k}")
                if name not in (nets := table.nets()):
                    held = lab.net.space.complete(nets[f"default/{k}"]["arch"])
                    arch = balanced_arch(lab.net.space, lab.tables, lab.budgets, held)
                    took = {key: nets[f"default/{k}"][key] for key in ("search_seconds", "search_images")}
                    table.append(net_row(lab, name, arch) | took | info)
        train_all(chosen_nets, own_seeds, table, do)
        taken = max(TRAININGS * args.search, setup.seeds)
        train_all([*RULES], lambda name: range(taken), table, do)


def summarise(table: Table) -> dict:
    """What a set-up is worth. Figures that lack rows are NaN."""
    scores = stats.scores_of(table.rows)
    random = stats.of_method(scores, "random")
    means = [fmean(s.values()) for s in random.values()]
    noise, seeds = stats.noise(random), fmean(len(s) for s in random.values()) if random else math.nan
    rules = {rule: fmean(scores[rule].values()) if rule in scores else math.nan for rule in RULES}
    places = {r: stats.percentile(v, means) if means and math.isfinite(v) else math.nan for r, v in rules.items()}
    judges = [row for row in table.rows if row["kind"] == "judged"]
    agree = {
        key: [stats.rank_correlation(row[key], scores) for row in judges if key in row]
        for key in ("judged", "judged_running")
    }
    return {
        "setup": table.path.stem,
        "n_random": len(random),
        "seeds_per_net": seeds,
        "noise": noise,
        "noise_of_mean": noise * math.sqrt(fmean(1 / len(s) for s in random.values())) if random else math.nan,
        "spread": stats.spread(random, noise),
        "random_mean": fmean(means) if means else math.nan,
        "best_random": max(means, default=math.nan),
        **rules,
        **{f"{rule}_percentile": place for rule, place in places.items()},
        "rank_correlation": fmean(agree["judged"]) if agree["judged"] else math.nan,
        "rank_correlation_running": fmean(agree["judged_running"]) if agree["judged_running"] else math.nan,
    }


def judge_method(table: Table, method: str) -> dict:
    """How the nets of one method compare with the random ones and with those of rules; empty if one is missing."""
    scores, nets = stats.scores_of(table.rows), table.nets()
    random, found = stats.of_method(scores, "random"), stats.of_method(scores, method)
    if not random or not found or "uniform" not in scores:
        return {}
    means = [fmean(s.values()) for s in random.values()]
    # Trainings of its own nets: those of the random ones may be of a day on which the machine was slower. And a process
    # may have been paused, hence medians.
    seconds = [row["seconds"] for row in table.rows if row["kind"] == "training" and row["net"] in found]
    cost = median(nets[name]["search_seconds"] for name in found) / median(seconds)
    return {
        "search_seeds": len(found),
        "found_top1": fmean(fmean(s.values()) for s in found.values()),
        "found_percentile": fmean(stats.percentile(fmean(s.values()), means) for s in found.values()),
        **{f"found_minus_{rule}": stats.minus_paired(found, scores.get(rule, {})) for rule in RULES},
        "found_minus_random": stats.minus_mean(found, random),
        "found_minus_baseline": stats.minus_method(found, stats.of_method(scores, baseline_of(method))),
        "search_in_trainings": cost,
        "best_of_equal_compute": stats.best_of(random, max(1, math.ceil(cost))),
    }


def print_summary(path: str | None) -> None:
    """One line a set-up and method; the set-ups with the default search as JSON if asked for."""
    rows = []
    for table in filter(lambda t: t.rows, map(Table, SETUPS)):
        rows.append(rounded(summarise(table) | {"search_seeds": 0} | judge_method(table, "default")))
        print(json.dumps(rows[-1]))
        for method in stats.methods(stats.scores_of(table.rows)):
            print(f"  {method}: " + json.dumps(rounded(judge_method(table, method))))
    if path:
        write_json(Path(path), rows)


def rounded(value: Any) -> Any:
    """Floats with three digits, None where they are not finite; what JSON can hold."""
    if isinstance(value, float):
        return round(value, 3) if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: rounded(v) for key, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, (tuple, list)) else value


def add_work_flags(parser: argparse.ArgumentParser) -> None:
    """Flags on the data and on what works on it."""
    told = "CIFAR-10 (default: DNAS_CIFAR10)"
    parser.add_argument("--data-dir", default=os.environ.get("DNAS_CIFAR10", ""), help=told)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="trainings side by side, one thread each")


def rows_or_report(
    parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], None], report: Callable[[], str]
) -> None:
    """Read the command line, add rows with ``run(args)`` unless --report is given, and print the report."""
    parser.add_argument("--report", action="store_true", help="only print what the rows say")
    add_work_flags(parser)
    args = parser.parse_args()
    if not args.report:
        run(args)
    print(report())


def add_search_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of the benchmarks that have a report of their own."""
    parser.add_argument("--search", type=int, default=5, help="with so many seeds (default 5)")
    parser.add_argument("--report", action="store_true", help="only print what the rows say")
    add_work_flags(parser)


def parse() -> argparse.Namespace:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("setup", nargs="?", choices=list(SETUPS), default="digits")
    p.add_argument("--random", type=int, default=0, help="train this many random nets")
    p.add_argument("--search", type=int, default=0, help="search with this many seeds, train each net with three")
    p.add_argument("--full", type=int, default=0, help="train the widest net of the space with this many seeds")
    p.add_argument("--judge", type=int, default=0, help="let this many supernets judge the first random nets")
    p.add_argument("--variant", nargs="+", default=["default"], choices=[*VARIANTS, *OTHERS], help="how")
    add_work_flags(p)
    p.add_argument("--summary", action="store_true", help="print what the tables say")
    p.add_argument("--json", help="write the summary to this file as well")
    return p.parse_args()


def told(main: Callable[[], None]) -> None:
    """Call ``main``: a user's mistake is one line on stderr and exit code 2."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    told(main)
