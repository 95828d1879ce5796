"""A rehearsal: before the first step of a search, all that comes after it is done once, with the uniform net.

What can only fail after the search fails here, in seconds instead of hours.
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dnas.cli.process import what_failed
from dnas.export.verify import verify_export
from dnas.nets.shrink import has_weights_of, plain_state
from dnas.plan import BudgetRun, Plan, build, export_arch, save_model
from dnas.report.metrics import decision_rows, layer_rows
from dnas.report.pages import write_report
from dnas.runtime.checkpoint import load_random, random_data
from dnas.runtime.distributed import rank, world_size
from dnas.runtime.progress import console
from dnas.runtime.run_folder import write_json
from dnas.spec.budget import show
from dnas.spec.checks import UserError, told
from dnas.training.batches import Data
from dnas.training.freeze import check_patterns
from dnas.training.from_scratch import train_from_scratch
from dnas.workflow import measured_ms


def check_batches(plan: Plan) -> None:
    """Raise UserError if a batch has fewer than 2 images for each process: a batch norm can learn nothing from one."""
    size, ranks = plan.recipe.batch_size, world_size()
    if size < 2 * ranks:
        raise UserError(f"--batch-size {size}: at least 2 images for each of {ranks} processes are needed")
    total = plan.data.num_train
    if total < 2 * ranks:
        raise UserError(f"{total} training images: at least 2 for each of {ranks} processes are needed")
    fraction = plan.method.held_out(plan.task.config) if plan.method.loss else 0.0
    if fraction:
        rest, held = map(len, plan.data.split(fraction, plan.task.seed))
        if min(rest, held) < 2 * ranks:
            few = "held out from the weights" if held <= rest else "left for the weights"
            raise UserError(
                f"only {min(rest, held)} of {total} training images would be {few}: at least {2 * ranks} are needed "
                f"(each class of 2 images or more gives {100 * fraction:g} % of them, and at least one)"
            )


def a_few(data: Data, count: int) -> Data:
    """The same data with so many of its training and validation images, at most."""
    generator = torch.Generator().manual_seed(0)
    part = data.part(torch.randperm(data.num_train, generator=generator)[:count])
    return replace(part, num_val=min(data.num_val, max(count, world_size())))


def rehearse(plan: Plan, goal: BudgetRun, folder: Path) -> dict[str, Any]:
    """Build, count, export, train a step, evaluate, load in a fresh process, report. Returns arch.json's content.

    Files are written to ``folder``. The global random numbers stay as they were. Raises UserError for whatever fails.
    """
    arch, data, before = goal.rules["uniform"], plan.data, random_data(plan.device)
    costs = {metric: table.of(arch) for metric, table in plan.tables.items()}

    def built() -> torch.nn.Module:
        model = build(plan, arch, drop=True)
        if has_weights_of(plan.net, arch):
            model.load_state_dict(plain_state(plan.net, arch))
        return model.to(plan.device)

    def export() -> dict[str, Any]:
        return export_arch(folder, goal.name, plan.net, arch, data, plan.tables, goal.budgets, plan.info)

    def train() -> dict[str, Any]:
        few = a_few(data, plan.recipe.batch_size)
        check_patterns(model, plan.recipe.freeze)
        once = replace(plan.recipe, epochs=1)
        return train_from_scratch(model, few, once, seed=plan.args.seed, criterion=plan.task.criterion)[1]

    def load() -> None:
        save_model(plan, model, folder)
        verify_export(folder)

    def report() -> None:
        kinds = ("found", *goal.rules)
        content = {
            "budget": document["budget"],
            "search": {"seconds": 0.0, "steps": 0},
            **{kind: costs | row for kind in kinds},
            "random": [],
        }
        decisions = decision_rows(plan.net.space, dict.fromkeys(kinds, arch))
        layers = layer_rows(plan.net, plan.latency, dict.fromkeys(("widest", *kinds), arch))
        write_json(folder / "config.json", {"argv": [], "args": {}, "data": data.summary})
        write_json(folder / "metrics.json", content | {"decisions": decisions, "layers": layers})
        write_report(folder)

    try:
        model = _done("the net cannot be built", built)
        document = _done("the export fails", export)
        if plan.latency and plan.latency_device:
            _done("its latency cannot be measured", lambda: measured_ms(plan, [built()]))
        row = _done("a step of its training, or its evaluation, fails", train)
        if rank() == 0:
            _done("the exported net cannot be loaded", load)
            _done("the report fails", report)
    finally:
        load_random(before, plan.device)
    return document


def _done(what: str, do: Callable[[], Any]) -> Any:
    """``do()``; what it raises becomes a UserError that begins with ``what``, except for a machine that fails."""
    try:
        return do()
    except (UserError, OSError):
        raise
    except Exception as error:
        if what_failed(error):
            raise
        raise UserError(f"{what} with the uniform net, before the search: {told(error)}") from error


def rehearse_aside(plan: Plan, goal: BudgetRun) -> None:
    """`rehearse` in a folder that goes, and say how long it took."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as aside:
        rehearse(plan, goal, Path(aside))
    seconds = time.perf_counter() - started
    console.print(f"rehearsed with the uniform net: a training step, export, report ({seconds:.0f} s)")


def dry_run(plan: Plan, goal: BudgetRun) -> None:
    """The rehearsal of one budget, whose files stay."""
    document = rehearse(plan, goal, goal.folder)
    costs = {metric: table.of(goal.rules["uniform"]) for metric, table in plan.tables.items()}
    for name in ("model.safetensors", "report.html"):  # of one step
        (goal.folder / name).unlink(missing_ok=True)
    write_json(goal.folder / "metrics.json", {"budget": document["budget"], "uniform": costs})
    reached = ", ".join(show(metric, cost) for metric, cost in costs.items())
    console.print(f"dry run: the uniform net at {', '.join(map(str, goal.budgets))} is in {goal.folder} ({reached})")
