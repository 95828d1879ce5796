#!/usr/bin/env python3
"""What searching costs, in steps and memory of plain training: every ratio from times taken in turn, in one run.

python benchmarks/speed.py --threads 2 --json speed.json        # --quick: within ten minutes on two cores
python benchmarks/speed.py --only gates --threads 1 --repeats 31

search: a search from end to end; after each of its steps comes a step of plain training of the widest network. Also
    what the expected cost and the shrinking take.
memory: the peak of the first two fifths of a search, after which it only shrinks, and of plain training of the widest
    network, each in a process of its own. Twice: as the tools are, which let glibc keep what was freed, and *in use*,
    all freed memory given back at once. In use also the widest networks whose layers all have one kind of block: the
    dearest in MACs, which counts as the widest, is not the one that takes the most memory.
modes: what a plain step of the widest network takes in bfloat16, and compiled; not if quick.
scale: a weight step and a gate step, and the peak memory, with 2 to 64 widths to choose from, and 2 to 8 blocks.
gates: forwards and backwards through a network of timm's with gates, and without.
"""

import argparse
import json
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from datetime import date
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from timm.utils import random_seed  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from dnas.cli.process import keep_freed_memory  # noqa: E402
from dnas.export.model_file import build_net  # noqa: E402
from dnas.methods.gates import GATES, live_tables  # noqa: E402
from dnas.methods.loop import begin, run  # noqa: E402
from dnas.methods.method import Task  # noqa: E402
from dnas.methods.settings import GatesConfig  # noqa: E402
from dnas.nets.layer_supernet import MacroSupernet  # noqa: E402
from dnas.nets.supernet import Supernet  # noqa: E402
from dnas.nets.timm_space import TimmBase  # noqa: E402
from dnas.nets.timm_supernet import TimmSupernet  # noqa: E402
from dnas.runtime.run_folder import peak_memory_mb, provenance, write_json  # noqa: E402
from dnas.spec.budget import Budget  # noqa: E402
from dnas.spec.cost import CostTable  # noqa: E402
from dnas.spec.layer_space import Candidate, EfficientNetSpace, Stage  # noqa: E402
from dnas.spec.recipe import Recipe  # noqa: E402
from dnas.spec.space import Arch  # noqa: E402
from dnas.training.data import Data, load_data  # noqa: E402
from dnas.training.loop import cycle  # noqa: E402
from dnas.training.onednn_workaround import subsampled  # noqa: E402
from dnas.training.optimizer import autocast, make_optimizer  # noqa: E402
from supernets import SUPERNETS  # noqa: E402

NETS = ("prunet", "mobilenet_v2", "resnet18", "mobilenetv2_100")
GATED = ("resnet18", "mobilenetv2_100", "densenet121", "convnext_atto")
WIDTHS, BLOCKS = (2, 4, 8, 16, 32, 64), (2, 4, 6, 8)
KINDS = tuple(Candidate("ir", k, expand=6, base=4, se=se) for se in (0, 0.25) for k in (3, 5, 7, 9))
SECTIONS = ("search", "memory", "modes", "scale", "gates")


def supernet_of(name: str, img_size: int) -> Supernet:
    """One of `supernets`, at half of its width, or a network of timm's; ten classes."""
    if name in SUPERNETS:
        return MacroSupernet(SUPERNETS[name](num_classes=10, img_size=img_size, width_mult=0.5))
    return TimmSupernet(TimmBase(name, 10, 3, img_size))


def spread(values: Sequence[float]) -> list[float]:
    """[median, least, most]."""
    return [round(v, 4) for v in (median(values), min(values), max(values))]


def milliseconds(call: Callable[[], object], device: torch.device) -> float:
    """Of one call, with everything that it started on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1e3 * (time.perf_counter() - started)


def widest_of(net: Supernet) -> Arch:
    """The dearest network of a space in MACs."""
    return CostTable.build(net.space, "macs").extremes()[1]


def of_kind(net: Supernet, kind: str) -> Arch:
    """The widest network with blocks of one kind, where there are some."""
    answers = {d.name: kind if kind in d.options else d.options[-1] for d in net.space.decisions}
    return net.space.complete(answers)


def plain_step(net: Supernet, arch: Arch, data: Data, recipe: Recipe, compiled: bool = False) -> Callable[[], None]:
    """A step of plain training of one network, its batch included."""
    device = next(net.parameters()).device
    model = build_net(net.net_of(arch), num_classes=10, in_chans=3).to(device).train()
    model = model.to(memory_format=torch.channels_last)
    run = torch.compile(model) if compiled else model
    optimizer, batches = (
        make_optimizer(model.parameters(), recipe),
        cycle(data.train_batches(recipe.batch_size, seed=0)),
    )
    safe = subsampled(model, recipe)

    def step() -> None:
        x, y = next(batches)
        x = x.to(memory_format=torch.channels_last)
        with autocast(device, recipe), safe:
            loss = nn.functional.cross_entropy(run(x).float(), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def searched(
    name: str, args: argparse.Namespace, pair: bool
) -> tuple[list[dict], list[float], list[float], list[float]]:
    """A search to 30 % of the MACs: its rows; of plain steps between them, and of expected costs, the milliseconds.

    Last the steps of plain training of the likeliest network that it ended with, over those of the widest one, taken
    in turn. Without ``pair`` the search is alone, and over at two fifths.
    """
    random_seed(0)
    device = torch.device(args.device)
    net, data = supernet_of(name, args.img_size), load_data("digits", img_size=args.img_size, device=device)
    net.to(device, memory_format=torch.channels_last)
    tables = {"macs": CostTable.build(net.space, "macs")}
    widest = tables["macs"].extremes()[1]
    limit = 0.3 * tables["macs"].of(widest)
    per_epoch = len(data.train_batches(args.batch_size, seed=0, indices=data.split(GatesConfig.gate_fraction, 0)[0]))
    epochs = max(1, round(args.steps / per_epoch))
    recipe = Recipe(batch_size=args.batch_size, epochs=epochs, amp=args.amp)
    step = plain_step(net, widest, data, recipe) if pair else None
    if step:
        step()
    rows: list[dict] = []
    plain: list[float] = []
    expected: list[float] = []

    def evaluate() -> None:
        live["macs"].expected(net.probabilities()).backward()

    def on_row(row: dict) -> None:
        nonlocal live
        rows.append(row)
        if not step:
            return
        plain.append(milliseconds(step, device))
        if "gate_ms" in row:
            if row["events"]:  # as the search does
                live = live_tables(net, task)
            expected.append(milliseconds(evaluate, device))

    task = Task(tables, (Budget("macs", limit),), data, recipe, GatesConfig())
    live = live_tables(net, task)
    run(GATES, begin(GATES, net, task), task, on_row=on_row, until=1.0 if pair else 0.4)
    ends: list[float] = []
    if step:
        last = plain_step(net, net.best(), data, recipe)
        last()
        ends = [milliseconds(last, device) / milliseconds(step, device) for _ in range(11)]
    return rows, plain, expected, ends


def search_cost(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Time of a search per image over that of plain training; shares of the expected cost; shrinking, in steps."""
    rows, plain, expected, ends = searched(name, args, pair=True)
    taken = [row["weight_ms"] + row.get("gate_ms", 0.0) for row in rows]
    images = [args.batch_size + row.get("images", 0) for row in rows]

    def relative(a: int, b: int) -> float:
        return sum(taken[a:b]) / sum(images[a:b]) / (fmean(plain[a:b]) / args.batch_size)

    first = next(k for k, row in enumerate(rows) if "gate_ms" in row) + 2  # the very first gate step mixes all blocks
    windows = [relative(k, k + 10) for k in range(0, len(rows) - 9, 10)]
    gate_rows = [row for row in rows if "gate_ms" in row]
    alone = [row["weight_ms"] + row["gate_ms"] - row.get("shrink_ms", 0.0) for row in gate_rows]
    shrinks = [row["shrink_ms"] / step for row, step in zip(gate_rows, alone, strict=True) if "shrink_ms" in row]
    return {
        "net": name,
        "steps": len(rows),
        "plain_ms": spread(plain),
        "relative_cost_mean": round(relative(0, len(rows)), 4),
        "relative_cost_of_10_steps": spread(windows),
        "relative_cost_first": round(relative(first, first + 10), 4),
        "relative_cost_last": round(relative(len(rows) - 10, len(rows)), 4),
        "plain_step_of_last_net": spread(ends),
        "expected_cost_share": spread([e / step for e, step in zip(expected, alone, strict=True)]),
        "expected_cost_of_search": round(sum(expected) / sum(taken), 4),
        "shrink_in_steps": spread(shrinks) if shrinks else None,
        "shrinks": len(shrinks),
        "macs_left": round(rows[-1]["live_macs"] / rows[0]["live_macs"], 4),
        "raw": {"search_ms": [round(t, 2) for t in taken], "plain_ms": [round(t, 2) for t in plain]},
    }


def forget_peak() -> float:
    """MiB that this process has now. On Linux its peak is that from here on; elsewhere it stays what it was."""
    clear, sizes = Path("/proc/self/clear_refs"), Path("/proc/self/statm")
    if not clear.exists():
        return peak_memory_mb(torch.device("cpu"))
    clear.write_text("5")
    return int(sizes.read_text().split()[1]) * resource.getpagesize() / 2**20


def peak_of(what: str, name: str, args: argparse.Namespace, kind: str = "", count: int = 0, give_back=False) -> float:
    """MiB that a training, a search or a pair of steps takes above what the process had; for a process of its own."""
    keep_freed_memory(*[2**17] * give_back)
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    before = 0.0 if device.type == "cuda" else forget_peak()
    if what == "search":
        searched(name, args, pair=False)
    elif what == "plain":
        net, data = supernet_of(name, args.img_size), load_data("digits", img_size=args.img_size, device=device)
        recipe, widest = Recipe(batch_size=args.batch_size, amp=args.amp), widest_of(net)
        step = plain_step(net.to(device), of_kind(net, kind) if kind else widest, data, recipe)
        del net
        for _ in range(3):
            step()
    else:
        step = both_steps(scaled(what, count), args)
        for _ in range(5):
            step()
    return peak_memory_mb(device) - before


def memory_cost(name: str, args: argparse.Namespace, pool: ProcessPoolExecutor) -> dict[str, Any]:
    """Peaks of a search over those of plain training of the widest network, and of the one that takes the most."""

    def peak(what: str, kind: str = "", give_back: bool = False) -> float:
        return round(pool.submit(peak_of, what, name, args, kind, give_back=give_back).result(), 1)

    decisions = supernet_of(name, args.img_size).space.decisions
    kinds = dict.fromkeys(str(o) for d in decisions if d.name.endswith("/block") for o in d.options)
    plain, own = peak("plain"), peak("search")
    plain_in_use, own_in_use = peak("plain", give_back=True), peak("search", give_back=True)
    most = max([plain_in_use, *(peak("plain", kind, give_back=True) for kind in kinds)])
    return {
        "net": name,
        "plain_mb": plain,
        "search_mb": own,
        "peak_memory_ratio": round(own / plain, 4),
        "plain_in_use_mb": plain_in_use,
        "search_in_use_mb": own_in_use,
        "in_use_ratio": round(own_in_use / plain_in_use, 4),
        "heaviest_in_use_mb": most,
        "in_use_ratio_to_heaviest": round(own_in_use / most, 4),
    }


def modes_cost(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Plain steps in bfloat16 and compiled, over those of float32, taken in turn; seconds until it is compiled."""
    random_seed(0)
    device = torch.device(args.device)
    net, data = supernet_of(name, args.img_size).to(device), load_data("digits", img_size=args.img_size, device=device)
    recipe, widest = Recipe(batch_size=args.batch_size), widest_of(net)
    half = replace(recipe, amp=True, amp_dtype="bfloat16")
    steps = {"plain": plain_step(net, widest, data, recipe), "bfloat16": plain_step(net, widest, data, half)}
    steps["compiled"] = plain_step(net, widest, data, recipe, compiled=True)
    taken: dict[str, list[float]] = {mode: [milliseconds(step, device)] for mode, step in steps.items()}
    for _ in range(args.repeats):
        for mode, step in steps.items():
            taken[mode].append(milliseconds(step, device))
    row: dict[str, Any] = {"net": name, "plain_ms": spread(taken["plain"][1:])}
    for mode in ("bfloat16", "compiled"):
        row[mode] = spread([a / b for a, b in zip(taken[mode][1:], taken["plain"][1:], strict=True)])
    return row | {"compile_s": round(taken["compiled"][0] / 1e3, 1)}


def scaled(what: str, count: int) -> MacroSupernet:
    """Three layers with ``count`` blocks to choose from, or widths: of bi-path blocks ("pairs") or Markov gates."""
    kinds = KINDS[:count] if what == "blocks" else KINDS[:1]
    stage, most = Stage(64, 3, 1, kinds, droppable=True), 32 if what == "blocks" else count
    sizes = {"num_classes": 10, "img_size": 16, "divisor": 1, "most_widths": most}
    return MacroSupernet(EfficientNetSpace("scaled", 64, 1, (stage,), 128, "relu", what != "chains", **sizes))


def both_steps(net: MacroSupernet, args: argparse.Namespace) -> Callable[[], None]:
    """A weight step on a drawn net and a gate step on the soft one, with the expected cost in its loss."""
    device = torch.device(args.device)
    net.to(device).train()
    table, draws = CostTable.build(net.space, "macs"), torch.Generator().manual_seed(0)
    most = table.of(table.extremes()[1])
    weights, gates = (torch.optim.Adam(p, 1e-3) for p in (net.weight_parameters(), net.gate_parameters()))
    x = torch.randn(args.batch_size, 3, 16, 16, device=device)
    y = torch.randint(10, (args.batch_size,), device=device)

    def step() -> None:
        weights.zero_grad()
        nn.functional.cross_entropy(net(x, net.widest(draws)), y).backward()
        weights.step()
        gates.zero_grad()
        loss = nn.functional.cross_entropy(net(x, net.soft(draws, 2)), y)
        (loss + table.expected(net.probabilities()) / most).backward()
        gates.step()

    return step


def scale_cost(what: str, counts: Sequence[int], args: argparse.Namespace, pool: ProcessPoolExecutor) -> dict[str, Any]:
    """Steps and peak memory over those of the fewest widths or blocks."""
    random_seed(0)
    device, steps = torch.device(args.device), {n: both_steps(scaled(what, n), args) for n in counts}
    taken: dict[int, list[float]] = {n: [] for n in counts}
    for _ in range(args.repeats + 1):
        for n, step in steps.items():
            taken[n].append(milliseconds(step, device))
    ratios = {n: [a / b for a, b in zip(taken[n][1:], taken[counts[0]][1:], strict=True)] for n in counts}
    peaks = {n: pool.submit(peak_of, what, "", args, count=n).result() for n in counts}
    return {
        "what": what,
        "counts": [len(scaled(what, n).space.decisions[-1].options) if what != "blocks" else n for n in counts],
        "step_ratio": [spread(ratios[n]) for n in counts],
        "memory_ratio": [round(peaks[n] / peaks[counts[0]], 4) for n in counts],
        "raw": {"ms": {n: [round(t, 2) for t in taken[n]] for n in counts}, "peak_mb": peaks},
    }


def gates_cost(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Ratios [median, least, most] over pairs of steps: gates ``open`` (every channel), ``drawn`` evenly, ``soft``."""
    random_seed(0)
    device, size = torch.device(args.device), 2 * args.img_size
    net = TimmSupernet(TimmBase(name, 10, 3, size)).to(device, memory_format=torch.channels_last)
    x = torch.randn(args.batch_size, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
    y = torch.randint(10, (args.batch_size,), device=device)
    answers = {"open": net.widest, "drawn": lambda: net.draw(uniform=True), "soft": net.soft}

    def step(logits_of: Callable[[], Tensor]) -> float:
        loss = nn.functional.cross_entropy(logits_of(), y)
        loss.backward()
        return float(loss.detach())

    steps = {"plain": partial(step, lambda: net.model(x))}
    steps |= {kind: partial(step, lambda of=of: net(x, of())) for kind, of in answers.items()}
    taken: dict[str, list[float]] = {kind: [] for kind in steps}
    for _ in range(args.repeats + 1):
        for kind, call in steps.items():
            taken[kind].append(milliseconds(call, device))
    row: dict[str, Any] = {"model": name, "plain_ms": round(median(taken["plain"][1:]), 1)}
    for kind in answers:
        row[kind] = spread([a / b for a, b in zip(taken[kind][1:], taken["plain"][1:], strict=True)])
    return row


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All sections that were asked for, and over all networks the worst of the figures that have a limit."""
    found: dict[str, Any] = {}
    spawn = multiprocessing.get_context("spawn")

    def told(section: str, row: dict[str, Any]) -> None:
        found.setdefault(section, []).append(row)
        print(section, json.dumps({key: value for key, value in row.items() if key != "raw"}), flush=True)

    with ProcessPoolExecutor(1, spawn, max_tasks_per_child=1) as pool:  # a process has one peak
        for name in args.nets if "search" in args.only else ():
            told("search", search_cost(name, args))
        for name in args.nets if "memory" in args.only else ():
            told("memory", memory_cost(name, args, pool))
        for what, counts in (("pairs", WIDTHS), ("chains", WIDTHS), ("blocks", BLOCKS)) if "scale" in args.only else ():
            told("scale", scale_cost(what, counts, args, pool))
    for name in args.nets if "modes" in args.only and not args.quick else ():
        told("modes", modes_cost(name, args))
    for name in GATED if "gates" in args.only else ():
        told("gates", gates_cost(name, args))
    worst: dict[str, float] = {}
    for key in ("relative_cost_mean", "relative_cost_last", "expected_cost_share", "peak_memory_ratio"):
        values = [row[key] for section in ("search", "memory") for row in found.get(section, ()) if key in row]
        if values:
            worst[key] = max(v[0] if isinstance(v, list) else v for v in values)
    widths = [row for row in found.get("scale", ()) if row["what"] != "blocks"]
    if widths:
        worst["step_ratio_64_vs_2_widths"] = max(row["step_ratio"][-1][0] for row in widths)
        worst["memory_ratio_64_vs_2_widths"] = max(row["memory_ratio"][-1] for row in widths)
    return worst | found


def main() -> None:
    """Print a line a measurement; write all of it as JSON if asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "nets", nargs="*", default=NETS, help="for search and memory: names of supernets or of timm's networks"
    )
    parser.add_argument("--only", nargs="*", choices=SECTIONS, default=SECTIONS, help="these sections")
    parser.add_argument("--quick", action="store_true", help="fewer and smaller steps")
    parser.add_argument("-b", "--batch-size", type=int, help="default 64; 32 if quick")
    parser.add_argument("--img-size", type=int, default=32, help="in pixels; twice that for gates")
    parser.add_argument("--steps", type=int, help="of a search; default 300; 60 if quick")
    parser.add_argument("--repeats", type=int, help="of steps that are compared alone; default 31; 9 if quick")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch on the CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--amp", action="store_true")
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args()
    args.batch_size = args.batch_size or (32 if args.quick else 64)
    args.steps, args.repeats = args.steps or (60 if args.quick else 300), args.repeats or (9 if args.quick else 31)
    keep_freed_memory()  # as the tools do
    torch.set_num_threads(args.threads)
    found = measure(args)
    print(json.dumps({key: value for key, value in found.items() if isinstance(value, float)}))
    if args.json:
        given = {"command": " ".join(["benchmarks/speed.py", *sys.argv[1:]]), "date": date.today().isoformat()}
        write_json(Path(args.json), given | provenance(torch.device(args.device)) | found)


if __name__ == "__main__":
    main()
