"""``dnas search``: from a budget to a trained timm model."""

import argparse
import copy
import importlib.util
import json
import re
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from functools import cache
from itertools import count
from pathlib import Path

import torch
from timm.utils import random_seed

from dnas.cli.inputs import (
    check_same_data,
    data_of,
    device_of,
    new_folder,
    open_table,
    outline_of,
    own_network,
    recipe_of,
    say_data,
)
from dnas.cli.rehearsal import check_batches, dry_run, rehearse_aside
from dnas.export.model_file import check_name, read_arch, write_state
from dnas.latency.measured_parts import parts_of
from dnas.methods.catalog import METHODS
from dnas.methods.loop import begin, steps_of
from dnas.methods.method import Method, Task
from dnas.methods.rules import RULES
from dnas.nets.layer_supernet import MacroSupernet, size_to
from dnas.nets.own_supernet import OwnSupernet
from dnas.nets.supernet import Supernet
from dnas.nets.timm_space import TimmBase
from dnas.nets.timm_supernet import TimmSupernet
from dnas.nets.traced_supernet import TracedSupernet
from dnas.plan import BudgetRun, Plan, build
from dnas.report.pages import write_report
from dnas.runtime.checkpoint import WORTH_KEEPING, read_checkpoint
from dnas.runtime.distributed import check_shares, gathered, rank, split, world_size
from dnas.runtime.progress import console
from dnas.runtime.run_folder import provenance, run_folder, write_json
from dnas.runtime.signals import stop
from dnas.spec.budget import Budget, parse_budget, show
from dnas.spec.checks import MAX_BYTES, UserError, read_json
from dnas.spec.cost import CostTable, resolve_budgets
from dnas.spec.image_size import sides, size_text
from dnas.spec.latency_table import LatencyTable
from dnas.spec.recipe import Recipe, parse_arms
from dnas.training.batches import Data
from dnas.training.criterion import class_weights
from dnas.training.from_scratch import time_step
from dnas.training.optimizer import to_channels_last
from dnas.training.teacher import make_teacher
from dnas.training.weights import load_weights, read_weights
from dnas.workflow import Begun, find, print_table, run_search

INITIAL_WEIGHTS = "initial.safetensors"  # in a run folder: of a network that a program gave


def plan_supernet(args, data: Data, budgets: tuple[Budget, ...]) -> Supernet:
    """The supernet. If made of layers, the budget is half of its widest net unless a width is given."""
    fixed = {key: getattr(data, key) for key in ("num_classes", "in_chans", "img_size")}
    if args.model_file:
        base, own = own_network(args, fixed)
        model = own.create()
        if args.initial_checkpoint:
            found = read_weights(args.initial_checkpoint, "--initial-checkpoint")
            load_weights(model, found, f"--initial-checkpoint {args.initial_checkpoint!r}")
        return OwnSupernet(base, own, model)
    outline = outline_of(args, fixed)
    if isinstance(outline, TimmBase):
        return TimmSupernet(outline, args.pretrained, args.initial_checkpoint)
    if args.pretrained or args.initial_checkpoint:
        raise UserError("--pretrained and --initial-checkpoint go with --model")
    counted = [b for b in budgets if not b.percent and b.metric != "ms"]  # a table of milliseconds is of one width
    if args.width_mult is not None or not counted or args.latency_table:
        return MacroSupernet(outline(width_mult=args.width_mult or 1.0))
    return MacroSupernet(size_to(lambda width_mult: outline(width_mult=width_mult), counted))


def make_plan(
    args,
    asked: list[tuple[Budget, ...]],
    latency: LatencyTable | None,
    latency_device: torch.device | None,
    data: Data | None = None,
    net: Supernet | None = None,
) -> Plan:
    """Everything that is known before a file is written. Raises UserError for whatever is wrong with the flags.

    ``data`` and ``net`` take the place of what the flags say, where a program has them already.
    """
    recipe, device = recipe_of(args), device_of(args)
    method = METHODS[args.method]
    config = method.config(**{field.name: getattr(args, field.name) for field in fields(method.config)})
    if args.log and not importlib.util.find_spec("tensorboard"):
        raise UserError(f"--log {args.log!r} needs the package tensorboard: pip install tensorboard")
    if args.search_epochs < 1 or args.num_random < 0:
        given = f"--search-epochs {args.search_epochs} --num-random {args.num_random}"
        raise UserError(f"{given}: at least 1 epoch and no negative number is allowed")
    parse_arms(args.arms, args.keep_weights)
    if recipe.freeze and not args.keep_weights:
        raise UserError(f"--freeze {recipe.freeze!r} goes with --keep-weights: without it networks start from scratch")
    data = data or data_of(args, device)
    if len(sides(data.img_size)) != 2:
        recipe = replace(recipe, channels_last=False)  # a memory format of images
        if not (args.model_file or isinstance(net, OwnSupernet)):
            shape = [data.in_chans, *sides(data.img_size)]
            raise UserError(f"inputs of {shape}: only a network of your own takes other ones than [C, H, W]")
    class_weights(recipe, data)  # do they fit?
    teacher = make_teacher(recipe, data, device)
    random_seed(args.seed)
    net = net or plan_supernet(args, data, max(asked, key=lambda budgets: budgets[0].limit))
    if data.own_loss:
        check_own_loss(args, recipe, method)
    elif isinstance(net, OwnSupernet):
        net.check_logits()
    for key in ("num_classes", "in_chans", "img_size"):
        if json.dumps(getattr(net.outline, key)) != json.dumps(getattr(data, key)):  # a list or a tuple of two sides
            raise UserError(f"{net.name} is for {key} {getattr(net.outline, key)}, the data has {getattr(data, key)}")
    tables = {metric: CostTable.build(net.space, metric) for metric in ("macs", "params")}
    if latency:
        tables["ms"] = CostTable.measured(net.space, [part.site for part in parts_of(net)], latency)
    search_recipe = replace(recipe, epochs=args.search_epochs, mixup=0.0, cutmix=0.0, drop=0.0, drop_path=0.0)
    task = Task(tables, (), data, search_recipe, config, args.seed, args.keep_weights, teacher)
    return Plan(args, net, tables, data, recipe, method, task, device, provenance(device), latency, latency_device)


def check_own_loss(args, recipe: Recipe, method: Method) -> None:
    """Raise UserError for flags that are about classes, where a program has a loss of its own."""
    if method.of_classes:
        others = ", ".join(name for name, other in METHODS.items() if not other.of_classes)
        raise UserError(f"--method {args.method!r} learns from classes: a loss of your own goes with one of {others}")
    for name in ("mixup", "cutmix", "class_weights", "kd_model_name"):
        if getattr(recipe, name):
            raise UserError(f"--{name.replace('_', '-')} is about classes: it does not go with a loss of your own")


def make_goals(plan: Plan, asked: list[tuple[Budget, ...]], folder: Path, name: str) -> list[BudgetRun]:
    """The budgets in order, each shown to be within reach of this grid of widths by its uniform and balanced nets."""
    goals = []
    for given in asked:
        try:
            budgets = resolve_budgets(plan.tables, given)
        except UserError as error:
            flags = "--divisor" if isinstance(plan.net, TracedSupernet) else "--width-mult and --divisor"
            raise UserError(f"{error.with_flags} ({flags} for another one)") from None
        rules = {rule: choose(plan.net.space, plan.tables, budgets) for rule, choose in RULES.items()}
        text = "" if len(asked) == 1 else str(given[0]).replace("%", "pc")
        own = f"{name}_{re.sub('[^a-z0-9]', '_', text.lower())}" if text else name
        if (folder / text / "arch.json").exists():  # of a run that goes on, perhaps in a folder that was renamed
            own = read_arch(folder / text / "arch.json")["name"]
        check_name(own)
        goals.append(BudgetRun(budgets, rules, folder / text, own))
    return goals


def check_same(plan: Plan, goals: Sequence[BudgetRun]) -> None:
    """Raise UserError if a run that is resumed began with another space or other data, or has no whole checkpoint."""
    here = json.loads(json.dumps(asdict(plan.net.outline)))
    for goal in goals:
        path = goal.folder / "config.json"
        if not path.exists():
            continue
        config = read_json(path, MAX_BYTES)
        before = config.get("space", {})
        if before.get("digest") and before["digest"] != here.get("digest"):
            raise UserError(f"{path} is of another --model-file than {plan.args.model_file!r}: its SHA-256 differs")
        moved = {"file": here["file"]} if "file" in here else {}  # the same file may be elsewhere
        if here | before | moved != here:  # an older run lacks the newer fields
            raise UserError(f"{path} is of a space that its flags do not make: the program that gave it has to resume")
        check_same_data(config, plan.data, str(goal.folder))
        if rank() == 0:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the journal will say that the one before is taken
                read_checkpoint(goal.folder)


def introduce(plan: Plan) -> None:
    """What is searched."""
    net, table = plan.net, plan.tables["macs"]
    fixed = {"channels": net.channels.fixed, "blocks": net.blocks_fixed} if isinstance(net, TracedSupernet) else {}
    for what, stays in fixed.items():
        if stays:
            more = f" and {len(stays) - 3} more" if len(stays) > 3 else ""
            console.print(f"{what} that stay: {', '.join(stays[:3])}{more}", soft_wrap=True)
    reach = " to ".join(show("macs", table.of(arch)) for arch in table.extremes())
    images = f"{plan.data.num_train} images of {size_text(plan.data.img_size)} px"
    count = net.space.num_archs()  # too large for a float where there are hundreds of widths
    nets = f"{f'{count:.0e}' if count < 1e300 else f'1e+{len(str(count)) - 1}'} nets of {reach}"
    console.print(f"{net.name} on {plan.data.name}, {images}: {nets}", soft_wrap=True)
    say_data(plan.data)


def estimate(plan: Plan, goals: list[BudgetRun], plain_ms: float) -> float:
    """Minutes, if a step of the widest net takes ``plain_ms``.

    A found net takes its share of that. A supernet that shrinks to the budget is guessed to take the root of the share.
    """
    shared, own = plan.method.work(plan.task.config)
    batches, tables = steps_of(plan.method, plan.task) * plan.recipe.grad_accum_steps, plan.tables
    work = shared * batches
    for goal in goals:
        budget, nets = goal.budgets[0], 1 + len(goal.rules) + plan.args.num_random
        share = min(1.0, budget.limit / tables[budget.metric].of(tables[budget.metric].extremes()[1]))
        work += own * batches * share**0.5
        work += share * nets * plan.recipe.epochs * plan.data.num_train / plan.recipe.batch_size
    return work * plain_ms / 6e4


def default_output(args: argparse.Namespace, numbered: bool) -> str:
    """The run folder where none is named; if ``numbered``, with a number where there is one already."""
    budgets = (args.sweep or args.budget).replace("%", "pc").replace(",", "-")
    net = Path((args.model_file or "").partition(":")[0]).stem or args.model or args.supernet or "prunet"
    output = f"runs/{net}-{budgets}-{args.seed}"
    output += "-dry" * args.dry_run  # the search that comes after needs a folder of its own
    free = (path for k in count(1) if not Path(path := output + f"-{k}" * (k > 1)).exists())
    return next(free) if numbered else output


def main(
    args: argparse.Namespace, argv: list[str], data: Data | None = None, net: Supernet | None = None
) -> list[Path]:
    """The whole flow, on one screen. Returns the run folders.

    ``data`` and ``net`` take the place of what the flags say, where a program has them already.
    """
    texts = [args.budget] if args.sweep is None else args.sweep.split(",")
    asked = [parse_budget(text) for text in texts]
    if len({budgets[0].metric + "%" * budgets[0].percent for budgets in asked}) > 1 or len({*asked}) < len(asked):
        raise UserError(f"--sweep {args.sweep!r}: budgets of one kind are expected, each once")
    latency = open_table(args, [b for budgets in asked for b in budgets])  # which may say what the space is
    output = args.output or default_output(args, numbered=args.dry_run)  # a question that is asked again
    name = args.name or "dnas_" + re.sub("[^a-z0-9]", "_", Path(output).name.lower())[:58]
    parts = min(world_size(), len(asked))
    check_shares(args.batch_size, parts)
    if not args.resume:
        new_folder(output)
    plan = make_plan(args, asked, *latency, data, net)
    goals = make_goals(plan, asked, Path(output), name)
    if args.resume:
        check_same(plan, goals)
    check_batches(plan)
    introduce(plan)
    config = {"argv": argv, "args": vars(args), "space": asdict(plan.net.outline), "provenance": plan.info}
    config |= {"class_names": plan.data.class_names, "data": plan.data.summary}
    if args.dry_run:
        console.quiet = rank() > 0
        for goal in goals:  # all processes train the step of the rehearsal
            own = goal if rank() == 0 else replace(goal, folder=new_folder(goal.folder))
            with run_folder(own.folder):
                dry_run(plan, own)
                write_json(own.folder / "config.json", config)
        return [goal.folder for goal in goals]
    supernet = plan.net.to(plan.device)
    if plan.recipe.channels_last:
        to_channels_last(supernet)
    # Before anything is written: it may find that there is nothing to do.
    fresh = begin(plan.method, supernet, plan.task)
    complete = gathered([(goal.folder / "metrics.json").exists() for goal in goals])[0]
    if not all(complete):  # of complete runs, only pages are made anew
        rehearse_aside(plan, goals[0])
    widest = build(plan, plan.tables["macs"].extremes()[1]).to(plan.device)
    plain_ms = time_step(widest, plan.data, plan.recipe, plan.task.criterion)
    del widest
    minutes = max(1, round(estimate(plan, goals, plain_ms)))
    console.print(f"about {minutes} min on this machine, at {plain_ms:.0f} ms a step")

    @cache
    def warmed_up() -> Begun:
        """What all budgets have in common: with several of them, the part of the search in which none plays a part."""
        started, shared = time.perf_counter(), plan.method.work(plan.task.config)[0]
        rows: list[dict] = []
        if len(goals) > 1 and shared:
            run_search(plan, fresh, plan.task, until=shared, on_row=rows.append)
        return fresh, rows, time.perf_counter() - started

    def begun(warm: bool) -> Begun:
        search, rows, seconds = warmed_up() if warm else (fresh, [], 0.0)
        random_seed(args.seed)
        return copy.deepcopy(search) if len(mine) > 1 else search, rows, seconds

    fresh_goals = [not any((goal.folder / name).exists() for name in WORTH_KEEPING) for goal in goals]
    if parts > 1 and any(gathered(fresh_goals)[0]):
        warmed_up()  # by all processes together, before each group goes its own way
    group = split(parts)
    mine, complete = goals[group::parts], complete[group::parts]
    console.quiet = rank() > 0
    for goal, is_complete in zip(mine, complete, strict=True):
        own = goal if rank() == 0 else replace(goal, folder=new_folder(goal.folder))
        with run_folder(own.folder, keep_if=WORTH_KEEPING):
            if not (own.folder / "config.json").exists():
                if isinstance(net, TimmSupernet):
                    write_state(net.plain_state(), own.folder / INITIAL_WEIGHTS)
                write_json(own.folder / "config.json", config)
            journal = stop.journal(own.folder, plan.device, args.checkpoint_every, Path(output))
            if not is_complete:
                write_json(own.folder / "metrics.json", find(plan, own, journal, begun, plain_ms))
            if rank() == 0:
                write_report(own.folder)
            journal.close()
        if rank() == 0:
            print_table(goal.folder, goal.name, read_json(own.folder / "metrics.json", MAX_BYTES))
    return [goal.folder for goal in goals]
