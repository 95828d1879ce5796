"""The flags that commands share, and what they mean."""

import argparse
import atexit
import difflib
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path

import torch
from timm.utils import ParseKwargs

from dnas.nets.layer_supernet import EfficientNetSpace
from dnas.nets.timm_space import TimmBase
from dnas.runtime.distributed import rank
from dnas.runtime.run_folder import MAX_BYTES, check_new_folder, provenance
from dnas.spec.checks import UserError, read_json
from dnas.spec.latency_table import LatencyTable, check_use, read_table
from dnas.training.data import Data, load_data
from dnas.training.recipe import AMP_DTYPES, Recipe
from supernets import SUPERNETS


class ModelKwargs(ParseKwargs):
    """timm's ``name=value name=value ...``, with a mistake told as any other."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        for value in values:
            if "=" not in value:
                raise argparse.ArgumentError(self, f"{value!r} is not name=value")
        super().__call__(parser, namespace, values, option_string)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0 on")
    return seconds


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**32:  # numpy's range
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 2**32 - 1")
    return int(text)


def add_space_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that say which search space it is."""
    parser.add_argument("--supernet", choices=list(SUPERNETS), help="search space (default prunet)")
    parser.add_argument("--model", help="instead: any convolutional network of timm's, searched for its widths")
    parser.add_argument(
        "--model-kwargs", nargs="*", default={}, action=ModelKwargs, help="as timm's: layers=[2,2,2,2] ..."
    )
    parser.add_argument(
        "--tie",
        action="append",
        metavar="NAME,...",
        help="with --model: groups of channels that match a name (* and ? stand for letters) share a width",
    )
    parser.add_argument("--width-mult", type=float, help="width of the widest net (search: twice the budget's)")
    parser.add_argument("--divisor", type=int, help="widths are multiples of this (default 8; 4 for toy)")


def outline_of(args: argparse.Namespace, fixed: dict[str, int]) -> TimmBase | Callable[..., EfficientNetSpace]:
    """What the flags of `add_space_flags` mean: a network of timm's, or what makes a macro of a width multiplier.

    ``fixed`` are ``num_classes``, ``in_chans`` and ``img_size``. Raises UserError for flags that do not fit.
    """
    if args.divisor is not None:
        if not 1 <= args.divisor <= 64:
            raise UserError(f"--divisor {args.divisor} is not between 1 and 64")
        fixed = {**fixed, "divisor": args.divisor}
    if args.width_mult is not None and not 0.05 <= args.width_mult <= 32:
        raise UserError(f"--width-mult {args.width_mult} is not between 0.05 and 32")
    if not args.model:
        if args.model_kwargs or args.tie:
            raise UserError(f"{'--tie' if args.tie else '--model-kwargs'} goes with --model")
        return partial(SUPERNETS[args.supernet or "prunet"], **fixed)
    if args.supernet or args.width_mult is not None:
        raise UserError("--model is the search space: neither --supernet nor --width-mult goes with it")
    return TimmBase(args.model, **fixed, kwargs=args.model_kwargs, ties=tuple(args.tie or ()))


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """Flags on the data and the machine, named as timm names them."""
    group = parser.add_argument_group("data and machine")
    group.add_argument("--data-dir", default="", help="image folder (train/ and validation/), or a .tar.gz of one")
    group.add_argument(
        "--dataset", default="", help="'digits' (embedded; the default) or one of timm's torch/... names"
    )
    group.add_argument(
        "--img-size",
        type=int,
        help="image side in pixels (default: 32 for digits, 224 for a folder, as they are in a .tar.gz)",
    )
    group.add_argument("--in-chans", type=int, default=3, help="image channels (default 3)")
    group.add_argument("--num-classes", type=int, help="checked against the data")
    group.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    group.add_argument("--workers", "-j", type=int, default=2, help="processes that read image folders")
    group.add_argument("--seed", type=_seed, default=0, help="a number from 0 on (default 0)")


def add_recipe_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of the training recipe, named as timm names them."""
    group = parser.add_argument_group("training recipe, of the found net and of those it is compared with alike")
    defaults = Recipe()
    choices = {"amp_dtype": list(AMP_DTYPES)}
    short = {"batch_size": ["-b"], "opt": [], "epochs": []}
    for field in fields(Recipe):
        name, value = f"--{field.name.replace('_', '-')}", getattr(defaults, field.name)
        text = f"(default {value})"
        if isinstance(value, bool):
            group.add_argument(name, action=argparse.BooleanOptionalAction, default=value)
        else:
            group.add_argument(
                name,
                *short.get(field.name, []),
                type=type(value),
                default=value,
                help=text,
                choices=choices.get(field.name),
            )


def recipe_of(args: argparse.Namespace) -> Recipe:
    """The recipe in the flags, checked."""
    return Recipe(**{field.name: getattr(args, field.name) for field in fields(Recipe)})


def add_resume_flags(parser: argparse.ArgumentParser, group) -> None:
    """``--resume`` (in ``group``) and how often a run is written down."""
    group.add_argument("--resume", metavar="RUN", help="go on with a run that was stopped; it knows its flags")
    parser.add_argument("--checkpoint-every", type=_seconds, default=60.0, help="seconds (default 60)")


def flags_of(parser: Callable[[list[str]], "OneLineParser"]) -> tuple[argparse.Namespace, list[str]]:
    """The flags, and the words of the command line that they are in; with --resume those of the run.

    A run's config.json has the words, and the same parser reads them: nothing gets in that a user could not type.
    ``output`` and ``resume`` are the run's folder; that of a sweep has one for each budget in it.
    """
    argv = sys.argv[1:]
    args = parser(argv).parse_args(argv)
    if args.resume is None:
        return args, argv
    if len(argv) > (1 if "=" in argv[0] else 2):
        raise UserError(f"--resume {args.resume!r} takes all other flags from the run: none are expected here")
    folder = Path(args.resume)
    configs = [folder / "config.json", *sorted(folder.glob("*/config.json"))]
    config = next((path for path in configs if path.is_file()), None)
    if config is None:
        raise UserError(f"--resume {args.resume!r}: expected a run folder, which has a config.json")
    try:
        argv = read_json(config, MAX_BYTES)["argv"]
        if not (isinstance(argv, list) and all(isinstance(text, str) for text in argv)):
            raise TypeError
    except (UserError, KeyError, TypeError):
        raise UserError(f"--resume {args.resume!r}: {config} does not tell the flags of a run") from None
    found = parser(argv).parse_args(argv)
    if found.resume is not None or getattr(found, "dry_run", False):
        what = "a dry run" if getattr(found, "dry_run", False) else "no run"
        raise UserError(f"--resume {args.resume!r}: {config} is of {what}: one that was stopped is expected")
    if (getattr(found, "sweep", None) is not None) != (config != configs[0]):
        raise UserError(
            f"--resume {args.resume!r} is one budget of a sweep: --resume {str(folder.parent)!r} is expected"
        )
    found.output = found.resume = args.resume
    return found, argv


def device_of(args: argparse.Namespace) -> torch.device:
    """The device asked for. Raises UserError if this machine lacks it."""
    try:
        device = torch.device(args.device)
        torch.zeros(1, device=device)
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
    if not (args.supernet or args.model):
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


class OneLineParser(argparse.ArgumentParser):
    """argparse without the usage lines before an error, and with negative budgets read as what they are."""

    def parse_args(self, argv: list[str] | None = None) -> argparse.Namespace:  # type: ignore[override]
        """The command line; ``--budget -3MFLOPs`` is a wrong budget, not a missing one."""
        joined: list[str] = []
        for given in sys.argv[1:] if argv is None else argv:
            if given.startswith("--") and given.endswith("=--"):  # of which argparse makes an empty list
                self.error(f"argument {given[:-3]}: '--' is no value")
            if joined and joined[-1] == "--budget":
                joined[-1] += f"={given}"
            else:
                joined.append(given)
        known = [flag for action in self._actions for flag in action.option_strings]
        for word in joined:  # before argparse misses what a misspelt flag was to give
            name = word.partition("=")[0]
            if len(name) > 2 and name.startswith("--") and name not in known:
                near = difflib.get_close_matches(name, known, 1, 0.8)
                self.error(f"unknown argument {name!r}" + (f": did you mean {near[0]}?" if near else ""))
        return super().parse_args(joined)

    def error(self, message: str) -> None:  # type: ignore[override]
        print(f"error: {message} (--help lists what is allowed)", file=sys.stderr)
        sys.exit(2)
