#!/usr/bin/env python3
"""From a budget to a trained timm model: search, derive, export, retrain from scratch, compare with the uniform net.

python tools/search.py --budget 300MFLOPs
"""

import math
import re
import time
from dataclasses import asdict, fields, replace
from pathlib import Path
from statistics import fmean, median

import numpy as np
import torch
from cli import (
    ModelKwargs,
    OneLineParser,
    add_data_flags,
    add_recipe_flags,
    add_space_flags,
    console,
    data_of,
    device_of,
    outline_of,
    progress_bar,
    recipe_of,
    run,
)
from rich.table import Table
from timm.utils import random_seed

from dnas.arch import Arch
from dnas.cost import CostTable, resolve_budgets
from dnas.data import Data
from dnas.deployed import parts_of
from dnas.derive import derive, gate_likelihood, random_arch, uniform_arch
from dnas.export import arch_document, build_net, check_name, count_macs, save_weights, verify_export, write_export
from dnas.latency import LatencyTable, check_use, read_table
from dnas.macro import MacroSupernet, size_to
from dnas.profile import time_nets
from dnas.runs import append_row, check_new_folder, peak_memory_mb, provenance, whole_folder, write_json
from dnas.search import SearchConfig, check_config, check_length, search
from dnas.supernet import Supernet
from dnas.timing import Pace, target_of
from dnas.timm_net import TimmBase, TimmSupernet
from dnas.train import Recipe, time_step, train_from_scratch
from dnas.units import Budget, UserError, parse_budget, show
from supernets import SUPERNETS


def parser() -> OneLineParser:
    """All flags."""
    p = OneLineParser(description=__doc__)
    p.add_argument("--budget", required=True, help="300MFLOPs (= MMACs), 5MParams, 50%%; several joined by commas")
    add_space_flags(p)
    p.add_argument("--latency-table", help="for a budget in ms: what tools/profile_latency.py wrote")
    p.add_argument(
        "--latency-for",
        nargs="*",
        default={},
        action=ModelKwargs,
        help="what it must be of: batch=32 dtype=float16 ...",
    )
    p.add_argument("--latency-anyway", action="store_true", help="use it, even if it is of another device or batch")
    p.add_argument("--pretrained", action="store_true", help="with --model: the search starts from timm's weights")
    p.add_argument("--initial-checkpoint", help="with --model: the search starts from the weights in this file")
    p.add_argument("--search-epochs", type=int, default=20, help="epochs of the search (default 20)")
    p.add_argument("--num-random", type=int, default=0, help="also train this many random nets at the same cost")
    p.add_argument("--output", help="run folder (default runs/<supernet>-<budget>-<seed>)")
    p.add_argument("--name", help="name of the exported model (default: dnas_ and the run folder's name)")
    p.add_argument("--dry-run", action="store_true", help="do everything but train: export and check the uniform net")
    add_data_flags(p)
    add_recipe_flags(p)
    group = p.add_argument_group("search (times are shares of the whole search)")
    for field in fields(SearchConfig):
        default = getattr(SearchConfig(), field.name)
        group.add_argument(
            f"--{field.name.replace('_', '-')}", type=type(default), default=default, help=f"({default})"
        )
    return p


def plan_supernet(args, data: Data, budgets: tuple[Budget, ...]) -> Supernet:
    """The supernet. If made of layers, the budget is half of its widest net unless a width is given."""
    outline = outline_of(args, {key: getattr(data, key) for key in ("num_classes", "in_chans", "img_size")})
    if isinstance(outline, TimmBase):
        return TimmSupernet(outline, args.pretrained, args.initial_checkpoint)
    if args.pretrained or args.initial_checkpoint:
        raise UserError("--pretrained and --initial-checkpoint go with --model")
    counted = [b for b in budgets if not b.percent and b.metric != "ms"]  # a table of milliseconds is of one width
    if args.width_mult is not None or not counted or args.latency_table:
        return MacroSupernet(outline(width_mult=args.width_mult or 1.0))
    return MacroSupernet(size_to(lambda width_mult: outline(width_mult=width_mult), counted))


def open_table(args, budgets, device: torch.device) -> tuple[LatencyTable | None, torch.device | None]:
    """The latency table in the flags, if there is one, and the device of this machine that it is for, if it is here.

    Without a space in the flags, the table's becomes theirs. Raises UserError for a table of something else than asked.
    """
    if not args.latency_table:
        for given, is_given in (
            (f"budget {args.budget!r}", any(b.metric == "ms" for b in budgets)),
            ("--latency-for", args.latency_for),
            ("--latency-anyway", args.latency_anyway),
        ):
            if is_given:
                raise UserError(f"{given} needs --latency-table, a file that tools/profile_latency.py writes")
        return None, None
    table = read_table(args.latency_table)
    here = {provenance(d)["device"]: d for d in (device, torch.device("cpu"))}
    name, space = table.header["device"], table.header["space"]
    elsewhere = {} if name in here else {"device": next(iter(here))}
    check_use(table, elsewhere | args.latency_for, args.latency_anyway)
    if not (args.supernet or args.model):
        if space.get("supernet", "prunet") not in SUPERNETS:
            raise UserError(
                f"the latency table is of supernet {space['supernet']!r}, not one of {', '.join(SUPERNETS)}"
            )
        for key, value in space.items():
            if getattr(args, key) in (None, {}):
                setattr(args, key, value)
    return table, here.get(name)


def export_arch(folder: Path, name: str, net: Supernet, arch: Arch, data: Data, tables, budgets, info) -> dict:
    """Write arch.json and model.py and check them: counted MACs equal the cost table's to the unit."""
    shown = {key: getattr(data, key) for key in ("num_classes", "in_chans", "img_size", "mean", "std")}
    rows = [
        {
            "metric": b.metric,
            "limit": b.limit if b.metric == "ms" else int(b.limit),
            "reached": tables[b.metric].of(arch),
        }
        for b in budgets
    ]
    document = arch_document(
        name, net.net_of(arch), shown, supernet=net.name, answers=arch, budget=rows, provenance=info
    )
    plain = build_net(document["net"], num_classes=data.num_classes, in_chans=data.in_chans)
    counted = count_macs(plain, data.in_chans, data.img_size)
    if not counted == document["macs"] == tables["macs"].of(arch) or document["params"] != tables["params"].of(arch):
        costs = {metric: (document[metric], table.of(arch)) for metric, table in tables.items()}
        raise RuntimeError(f"fvcore counts {counted} MACs; the net as built and its cost tables say {costs}")
    write_export(folder, document)
    verify_export(folder)
    return document


def train_arch(net: Supernet, arch: Arch, tables, data: Data, recipe: Recipe, seed: int, device, text: str):
    """Train one architecture from scratch. Returns (model, its row of metrics.json)."""
    random_seed(seed)
    rates = {"drop_rate": recipe.drop, "drop_path_rate": recipe.drop_path}
    model = build_net(net.net_of(arch), num_classes=data.num_classes, in_chans=data.in_chans, **rates).to(device)
    steps = recipe.epochs * len(data.train_batches(recipe.batch_size, seed=seed))
    with progress_bar(f"training {text}", steps) as advance:
        model, row = train_from_scratch(model, data, recipe, seed=seed, on_step=lambda update, loss: advance())
    return model, {metric: table.of(arch) for metric, table in tables.items()} | row


def run_search(
    net, tables, budgets, data: Data, recipe: Recipe, config: SearchConfig, folder: Path, seed: int
) -> list[dict]:
    """Search with a progress bar, writing history.jsonl. Returns its rows."""
    rows: list[dict] = []
    steps = search_steps(data, recipe, config)
    with open(folder / "history.jsonl", "w") as history, progress_bar("searching", steps) as advance:

        def on_row(row: dict) -> None:
            rows.append(row)
            append_row(history, row)
            advance(f"{show('macs', row['live_macs'])} alive")

        search(net, tables, budgets, data, recipe, config, seed=seed, on_row=on_row)
    return rows


def search_steps(data: Data, recipe: Recipe, config: SearchConfig) -> int:
    """Weight steps of a search: its epochs over the images that are not held out for the gates."""
    return recipe.epochs * max(1, round(data.num_train * (1 - config.gate_fraction)) // recipe.batch_size)


def search_figures(rows: list[dict], recipe: Recipe, seconds: float, plain_ms: float, device: torch.device) -> dict:
    """The ``search`` part of metrics.json.

    A first and a last step are medians over up to ten steps that taught both weights and gates; the very first of them
    mixes all blocks once, to see that every gate is alive, and does not count.
    """
    both = [row["weight_ms"] + row["gate_ms"] for row in rows if "gate_ms" in row]
    images = sum(recipe.batch_size + row.get("images", 0) for row in rows)
    some = both[1:] or both
    taught = [row for row in rows if "expected" in row]
    return {
        "seconds": seconds,
        "steps": len(rows),
        "images": images,
        "peak_memory_mb": peak_memory_mb(device),
        "first_step_ms": median(some[:10]),
        "last_step_ms": median(some[-10:]),
        "relative_cost": (1e3 * seconds / images) / (plain_ms / recipe.batch_size),
        "plain_step_ms": plain_ms,
        "expected": taught[-1]["expected"],
        "gate_loss": fmean(row["gate_loss"] for row in taught[-max(1, len(taught) // 10) :]),
    }


def no_better_than_a_guess(loss: float, num_classes: int) -> str:
    """What to say of a search that ended at this cross entropy; empty if its supernet knew more than nothing."""
    guess = math.log(num_classes)
    if loss < 0.98 * guess:
        return ""
    said = f"warning: the search ended at a loss of {loss:.2f}, and a guess has {guess:.2f}"
    return f"{said}: its gates had nothing to go by; another --lr or more --search-epochs may help"


def print_table(folder: Path, name: str, metrics: dict) -> None:
    """What the run came to, and what to do next."""
    table = Table(title=str(folder), title_justify="left", show_header=True)
    for column in ("", "budget", "expected", "found", "uniform"):
        table.add_column(column, justify="left" if not column else "right")
    found, uniform, figures = metrics["found"], metrics["uniform"], metrics["search"]
    limits = {row["metric"]: row["limit"] for row in metrics["budget"]}
    for metric, text in (("macs", "MACs"), ("params", "parameters"), *([("ms", "latency")] if "ms" in found else [])):
        asked = (limits[metric], figures["expected"][metric]) if metric in limits else ()
        shown = [show(metric, v) for v in (*asked, found[metric], uniform[metric])]
        table.add_row(text, *[""] * (4 - len(shown)), *shown)
    if "measured_ms" in found:
        table.add_row("measured", "", "", *(show("ms", row["measured_ms"]) for row in (found, uniform)))
    table.add_row("top-1", "", "", f"{found['top1']:.2f} %", f"{uniform['top1']:.2f} %")
    console.print(table)
    if metrics["random"]:
        tops = [row["top1"] for row in metrics["random"]]
        console.print(f"random nets at the same cost, top-1: {', '.join(f'{t:.2f}' for t in tops)} %")
    for line in (
        f"search: {figures['seconds']:.0f} s, an image {figures['relative_cost']:.2f} x training the widest net; "
        f"a step went from {figures['first_step_ms']:.0f} to {figures['last_step_ms']:.0f} ms",
        f"files: {folder}/model.py (import it, then timm.create_model({name!r}, pretrained=True)), "
        f"model.safetensors, arch.json, metrics.json, history.jsonl, config.json",
        f"next: python tools/retrain.py {folder} --epochs 100 --output {folder}-retrained",
    ):
        console.print(line, soft_wrap=True)


def main() -> None:
    """The whole flow, on one screen."""
    args = parser().parse_args()
    budgets = parse_budget(args.budget)
    recipe, device = recipe_of(args), device_of(args)
    config = check_config(SearchConfig(**{field.name: getattr(args, field.name) for field in fields(SearchConfig)}))
    if args.search_epochs < 1 or args.num_random < 0:
        given = f"--search-epochs {args.search_epochs} --num-random {args.num_random}"
        raise UserError(f"{given}: at least 1 epoch and no negative number is allowed")
    latency, latency_device = open_table(args, budgets, device)  # which may say what the space is
    space = args.model or args.supernet or "prunet"
    default = f"runs/{space}-{args.budget.replace('%', 'pc').replace(',', '-')}-{args.seed}"
    folder = check_new_folder(args.output or default)
    name = args.name or "dnas_" + re.sub("[^a-z0-9]", "_", folder.name.lower())[:58]
    check_name(name)
    data = data_of(args, device)
    random_seed(args.seed)
    net = plan_supernet(args, data, budgets)
    tables = {metric: CostTable.build(net.space, metric) for metric in ("macs", "params")}
    if latency:
        tables["ms"] = CostTable.measured(net.space, [part.site for part in parts_of(net)], latency)
    stays = net.channels.fixed if isinstance(net, TimmSupernet) else ()
    if stays:
        more = f" and {len(stays) - 3} more" if len(stays) > 3 else ""
        console.print(f"channels that stay: {', '.join(stays[:3])}{more}", soft_wrap=True)
    budgets = resolve_budgets(tables, budgets)
    uniform = uniform_arch(net.space, tables, budgets)  # also shows that this grid of widths can meet the budget
    cheapest, dearest = tables["macs"].extremes()
    reach = " to ".join(show("macs", tables["macs"].of(arch)) for arch in (cheapest, dearest))
    images = f"{data.num_train} images of {data.img_size} px"
    console.print(f"{net.name} on {data.name}, {images}: {net.space.num_archs():.0e} nets of {reach}")
    info = provenance(device)

    with whole_folder(folder, complete_with="arch.json"):
        write_json(folder / "config.json", {"args": vars(args), "space": asdict(net.outline), "provenance": info})
        if args.dry_run:
            document = export_arch(folder, name, net, uniform, data, tables, budgets, info)
            costs = {metric: table.of(uniform) for metric, table in tables.items()}
            write_json(folder / "metrics.json", {"budget": document["budget"], "uniform": costs})
            reached = ", ".join(show(metric, cost) for metric, cost in costs.items())
            console.print(f"dry run: the uniform net at {', '.join(map(str, budgets))} is in {folder} ({reached})")
            return
        search_recipe = replace(recipe, epochs=args.search_epochs, mixup=0.0, cutmix=0.0, drop=0.0, drop_path=0.0)
        check_length(search_steps(data, search_recipe, config), config)
        widest = build_net(net.net_of(dearest), num_classes=data.num_classes, in_chans=data.in_chans).to(device)
        plain_ms = time_step(widest, data, recipe)
        del widest
        # A weight step is about one step of the widest net, a gate step about two; training the found net less.
        share = min(1.0, budgets[0].limit / tables[budgets[0].metric].of(tables[budgets[0].metric].extremes()[1]))
        work = search_steps(data, search_recipe, config) * (1 + 2 * (1 - config.warmup) / config.gate_every)
        work += share * (2 + args.num_random) * recipe.epochs * data.num_train / recipe.batch_size
        console.print(f"about {max(1, round(work * plain_ms / 6e4))} min on this machine, at {plain_ms:.0f} ms a step")

        net = net.to(
            device=device, memory_format=torch.channels_last if recipe.channels_last else torch.preserve_format
        )
        started = time.perf_counter()
        rows = run_search(net, tables, budgets, data, search_recipe, config, folder, args.seed)
        figures = search_figures(rows, recipe, time.perf_counter() - started, plain_ms, device)
        if warning := no_better_than_a_guess(figures["gate_loss"], data.num_classes):
            console.print(warning)
        found = derive(net.space, tables, budgets, gate_likelihood(net))
        document = export_arch(folder, name, net, found, data, tables, budgets, info)
        model, found_row = train_arch(net, found, tables, data, recipe, args.seed, device, "found")
        save_weights(model, folder)
        verify_export(folder)
        uniform_model, uniform_row = train_arch(net, uniform, tables, data, recipe, args.seed, device, "uniform")
        if latency and latency_device:
            both, shape = (model, uniform_model), (data.in_chans, data.img_size, data.img_size)
            target = target_of(latency.header, latency_device)
            ms = time_nets(both, shape, target, Pace(target, latency.header["pace_us"]), 25, 20.0)
            for row, value in zip((found_row, uniform_row), np.median(ms, 1), strict=True):
                row["measured_ms"] = float(value)
        metrics = {
            "budget": document["budget"],
            "search": figures,
            "found": found_row,
            "uniform": uniform_row,
            "random": [],
        }
        for k in range(args.num_random):
            arch = random_arch(net.space, tables, budgets, seed=1000 * args.seed + k)
            metrics["random"].append(train_arch(net, arch, tables, data, recipe, args.seed, device, f"random {k}")[1])
        write_json(folder / "metrics.json", metrics)
    print_table(folder, name, metrics)


if __name__ == "__main__":
    run(main)
