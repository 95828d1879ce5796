"""What flags mean: a search space, a recipe, a device, data, a latency table, a folder."""

import argparse
import atexit
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.models import is_model
from torch import nn

from dnas.nets.own_base import Own, OwnBase, read_function
from dnas.nets.timm_space import TimmBase, is_timms_own, sized
from dnas.runtime.distributed import rank
from dnas.runtime.progress import console
from dnas.runtime.run_folder import check_new_folder, provenance
from dnas.spec.checks import UserError
from dnas.spec.latency_table import LatencyTable, check_use, read_table
from dnas.spec.layer_space import EfficientNetSpace
from dnas.spec.recipe import Recipe
from dnas.training.batches import Data
from dnas.training.data import load_data
from dnas.training.data_summary import difference, summary_lines
from dnas.training.optimizer import make_optimizer
from supernets import SUPERNETS

# Field of an outline -> the flag that says it of groups of channels.
GROUPS = {"ties": "tie", "keep": "keep", "divisors": "divisor_of", "min_widths": "min_width"}


def grid_of(args: argparse.Namespace) -> dict[str, Any]:
    """What the flags say of the widths of a traced network, as fields of its outline. UserError for a wrong number."""
    groups = {field: tuple(getattr(args, flag, None) or ()) for field, flag in GROUPS.items()}
    return groups | {"depth": bool(getattr(args, "depth", False))} | divisor_of(args)


def divisor_of(args: argparse.Namespace) -> dict[str, int]:
    """``--divisor`` as a field of an outline, if it is given. Raises UserError for a wrong number."""
    if args.divisor is not None and not 1 <= args.divisor <= 64:
        raise UserError(f"--divisor {args.divisor} is not between 1 and 64")
    return {} if args.divisor is None else {"divisor": args.divisor}


def own_network(args: argparse.Namespace, fixed: dict[str, Any]) -> tuple[OwnBase, Own]:
    """The network of ``--model-file``, and what makes it. For ``fixed`` see `outline_of`."""
    for flag in ("model", "supernet", "width_mult", "model_kwargs", "latency_table", "pretrained"):
        if getattr(args, flag):
            instead = ": --initial-checkpoint has weights" if flag == "pretrained" else ""
            raise UserError(f"--{flag.replace('_', '-')} does not go with --model-file{instead}")
    own, about = read_function(args.model_file)
    return OwnBase(**(fixed | grid_of(args) | about)), own


def outline_of(args: argparse.Namespace, fixed: dict[str, Any]) -> TimmBase | Callable[..., EfficientNetSpace]:
    """What the flags of `add_space_flags` mean: a network of timm's, or what makes a macro of a width multiplier.

    ``fixed`` are ``num_classes``, ``in_chans`` and ``img_size``. Raises UserError for flags that do not fit.
    """
    if args.width_mult is not None and not 0.05 <= args.width_mult <= 32:
        raise UserError(f"--width-mult {args.width_mult} is not between 0.05 and 32")
    if not args.model:
        for flag in ("model_kwargs", "depth", *GROUPS.values()):
            if getattr(args, flag, None):
                own = " or --model-file" * (flag != "model_kwargs")
                raise UserError(f"--{flag.replace('_', '-')} goes with --model{own}")
        return partial(SUPERNETS[args.supernet or "prunet"], **fixed, **divisor_of(args))
    if args.supernet or args.width_mult is not None:
        raise UserError("--model is the search space: neither --supernet nor --width-mult goes with it")
    base = TimmBase(args.model, kwargs=args.model_kwargs, **(fixed | grid_of(args)))
    if is_model(args.model) and not is_timms_own(args.model):
        raise UserError(
            f"--model {args.model!r} is registered with timm, but no network of timm's own, which is expected"
        )
    return sized(base)


def own_of(args: argparse.Namespace) -> Own | None:
    """What makes the network of ``--model-file``; None without this flag."""
    return read_function(args.model_file)[0] if args.model_file else None


def recipe_of(args: argparse.Namespace) -> Recipe:
    """The recipe in the flags, checked."""
    recipe = Recipe(**{field.name: getattr(args, field.name) for field in fields(Recipe)})
    make_optimizer([nn.Parameter(torch.zeros(1))], recipe)  # does its name exist?
    return recipe


def device_of(args: argparse.Namespace) -> torch.device:
    """The device asked for; without one, which is noted in the flags, a GPU if there is one.

    Raises UserError if this machine lacks it.
    """
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(args.device)
        torch.zeros(1, device=device).item()  # fails on meta, too
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # where streams, graphs and waiting go without a word
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(f"--device {args.device!r} is not available here: expected cpu, or cuda with a GPU") from None
    return device


def data_of(args: argparse.Namespace, device: torch.device) -> Data:
    """The data in the flags. Raises UserError for whatever is wrong with them."""
    data = load_data(
        args.dataset, args.data_dir, img_size=args.img_size, in_chans=args.in_chans, device=device, workers=args.workers
    )
    if args.num_classes not in (None, data.num_classes):
        raise UserError(f"--num-classes {args.num_classes} does not fit the data, which has {data.num_classes} classes")
    return data


def say_data(data: Data) -> None:
    """What the data is, and what is dubious about it, on the terminal."""
    for line in (*summary_lines(data.summary), *(f"warning: {text}" for text in data.summary["warnings"])):
        console.print(line, soft_wrap=True)


def check_same_data(config: Mapping[str, Any], data: Data, folder: str) -> None:
    """Raise UserError if the run in ``folder``, which is to go on, began with other data, by its config.json."""
    names = config.get("class_names", data.class_names)
    try:
        reason = difference(config.get("data", data.summary), data.summary, (names, data.class_names))
    except (KeyError, TypeError):
        raise UserError(f"{folder}: its config.json does not say which data it began with") from None
    if reason:
        raise UserError(f"{folder} began with other data: {reason}; the same data are expected")


def open_table(args, budgets) -> tuple[LatencyTable | None, torch.device | None]:
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
    table, device = read_table(args.latency_table), device_of(args)
    here = {provenance(d)["device"]: d for d in (device, torch.device("cpu"))}
    name, space = table.header["device"], table.header["space"]
    elsewhere = {} if name in here else {"device": next(iter(here))}
    check_use(table, elsewhere | args.latency_for, args.latency_anyway)
    if not (args.supernet or args.model or args.model_file):
        if space.get("supernet", "prunet") not in SUPERNETS:
            raise UserError(
                f"the latency table is of supernet {space['supernet']!r}, not one of {', '.join(SUPERNETS)}"
            )
        for key, value in space.items():
            if getattr(args, key) in (None, {}):
                setattr(args, key, value)
    return table, here.get(name)


def new_folder(path: str | Path) -> Path:
    """The run folder, not there yet. Of several processes the others write, too, but where nobody looks."""
    if rank() == 0:
        return check_new_folder(path)
    aside = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, aside, ignore_errors=True)
    return Path(aside)
