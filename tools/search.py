#!/usr/bin/env python3
"""From a budget to a trained timm model: search, derive, export, retrain from scratch, compare with the uniform net.

python tools/search.py --budget 300MFLOPs
"""

import argparse
import copy
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import IO

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
    new_folder,
    open_table,
    outline_of,
    progress_bar,
    recipe_of,
    run,
)
from rich.table import Table
from timm.utils import random_seed
from torch import nn

from dnas.arch import Arch
from dnas.cost import CostTable, resolve_budgets
from dnas.data import Data
from dnas.deployed import parts_of
from dnas.derive import derive, gate_likelihood, random_arch, uniform_arch
from dnas.distributed import check_shares, gathered, rank, split, world_size
from dnas.export import arch_document, build_net, check_name, count_macs, save_weights, verify_export, write_export
from dnas.latency import LatencyTable
from dnas.macro import MacroSupernet, size_to
from dnas.profile import calibrated, time_nets
from dnas.report import no_better_than_a_guess, search_figures
from dnas.runs import append_row, provenance, whole_folder, write_json
from dnas.search import SearchConfig, SearchState, begin, check_config, check_length, go_on
from dnas.supernet import Supernet
from dnas.timing import Pace, target_of
from dnas.timm_net import TimmBase, TimmSupernet
from dnas.train import Recipe, time_step, train_from_scratch
from dnas.units import Budget, UserError, parse_budget, show


def parser() -> OneLineParser:
    """All flags."""
    p = OneLineParser(description=__doc__)
    goal = p.add_mutually_exclusive_group(required=True)
    goal.add_argument("--budget", help="300MFLOPs (= MMACs), 5MParams, 50%%; several joined by commas hold at once")
    goal.add_argument("--sweep", help="instead: a net for each, as 100MFLOPs,200MFLOPs, after one common warm-up")
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
    p.add_argument(
        "--output", help="run folder (default runs/<supernet>-<budget>-<seed>); of a sweep, with one in it a budget"
    )
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
        model, row = train_from_scratch(model, data, recipe, seed=seed, on_step=advance)
    return model, {metric: table.of(arch) for metric, table in tables.items()} | row


def run_search(plan: "Plan", state: SearchState, budgets, history: IO[str] | None, until: float = 1.0) -> list[dict]:
    """Search with a progress bar, writing ``history`` if there is one. Returns its rows."""
    rows: list[dict] = []
    left = math.ceil(until * search_steps(plan.data, plan.search_recipe, plan.config)) - state.learner.update
    with progress_bar("searching", left) as advance:

        def on_row(row: dict) -> None:
            rows.append(row)
            if history:
                append_row(history, row)
            advance(f"{show('macs', row['live_macs'])} alive")

        go_on(
            state, plan.tables, budgets, plan.data, plan.search_recipe, plan.config,
            seed=plan.args.seed, on_row=on_row, until=until,
        )  # fmt: skip
    return rows


def search_steps(data: Data, recipe: Recipe, config: SearchConfig) -> int:
    """Weight steps of a search: its epochs over the images that are not held out for the gates."""
    return recipe.epochs * max(1, round(data.num_train * (1 - config.gate_fraction)) // recipe.batch_size)


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


@dataclass(frozen=True)
class Plan:
    """What all budgets of a command have in common. ``latency_device``: that of the table, where it is at hand."""

    args: argparse.Namespace
    net: Supernet
    tables: dict[str, CostTable]
    data: Data
    recipe: Recipe
    search_recipe: Recipe
    config: SearchConfig
    device: torch.device
    info: dict
    latency: LatencyTable | None
    latency_device: torch.device | None


@dataclass(frozen=True)
class Goal:
    """One budget, the uniform net of it, and where the found one goes."""

    budgets: tuple[Budget, ...]
    uniform: Arch
    folder: Path
    name: str


def make_plan(
    args, asked: list[tuple[Budget, ...]], latency: LatencyTable | None, latency_device: torch.device | None
) -> Plan:
    """Everything that is known before a file is written. Raises UserError for whatever is wrong with the flags."""
    recipe, device = recipe_of(args), device_of(args)
    config = check_config(SearchConfig(**{field.name: getattr(args, field.name) for field in fields(SearchConfig)}))
    if args.search_epochs < 1 or args.num_random < 0:
        given = f"--search-epochs {args.search_epochs} --num-random {args.num_random}"
        raise UserError(f"{given}: at least 1 epoch and no negative number is allowed")
    data = data_of(args, device)
    random_seed(args.seed)
    net = plan_supernet(args, data, max(asked, key=lambda budgets: budgets[0].limit))
    tables = {metric: CostTable.build(net.space, metric) for metric in ("macs", "params")}
    if latency:
        tables["ms"] = CostTable.measured(net.space, [part.site for part in parts_of(net)], latency)
    search_recipe = replace(recipe, epochs=args.search_epochs, mixup=0.0, cutmix=0.0, drop=0.0, drop_path=0.0)
    info = provenance(device)
    return Plan(args, net, tables, data, recipe, search_recipe, config, device, info, latency, latency_device)


def make_goals(plan: Plan, asked: list[tuple[Budget, ...]], folder: Path, name: str) -> list[Goal]:
    """The budgets in order, each shown to be within reach of this grid of widths by its uniform net."""
    goals = []
    for given in asked:
        budgets = resolve_budgets(plan.tables, given)
        uniform = uniform_arch(plan.net.space, plan.tables, budgets)
        text = "" if len(asked) == 1 else str(given[0]).replace("%", "pc")
        own = f"{name}_{re.sub('[^a-z0-9]', '_', text.lower())}" if text else name
        check_name(own)
        goals.append(Goal(budgets, uniform, folder / text, own))
    return goals


def introduce(plan: Plan) -> None:
    """What is searched."""
    net, table = plan.net, plan.tables["macs"]
    stays = net.channels.fixed if isinstance(net, TimmSupernet) else ()
    if stays:
        more = f" and {len(stays) - 3} more" if len(stays) > 3 else ""
        console.print(f"channels that stay: {', '.join(stays[:3])}{more}", soft_wrap=True)
    reach = " to ".join(show("macs", table.of(arch)) for arch in table.extremes())
    images = f"{plan.data.num_train} images of {plan.data.img_size} px"
    console.print(f"{net.name} on {plan.data.name}, {images}: {net.space.num_archs():.0e} nets of {reach}")


def estimate(plan: Plan, goals: list[Goal], plain_ms: float) -> float:
    """Minutes. A weight step is about one step of the widest net, a gate step about two; the found nets take less."""
    config, steps = plan.config, search_steps(plan.data, plan.search_recipe, plan.config)
    work = steps * config.warmup
    for goal in goals:
        budget = goal.budgets[0]
        share = min(1.0, budget.limit / plan.tables[budget.metric].of(plan.tables[budget.metric].extremes()[1]))
        work += steps * (1 - config.warmup) * (1 + 2 / config.gate_every)
        work += share * (2 + plan.args.num_random) * plan.recipe.epochs * plan.data.num_train / plan.recipe.batch_size
    return work * plain_ms / 6e4


def dry_run(plan: Plan, goal: Goal) -> None:
    """All but training: the uniform net's files."""
    document = export_arch(
        goal.folder, goal.name, plan.net, goal.uniform, plan.data, plan.tables, goal.budgets, plan.info
    )
    costs = {metric: table.of(goal.uniform) for metric, table in plan.tables.items()}
    write_json(goal.folder / "metrics.json", {"budget": document["budget"], "uniform": costs})
    reached = ", ".join(show(metric, cost) for metric, cost in costs.items())
    console.print(f"dry run: the uniform net at {', '.join(map(str, goal.budgets))} is in {goal.folder} ({reached})")


def measured_ms(plan: Plan, models: Sequence[nn.Module]) -> list[float]:
    """Of networks on the device of the latency table, taken in turn; measured by the first process only."""
    found = []
    if rank() == 0 and plan.latency and plan.latency_device:
        shape = (plan.data.in_chans, plan.data.img_size, plan.data.img_size)
        target = target_of(plan.latency.header, plan.latency_device)
        ms = time_nets(models, shape, target, Pace(target, plan.latency.header["pace_us"]), 25, 20.0)
        found = [float(value) for value in np.median(ms, 1)]
    return gathered(found)[0]


def in_time(plan: Plan, goal: Goal, find: Callable[[dict[str, CostTable]], Arch]) -> tuple[Arch, dict[str, CostTable]]:
    """``find(tables)``; for a budget in ms, where its device is at hand, such that it measures what it should."""
    limits = [b.limit for b in goal.budgets if b.metric == "ms"]
    if not (limits and plan.latency_device):
        return find(plan.tables), plan.tables
    sizes = {"num_classes": plan.data.num_classes, "in_chans": plan.data.in_chans}

    def measure(arch: Arch) -> float:
        return measured_ms(plan, [build_net(plan.net.net_of(arch), **sizes)])[0]

    arch, table = calibrated(plan.tables["ms"], limits[0], lambda ms: find(plan.tables | {"ms": ms}), measure)
    return arch, plan.tables | {"ms": table}


def find(plan: Plan, goal: Goal, state: SearchState, warm_rows: list[dict], warm_s: float, plain_ms: float) -> dict:
    """From a warm search to the found net, trained, beside those that it is compared with. Returns metrics.json."""
    net, data, recipe, seed = state.net, plan.data, plan.recipe, plan.args.seed
    started = time.perf_counter()
    with open(goal.folder / "history.jsonl", "w") as history:
        for row in warm_rows:
            append_row(history, row)
        rows = warm_rows + run_search(plan, state, goal.budgets, history)
    seconds = warm_s + time.perf_counter() - started
    figures = search_figures(rows, plan.search_recipe, seconds, plain_ms, plan.device)
    if warning := no_better_than_a_guess(figures["gate_loss"], data.num_classes):
        console.print(warning)
    like = gate_likelihood(net)
    found, tables = in_time(plan, goal, lambda tables: derive(net.space, tables, goal.budgets, like))
    uniform, even_tables = goal.uniform, plan.tables
    if tables is not plan.tables:
        uniform, even_tables = in_time(plan, goal, lambda tables: uniform_arch(net.space, tables, goal.budgets))
    document = export_arch(goal.folder, goal.name, net, found, data, tables, goal.budgets, plan.info)
    model, found_row = train_arch(net, found, tables, data, recipe, seed, plan.device, "found")
    save_weights(model, goal.folder)
    verify_export(goal.folder)
    uniform_model, uniform_row = train_arch(net, uniform, even_tables, data, recipe, seed, plan.device, "uniform")
    if plan.latency and plan.latency_device:
        for row, value in zip((found_row, uniform_row), measured_ms(plan, (model, uniform_model)), strict=True):
            row["measured_ms"] = value
    metrics = {
        "budget": document["budget"],
        "search": figures,
        "found": found_row,
        "uniform": uniform_row,
        "random": [],
    }
    for k in range(plan.args.num_random):
        arch = random_arch(net.space, tables, goal.budgets, seed=1000 * seed + k)
        metrics["random"].append(train_arch(net, arch, tables, data, recipe, seed, plan.device, f"random {k}")[1])
    return metrics


def main() -> None:
    """The whole flow, on one screen."""
    args = parser().parse_args()
    texts = args.sweep.split(",") if args.sweep else [args.budget]
    asked = [parse_budget(text) for text in texts]
    if len({budgets[0].metric + "%" * budgets[0].percent for budgets in asked}) > 1 or len({*asked}) < len(asked):
        raise UserError(f"--sweep {args.sweep!r}: budgets of one kind are expected, each once")
    latency = open_table(args, [b for budgets in asked for b in budgets])  # which may say what the space is
    default = "-".join(texts).replace("%", "pc").replace(",", "-")
    output = args.output or f"runs/{args.model or args.supernet or 'prunet'}-{default}-{args.seed}"
    name = args.name or "dnas_" + re.sub("[^a-z0-9]", "_", Path(output).name.lower())[:58]
    parts = min(world_size(), len(asked))
    check_shares(args.batch_size, parts)
    new_folder(output)
    plan = make_plan(args, asked, *latency)
    goals = make_goals(plan, asked, Path(output), name)
    introduce(plan)
    config = {"args": vars(args), "space": asdict(plan.net.outline), "provenance": plan.info}
    if args.dry_run:
        for goal in goals if rank() == 0 else ():
            with whole_folder(goal.folder):
                write_json(goal.folder / "config.json", config)
                dry_run(plan, goal)
        return
    check_length(search_steps(plan.data, plan.search_recipe, plan.config), plan.config)
    sizes = {"num_classes": plan.data.num_classes, "in_chans": plan.data.in_chans}
    widest = build_net(plan.net.net_of(plan.tables["macs"].extremes()[1]), **sizes).to(plan.device)
    plain_ms = time_step(widest, plan.data, plan.recipe)
    del widest
    minutes = max(1, round(estimate(plan, goals, plain_ms)))
    console.print(f"about {minutes} min on this machine, at {plain_ms:.0f} ms a step")

    layout = torch.channels_last if plan.recipe.channels_last else torch.preserve_format
    net = plan.net.to(device=plan.device, memory_format=layout)
    state = begin(net, plan.tables, plan.data, plan.search_recipe, plan.config, args.seed)
    warm_rows, started = [], time.perf_counter()
    if len(goals) > 1 and plan.config.warmup:
        warm_rows = run_search(plan, state, (), None, until=plan.config.warmup)
    warm_s = time.perf_counter() - started
    mine = goals[split(parts) :: parts]
    console.quiet = rank() > 0
    for k, goal in enumerate(mine):
        own = goal if rank() == 0 else replace(goal, folder=new_folder(output))
        with whole_folder(own.folder, complete_with="arch.json"):
            write_json(own.folder / "config.json", config)
            alone = copy.deepcopy(state) if k + 1 < len(mine) else state
            metrics = find(plan, own, alone, warm_rows, warm_s, plain_ms)
            write_json(own.folder / "metrics.json", metrics)
        print_table(goal.folder, goal.name, metrics)


if __name__ == "__main__":
    run(main)
