"""One budget of ``dnas search``, from a supernet that has been warmed up to what is in the run folder.

Its stages are the search, which ends with the nets to be trained, and a training for each of them. A stage that is
finished is in the journal and not done again; one that was stopped goes on where it was.
"""

import argparse
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
import torch
from rich.table import Table
from timm.utils import random_seed
from torch import nn

from dnas.export.model_file import arch_document, build_net, count_macs, save_weights, verify_export, write_export
from dnas.latency.profile import calibrated, time_nets
from dnas.latency.timing import Pace, target_of
from dnas.methods.baselines import random_arch, uniform_arch
from dnas.methods.derive import derive, gate_likelihood
from dnas.methods.search import SearchConfig, SearchState, go_on, load_search, search_data
from dnas.nets.supernet import Supernet
from dnas.report.diagnosis import no_better_than_a_guess, over_budget, signs_of_collapse
from dnas.report.metrics import decisions_told, effort_told, facts, layers_told, search_figures
from dnas.runtime.checkpoint import Journal, of_this_run
from dnas.runtime.distributed import gathered, rank
from dnas.runtime.progress import console, progress_bar
from dnas.runtime.run_folder import append_row, read_rows, write_json, write_rows
from dnas.runtime.signals import stop
from dnas.spec.budget import Budget, show
from dnas.spec.cost import CostTable
from dnas.spec.latency_table import LatencyTable
from dnas.spec.space import Arch
from dnas.training.data import Data
from dnas.training.from_scratch import train_from_scratch
from dnas.training.recipe import Recipe

Trained = TypeVar("Trained")


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


def search_steps(data: Data, recipe: Recipe, config: SearchConfig) -> int:
    """Weight steps of a search: its epochs over the images that are not held out for the gates."""
    return recipe.epochs * max(1, round(data.num_train * (1 - config.gate_fraction)) // recipe.batch_size)


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


def in_steps(train: Callable[..., Trained], journal: Journal, text: str, steps: int) -> Trained:
    """``train(on_step=, saved=)`` with a progress bar, from where the journal knows it was stopped."""
    saved = journal.under_way(text)
    with progress_bar(f"training {text}", steps) as advance, stop.between_steps():
        if saved:
            with of_this_run():
                done = saved["learner"]["update"]
            advance(steps=done)
            console.print(f"the training of {text} goes on at step {done} of {steps}")

        def on_step(state: Callable[[], dict]) -> None:
            advance()
            journal.step(text, state)

        return train(on_step=on_step, saved=saved)


def train_arch(plan: Plan, arch: Arch, costs: Mapping[str, Any], journal: Journal, what: str) -> tuple[nn.Module, dict]:
    """Train one architecture from scratch, the stage ``what``. Returns (model, its row of metrics.json)."""
    data, recipe, seed = plan.data, plan.recipe, plan.args.seed
    random_seed(seed)
    rates = {"drop_rate": recipe.drop, "drop_path_rate": recipe.drop_path}
    model = build_net(plan.net.net_of(arch), num_classes=data.num_classes, in_chans=data.in_chans, **rates).to(
        plan.device
    )
    steps = recipe.epochs * len(data.train_batches(recipe.batch_size, seed=seed))
    train = partial(train_from_scratch, model, data, recipe, seed=seed)
    model, row = in_steps(train, journal, what, steps)
    return model, {**costs, **row}


def run_search(
    plan: Plan, state: SearchState, budgets, until: float = 1.0, on_row: Callable[[dict], None] | None = None
):
    """Search with a progress bar, from where ``state`` is."""
    total = math.ceil(until * search_steps(plan.data, plan.search_recipe, plan.config))
    with progress_bar("searching", total) as advance:
        advance(steps=state.learner.update)

        def told(row: dict) -> None:
            advance(f"{show('macs', row['live_macs'])} alive")
            if on_row:
                on_row(row)

        go_on(
            state, plan.tables, budgets, plan.data, plan.search_recipe, plan.config,
            seed=plan.args.seed, on_row=told, until=until,
        )  # fmt: skip


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


@contextmanager
def scalars(plan: Plan, goal: Goal, rows: Sequence[dict]) -> Iterator[Callable[[dict], None]]:
    """``log(row)`` for the rows of a history after these: to TensorBoard, if it was asked for.

    What is there already is written anew: of what a process that was killed had logged, some may not be on disk.
    """
    if plan.args.log is None or rank() > 0:
        yield lambda row: None
        return
    from torch.utils.tensorboard import SummaryWriter  # which imports a package that few need

    with SummaryWriter(str(goal.folder / "tensorboard"), purge_step=0) as writer:

        def log(row: dict) -> None:
            for name, value in row.items():
                found = {f"{name}/{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
                for tag, number in found.items():
                    if name != "step" and isinstance(number, (int, float)):
                        writer.add_scalar(tag, number, row["step"])

        for row in rows:
            log(row)
        yield log


FIGURES, DETAILS = ("budget", "search", "warnings"), ("decisions", "layers")  # of metrics.json, known after a search
Begun = tuple[SearchState, list[dict], float]  # a search; its rows and its seconds so far


def search_stage(
    plan: Plan, goal: Goal, journal: Journal, begun: Callable[[bool], Begun], plain_ms: float
) -> dict[str, Any]:
    """Search, derive and export. Returns the figures of metrics.json, and all nets to be trained with their costs."""
    path, data = goal.folder / "history.jsonl", plan.data
    state, rows, seconds = begun(not journal.knows("search"))
    with of_this_run():
        if saved := journal.under_way("search"):
            load_search(state, saved["search"])
            rows, seconds = read_rows(path, saved["rows"]), saved["seconds"]
            console.print(f"the search goes on at step {len(rows)}")
    write_rows(path, rows)
    started, count = time.perf_counter() - seconds, len(rows)
    with open(path, "a") as history, scalars(plan, goal, rows) as log, stop.between_steps():

        def on_row(row: dict) -> None:
            nonlocal count
            append_row(history, row)
            log(row)
            count += 1
            journal.step("search", lambda: written(history))

        def written(history: IO[str]) -> dict[str, Any]:
            os.fsync(history.fileno())  # no checkpoint may know of a row that is not there
            seconds = time.perf_counter() - started
            return {"search": search_data(state), "rows": count, "seconds": seconds}

        run_search(plan, state, goal.budgets, on_row=on_row)
    seconds = time.perf_counter() - started
    figures = search_figures(read_rows(path, count), plan.search_recipe, seconds, plain_ms, plan.device)
    like, net = gate_likelihood(state.net), state.net
    found, tables = in_time(plan, goal, lambda tables: derive(net.space, tables, goal.budgets, like))
    uniform, even_tables = goal.uniform, plan.tables
    if tables is not plan.tables:
        uniform, even_tables = in_time(plan, goal, lambda tables: uniform_arch(net.space, tables, goal.budgets))
    distributions = {name: p.detach() for name, p in net.probabilities().items()}
    signs = no_better_than_a_guess(figures["gate_loss"], data.num_classes)
    signs += over_budget(figures["expected"], {b.metric: b.limit for b in goal.budgets})
    signs += signs_of_collapse(net.space, found, uniform, distributions)
    for line in signs:
        console.print(f"warning: {line}", soft_wrap=True)
    document = export_arch(goal.folder, goal.name, net, found, data, tables, goal.budgets, plan.info)
    nets = {"found": (found, tables), "uniform": (uniform, even_tables)}
    for k in range(plan.args.num_random):
        arch = random_arch(net.space, tables, goal.budgets, seed=1000 * plan.args.seed + k)
        nets[f"random {k}"] = arch, tables
    rows_of = {}
    for name, (arch, own) in nets.items():
        costs = {metric: table.of(arch) for metric, table in own.items()}
        if "ms" in costs:  # by a table that may have been scaled to what such nets measured; and before that
            costs["predicted_ms"] = plan.tables["ms"].of(arch)
        rows_of[name] = {"arch": dict(arch), "costs": costs}
    widest = plan.tables["macs"].extremes()[1]
    return {
        "budget": document["budget"],
        "search": figures,
        "warnings": signs,
        "decisions": decisions_told(net.space, found, uniform),
        "layers": layers_told(net, plan.latency, {"widest": widest, "found": found, "uniform": uniform}),
        "nets": rows_of,
    }


def find(plan: Plan, goal: Goal, journal: Journal, begun: Callable[[bool], Begun], plain_ms: float) -> dict:
    """From a search to the found net, trained, beside those that it is compared with. Returns metrics.json.

    ``begun(warm)`` gives a search that is warmed up, or one that takes its state from the journal.
    """
    if "search" not in journal.done:
        journal.finish("search", search_stage(plan, goal, journal, begun, plain_ms))
    with of_this_run():
        searched, space = journal.done["search"], plan.net.space
        first = {key: searched[key] for key in FIGURES}
        last = {key: searched[key] for key in DETAILS if key in searched}  # checkpoints of older versions lack them
        nets = {what: (space.complete(net["arch"]), dict(net["costs"])) for what, net in searched["nets"].items()}
    for what, (arch, costs) in nets.items():
        if what not in journal.done:
            model, row = train_arch(plan, arch, costs, journal, what)
            if what == "found":
                save_weights(model, goal.folder)
                verify_export(goal.folder)
            journal.finish(what, row)
    trained = {what: dict(journal.done[what]) for what in nets}
    if plan.latency and plan.latency_device:
        sizes = {"num_classes": plan.data.num_classes, "in_chans": plan.data.in_chans}
        models = [build_net(plan.net.net_of(nets[what][0]), **sizes) for what in ("found", "uniform")]
        for what, ms in zip(("found", "uniform"), measured_ms(plan, models), strict=True):
            trained[what]["measured_ms"] = ms
    return {
        **first,
        "validation_images": plan.data.num_val,
        "found": trained.pop("found"),
        "uniform": trained.pop("uniform"),
        "random": [*trained.values()],
        **last,
    }


def print_table(folder: Path, name: str, metrics: dict) -> None:
    """What the run came to, and what to do next."""
    table = Table(title=str(folder), title_justify="left", show_header=True)
    for column in ("", "found", "uniform", "budget", "expected"):
        table.add_column(column, justify="left" if not column else "right")
    for row in facts(metrics):
        table.add_row(*row)
    console.print(table)
    if metrics["random"]:
        tops = [row["top1"] for row in metrics["random"]]
        console.print(f"random nets at the same cost, top-1: {', '.join(f'{t:.2f}' for t in tops)} %")
    for line in (
        f"search: {effort_told(metrics['search'])}",
        f"files: {folder}/model.py (import it, then timm.create_model({name!r}, pretrained=True)), "
        f"model.safetensors, report.html, arch.json, metrics.json, history.jsonl, config.json",
        f"next: python tools/retrain.py {folder} --epochs 100 --output {folder}-retrained",
    ):
        console.print(line, soft_wrap=True)
