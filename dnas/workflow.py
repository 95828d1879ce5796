"""One budget of ``dnas search``, from a supernet that has been warmed up to what is in the run folder.

Its stages are the search, which ends with the nets to be trained, and a training for each of them. A stage that is
finished is in the journal and not done again; one that was stopped goes on where it was.
"""

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
import safetensors.torch
import torch
from rich.table import Table
from timm.utils import random_seed
from torch import nn

from dnas.export.model_file import read_arch, write_state
from dnas.export.own_file import PROGRAM
from dnas.export.verify import verify_export
from dnas.latency.profile import calibrated, time_nets
from dnas.latency.timing import CpuSpeedReference, target_of
from dnas.methods.loop import load_search, run, search_data, steps_of
from dnas.methods.method import Search, Task
from dnas.methods.rules import RULES, random_arch
from dnas.nets.shrink import has_weights_of, plain_state
from dnas.plan import BudgetRun, Plan, build, export_arch, save_model
from dnas.report.diagnosis import as_good_as_one_answer, no_better_than_a_guess, over_budget, signs_of_collapse
from dnas.report.metrics import arm_rows, decision_rows, effort, facts, layer_rows, score_name, search_figures
from dnas.runtime.checkpoint import Journal, checkpoint_errors
from dnas.runtime.distributed import from_first, gathered, rank
from dnas.runtime.progress import console, progress_bar
from dnas.runtime.run_folder import append_row, read_rows, write_rows
from dnas.runtime.signals import stop
from dnas.spec.budget import show
from dnas.spec.checks import UserError
from dnas.spec.cost import CostTable
from dnas.spec.image_size import sides
from dnas.spec.recipe import arm_epochs, parse_arms
from dnas.spec.space import Arch
from dnas.training.from_scratch import train_from_scratch
from dnas.training.loop import evaluate, recalibrate, steps_per_epoch

Trained = TypeVar("Trained")


def in_steps(train: Callable[..., Trained], journal: Journal, text: str, steps: int, first: int = 0) -> Trained:
    """``train(on_step=, saved=)`` with a progress bar, from where the journal knows it was stopped."""
    saved, done = journal.under_way(text), first
    with progress_bar(f"training {text}", steps) as advance, stop.between_steps():
        if saved:
            with checkpoint_errors():
                done = saved["learner"]["update"]
            advance(steps=done)
            console.print(f"the training of {text} goes on at step {done} of {steps}")

        elif first:
            advance(steps=first)

        def on_step(state: Callable[[], dict]) -> None:
            nonlocal done
            advance()
            done += 1
            journal.step(text, state, last=done == steps)

        return train(on_step=on_step, saved=saved)


def weights_file(folder: Path, what: str) -> Path:
    """Where the weights are that the search has for one of the networks that it ended with."""
    return folder / ("search.safetensors" if what == "found" else f"search-{what.replace(' ', '-')}.safetensors")


CALIBRATION = 20  # batches that the norms of an inherited network see before its first evaluation


def train_arch(plan: Plan, arch: Arch, costs: Mapping[str, Any], journal: Journal, what: str) -> tuple[nn.Module, dict]:
    """Train one architecture, the stage ``what``. Returns (model, its row of metrics.json).

    It starts from scratch, or from the weights that the search has for it if these are kept (``inherited``); then its
    norms are recalibrated, and ``before`` is its top-1 before the training.
    """
    own = journal.done["search"]["nets"][what]
    data, seed = plan.data, plan.args.seed
    recipe = replace(plan.recipe, epochs=own["epochs"], freeze=plan.recipe.freeze if own["inherited"] else "")
    random_seed(seed)
    model = build(plan, arch, drop=True).to(plan.device)
    before: dict[str, Any] = {}
    if own["inherited"]:
        weights = weights_file(journal.folder, what)
        if rank() == 0 and not weights.is_file():
            raise UserError(f"{str(weights)!r} is gone: the training of {what} starts from it")
        if rank() == 0:
            model.load_state_dict(safetensors.torch.load_file(weights))
        from_first(model.state_dict().values())
        recalibrate(model, islice(data.train_batches(recipe.batch_size, seed=seed), CALIBRATION), recipe)
        from_first(model.state_dict().values())
        scores = evaluate(model, data.val_batches(recipe.batch_size), recipe, data.own_loss)
        before = {"inherited": True, "before": scores["top1"]}
    steps = recipe.epochs * steps_per_epoch(data.train_batches(recipe.batch_size, seed=seed), recipe)
    train = partial(train_from_scratch, model, data, recipe, seed=seed, criterion=plan.task.criterion)
    model, row = in_steps(train, journal, what, steps)
    return model, {**costs, **row, **before}


def run_search(
    plan: Plan, search: Search, task: Task, until: float = 1.0, on_row: Callable[[dict], None] | None = None
) -> None:
    """Search with a progress bar, from where ``search`` is."""
    with progress_bar("searching", math.ceil(until * steps_of(plan.method, task))) as advance:
        advance(steps=search.learner.update if search.learner else 0)

        def told(row: dict) -> None:
            advance(f"{show('macs', row['live_macs'])} alive")
            if on_row:
                on_row(row)

        run(plan.method, search, task, on_row=told, until=until)


def measured_ms(plan: Plan, models: Sequence[nn.Module]) -> list[float]:
    """Of networks on the device of the latency table, taken in turn; measured by the first process only."""
    found = []
    if rank() == 0 and plan.latency and plan.latency_device:
        shape = (plan.data.in_chans, *sides(plan.data.img_size))
        target = target_of(plan.latency.header, plan.latency_device)
        before = torch.get_num_threads()
        torch.set_num_threads(target.threads)
        try:
            ms = time_nets(models, shape, target, CpuSpeedReference(target, plan.latency.header["pace_us"]), 25, 20.0)
        finally:
            torch.set_num_threads(before)
        found = [float(value) for value in np.median(ms, 1)]
    return gathered(found)[0]


def in_time(
    plan: Plan, goal: BudgetRun, find: Callable[[dict[str, CostTable]], Arch]
) -> tuple[Arch, dict[str, CostTable]]:
    """``find(tables)``; for a budget in ms, where its device is at hand, such that it measures what it should."""
    limits = [b.limit for b in goal.budgets if b.metric == "ms"]
    if not (limits and plan.latency_device):
        return find(plan.tables), plan.tables

    def measure(arch: Arch) -> float:
        return measured_ms(plan, [build(plan, arch)])[0]

    arch, table = calibrated(plan.tables["ms"], limits[0], lambda ms: find(plan.tables | {"ms": ms}), measure)
    return arch, plan.tables | {"ms": table}


@contextmanager
def scalars(plan: Plan, goal: BudgetRun, rows: Sequence[dict]) -> Iterator[Callable[[dict], None]]:
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
Begun = tuple[Search, list[dict], float]  # a search; its rows and its seconds so far


def warnings_of(
    plan: Plan, goal: BudgetRun, figures: Mapping[str, Any], search: Search, found: Arch, uniform: Arch
) -> list[str]:
    """What is suspicious about a search that has ended; nothing about a method that trains nothing."""
    if search.learner is None:
        return []
    signs = []
    if "gate_loss" in figures:
        signs += no_better_than_a_guess(figures["gate_loss"], plan.data.num_classes)
    if "expected" in figures:
        signs += over_budget(figures["expected"], {b.metric: b.limit for b in goal.budgets})
    return signs + signs_of_collapse(search.net.space, found, uniform, plan.method.distributions(search))


def search_stage(
    plan: Plan, goal: BudgetRun, journal: Journal, begun: Callable[[bool], Begun], plain_ms: float
) -> dict[str, Any]:
    """Search, derive and export. Returns the figures of metrics.json, and all nets to be trained with their costs."""
    path, data = goal.folder / "history.jsonl", plan.data
    search, rows, seconds = begun(not journal.knows("search"))
    method, task = plan.method, replace(plan.task, budgets=goal.budgets)
    with checkpoint_errors():
        if saved := journal.under_way("search"):
            load_search(method, search, saved["search"])
            # Of several processes only the first has the folder of the run.
            rows = gathered(read_rows(path, saved["rows"]) if rank() == 0 else [])[0]
            seconds = saved["seconds"]
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
            return {"search": search_data(method, search), "rows": count, "seconds": seconds}

        run_search(plan, search, task, on_row=on_row)
        journal.step("search", lambda: written(history), last=True)
    seconds = time.perf_counter() - started
    figures = search_figures(read_rows(path, count), task.recipe, seconds, plain_ms, plan.device)
    net = search.net

    def chosen(tables: dict[str, CostTable]) -> Arch:
        return method.choose(search, replace(task, tables=tables))

    nets = {"found": in_time(plan, goal, chosen)}
    found, tables = nets["found"]
    for rule, arch in goal.rules.items():
        again = partial(RULES[rule], net.space, budgets=goal.budgets)
        nets[rule] = (arch, plan.tables) if tables is plan.tables else in_time(plan, goal, again)
    signs = warnings_of(plan, goal, figures, search, found, nets["uniform"][0])
    document = export_arch(goal.folder, goal.name, net, found, data, tables, goal.budgets, plan.info)
    for k in range(plan.args.num_random):
        seed = 1000 * (plan.args.seed + 1) + k  # never that of the method ``random`` in the same run
        arch = random_arch(net.space, tables, goal.budgets, seed=seed)
        nets[f"random {k}"] = arch, tables
    rows_of = {}
    for name, (arch, own) in nets.items():
        path, kept = weights_file(goal.folder, name), has_weights_of(net, arch)
        if rank() == 0:
            path.unlink(missing_ok=True)  # of a process that was killed before it could say what it had found
            if kept and (name == "found" or plan.args.keep_weights):
                write_state(plain_state(net, arch), path)
        if plan.args.keep_weights and not kept:
            signs.append(f"the search has cut off a part of the {name} net, which is trained from scratch")
        costs = {metric: table.of(arch) for metric, table in own.items()}
        if "ms" in costs:  # by a table that may have been scaled to what such nets measured; and before that
            costs["predicted_ms"] = plan.tables["ms"].of(arch)
        rows_of[name] = {
            "arch": dict(arch), "costs": costs, "inherited": plan.args.keep_weights and kept,
            "epochs": plan.recipe.epochs,
        }  # fmt: skip
    rows_of |= {arm: rows_of["found"] | {"inherited": False, "epochs": n} for arm, n in arms(plan, found).items()}
    for line in signs:
        console.print(f"warning: {line}", soft_wrap=True)
    widest = plan.tables["macs"].extremes()[1]
    archs = {name: nets[name][0] for name in ("found", *goal.rules)}
    return {
        "budget": document["budget"],
        "search": figures,
        "warnings": signs,
        "decisions": decision_rows(net.space, archs),
        "layers": layer_rows(net, plan.latency, {"widest": widest, **archs}),
        "nets": rows_of,
    }


def arms(plan: Plan, found: Arch) -> dict[str, int]:
    """The arms that were asked for, but for the fine-tuning, which is the found net's own: arm -> its epochs."""
    asked = parse_arms(plan.args.arms, plan.args.keep_weights)
    macs = plan.tables["macs"]
    share = macs.of(found) / macs.of(macs.extremes()[1])
    searched = plan.task.recipe.epochs if plan.method.loss else 0
    work = sum(plan.method.work(plan.task.config)) * searched
    return {arm: arm_epochs(arm, plan.recipe.epochs, searched, work, share) for arm in asked if arm != "finetune"}


def find(plan: Plan, goal: BudgetRun, journal: Journal, begun: Callable[[bool], Begun], plain_ms: float) -> dict:
    """From a search to the found net, trained, beside those that it is compared with. Returns metrics.json.

    ``begun(warm)`` gives a search that is warmed up, or one that takes its state from the journal.
    """
    if "search" not in journal.done:
        journal.finish("search", search_stage(plan, goal, journal, begun, plain_ms))
    with checkpoint_errors():
        searched, space = journal.done["search"], plan.net.space
        first = {key: searched[key] for key in FIGURES}
        last = {key: searched[key] for key in DETAILS}
        nets = {what: (space.complete(net["arch"]), dict(net["costs"])) for what, net in searched["nets"].items()}
        how = {what: (net["inherited"], net["epochs"]) for what, net in searched["nets"].items()}
    for what, (arch, costs) in nets.items():
        alike = (other for other in journal.done if other in nets and (nets[other][0], how[other]) == (arch, how[what]))
        twin = next(alike, None)
        if what not in journal.done and twin:  # the same network by the same seed: the same training
            journal.finish(what, journal.done[twin] | costs)
        elif what not in journal.done:
            model, row = train_arch(plan, arch, costs, journal, what)
            if what == "found":
                save_model(plan, model, goal.folder)
                verify_export(goal.folder)
            journal.finish(what, row)
    trained = {what: dict(journal.done[what]) for what in nets}
    if plan.latency and plan.latency_device:
        compared = ("found", *goal.rules)
        models = [build(plan, nets[what][0]) for what in compared]
        for what, ms in zip(compared, measured_ms(plan, models), strict=True):
            trained[what]["measured_ms"] = ms
    largest, tops = plan.data.summary["largest_class"], {what: row["top1"] for what, row in trained.items()}
    said = [] if plan.data.own_loss else as_good_as_one_answer(tops, largest["share"], largest["name"])
    for line in said:
        console.print(f"warning: {line}", soft_wrap=True)
    first["warnings"] = [*first["warnings"], *said]
    found = trained.pop("found")
    asked = [arm for arm in parse_arms(plan.args.arms, True) if arm in trained or found.get("inherited")]
    compared_arms = {arm: trained.pop(arm, found) for arm in asked}
    return {
        **first,
        "validation_images": plan.data.num_val,
        **({"score": "score"} if plan.data.own_loss else {}),
        "found": found,
        **({"arms": compared_arms} if compared_arms else {}),
        **{rule: trained.pop(rule) for rule in goal.rules},
        "random": [*trained.values()],
        **last,
    }


def print_table(folder: Path, name: str, metrics: dict) -> None:
    """What the run came to, and what to do next."""
    table = Table(title=str(folder), title_justify="left", show_header=True)
    heads, rows = facts(metrics)
    for column in heads:
        table.add_column(column, justify="left" if not column else "right")
    for row in rows:  # without units, which the names of rows say: it has to fit on 80 columns
        table.add_row(*(cell.removesuffix("FLOPs").removesuffix("Params") for cell in row))
    console.print(table)
    if metrics["random"]:
        tops = [row["top1"] for row in metrics["random"]]
        console.print(f"random nets at the same cost, {score_name(metrics)}: {', '.join(f'{t:.2f}' for t in tops)} %")
    for arm, epochs, reached, before in arm_rows(metrics):
        console.print(f"{arm}, {epochs} epochs: {score_name(metrics)} {reached} (before: {before})")
    model = f"model.py (import it, then timm.create_model({name!r}, pretrained=True))"
    again = [f"next: dnas retrain {folder} --epochs 100 --output {folder}-retrained"]
    if own := read_arch(folder / "arch.json")["net"].get("own"):
        model, again = f"{PROGRAM} (torch.export.load reads it)", []
        if "file" in own:
            model = "model.py (import it, then model.create(pretrained=True))"
            code = f"--model-file {folder}/{own['file']}:{own['function']}"
            again = [f"next: dnas retrain {folder} {code} --epochs 100 --output {folder}-retrained"]
    for line in (
        f"search: {effort(metrics['search'])}",
        f"files: {folder}/{model}, model.safetensors, report.html, arch.json, metrics.json, history.jsonl, config.json",
        *again,
    ):
        console.print(line, soft_wrap=True)
