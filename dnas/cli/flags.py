"""The flags that commands share. Nothing here imports torch, so that a wrong flag is reported at once."""

import argparse
import ast
import difflib
import re
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import NoReturn

from dnas.spec.checks import MAX_BYTES, UserError, read_json
from dnas.spec.image_size import ImgSize, check_size
from dnas.spec.recipe import AMP_DTYPES, Recipe
from supernets import SUPERNETS

HINT = "(--help lists what is allowed)"


class ModelKwargs(argparse.Action):
    """timm's ``name=value name=value ...``: a dict, whose values are Python's literals or else text."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        found = {}
        for given in values:
            name, equals, text = given.partition("=")
            if not (name and equals):
                raise argparse.ArgumentError(self, f"{given!r} is not name=value")
            try:
                found[name] = ast.literal_eval(text)
            except (ValueError, SyntaxError):
                found[name] = text
        setattr(namespace, self.dest, found)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0 on")
    return seconds


def _img_size(text: str) -> ImgSize:
    try:
        return check_size([int(part) for part in text.split(",")])
    except (ValueError, UserError):
        raise argparse.ArgumentTypeError(f"{text!r} is not one side, or height and width, in pixels") from None


def add_img_size(parser, text: str, default: int | None = None) -> None:
    """``--img-size SIDE`` or ``--img-size HEIGHT WIDTH``; `OneLineParser` joins the two."""
    parser.add_argument("--img-size", type=_img_size, default=default, metavar="H [W]", help=text)


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**32:  # numpy's range
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 2**32 - 1")
    return int(text)


def add_model_file(parser: argparse.ArgumentParser, text: str) -> None:
    """``--model-file FILE.py:FUNCTION``, code of the user's own that is run."""
    parser.add_argument("--model-file", metavar="FILE.py:FUNCTION", help=text)


def add_space_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of the search space."""
    parser.add_argument("--supernet", choices=list(SUPERNETS), help="search space (default prunet)")
    parser.add_argument("--model", help="instead: any network of timm's, to search its widths")
    parser.add_argument(
        "--model-kwargs",
        nargs="*",
        default={},
        action=ModelKwargs,
        help="arguments of the model, as in timm: layers=[2,2,2,2] ...",
    )
    parser.add_argument(
        "--tie",
        action="append",
        metavar="NAME,...",
        help="with --model or --model-file: groups of channels that match a name share a width (* matches any text, "
        "? one letter)",
    )
    parser.add_argument(
        "--width-mult",
        type=float,
        help="width multiplier of the widest net (default 1; search, for a budget in FLOPs or parameters without a "
        "latency table: so that the widest net costs twice the budget)",
    )
    parser.add_argument("--divisor", type=int, help="widths are multiples of this (default 8; 4 for toy)")


def add_group_flags(parser: argparse.ArgumentParser) -> None:
    """Flags on blocks and single groups of channels of a network that a search narrows."""
    parser.add_argument(
        "--depth",
        action="store_true",
        help="with --model or --model-file: residual blocks may be dropped, too",
    )
    parser.add_argument(
        "--keep",
        action="append",
        metavar="NAME",
        help="with --model or --model-file: modules that match keep all channels that they write, as in 'layer1.*'",
    )
    parser.add_argument(
        "--divisor-of",
        action="append",
        metavar="NAME=N",
        help="with --model or --model-file: another divisor for groups that match, as in 'layer4.*=32'",
    )
    parser.add_argument(
        "--min-width",
        action="append",
        metavar="NAME=N",
        help="with --model or --model-file: groups that match keep at least N channels, as in '*=16'",
    )


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of the data and the machine, with timm's names."""
    group = parser.add_argument_group("data and machine")
    group.add_argument(
        "--data-dir",
        default="",
        help="image folder (train/ and validation/), or a .tar.gz of one; retrain: default as in the run",
    )
    group.add_argument(
        "--dataset",
        default="",
        help="'digits' (embedded; the default) or one of timm's torch/... names; retrain: default as in the run",
    )
    add_img_size(
        group,
        "side of the images in pixels, or height and width (default: 32 for digits, 224 for a folder, as stored for a "
        ".tar.gz; retrain: as in arch.json)",
    )
    group.add_argument("--in-chans", type=int, default=3, help="image channels (default 3; retrain: as in arch.json)")
    group.add_argument("--num-classes", type=int, help="number of classes; checked against the data")
    group.add_argument("--device", help="cpu, cuda, ... (default: cuda where there is a GPU)")
    group.add_argument("--workers", "-j", type=int, default=2, help="processes that read image folders (default 2)")
    group.add_argument("--seed", type=_seed, default=0, help="a whole number from 0 on (default 0)")


def add_recipe_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of the training recipe, with timm's names."""
    group = parser.add_argument_group(
        "training recipe",
        "for the found net and the nets compared with it; search: also for the weights of the search, there without "
        "mixup, cutmix, drop, drop-path, model-ema-decay and freeze, and with --search-epochs",
    )
    defaults = Recipe()
    choices = {"amp_dtype": AMP_DTYPES}
    short = {"batch_size": ["-b"], "opt": [], "epochs": []}
    for field in fields(Recipe):
        name, value = f"--{field.name.replace('_', '-')}", getattr(defaults, field.name)
        text = f"{field.metadata.get('help', '')} (default {value})".strip() if value != "" else field.metadata["help"]
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


def add_resume_flags(parser: argparse.ArgumentParser, group) -> None:
    """``--resume`` (in ``group``) and the time between two checkpoints."""
    group.add_argument("--resume", metavar="RUN", help="continue a stopped run; its flags are in RUN")
    parser.add_argument(
        "--checkpoint-every", type=_seconds, default=60.0, help="seconds between checkpoints (default 60)"
    )


def resumed(
    parser: Callable[[list[str]], "OneLineParser"], run: str, argv: list[str], may_train_on: bool = False
) -> tuple[argparse.Namespace, list[str]]:
    """The flags of the run that ``argv`` asks to resume, and the words that they are in.

    A run's config.json has the words, and the same parser reads them: nothing gets in that a user could not type.
    ``output`` and ``resume`` are the run's folder; that of a sweep has one for each budget in it. A run whose network
    is code of the user's own needs ``--model-file`` again: no file that a run folder names is executed.

    Raises UserError for a folder that is no such run.
    """
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    own.add_argument("--resume")
    own.add_argument("--model-file")
    if may_train_on:
        own.add_argument("--epochs", type=int)
    given, others = own.parse_known_args(argv)
    if others:
        allowed = "none but --epochs are" if may_train_on else "none are"
        raise UserError(f"--resume {run!r} takes all other flags from the run: {allowed} expected here")
    folder = Path(run)
    configs = [folder / "config.json", *sorted(folder.glob("*/config.json"))]
    config = next((path for path in configs if path.is_file()), None)
    if config is None:
        raise UserError(f"--resume {run!r}: expected a run folder, which has a config.json")
    try:
        argv = read_json(config, MAX_BYTES)["argv"]
        if not (isinstance(argv, list) and all(isinstance(text, str) for text in argv)):
            raise TypeError
    except (UserError, KeyError, TypeError):
        raise UserError(f"--resume {run!r}: {config} does not tell the flags of a run") from None
    found = parser(argv).parse_args(argv)
    if found.resume is not None or getattr(found, "dry_run", False):
        what = "a dry run" if getattr(found, "dry_run", False) else "no run"
        raise UserError(f"--resume {run!r}: {config} is of {what}: one that was stopped is expected")
    if (getattr(found, "sweep", None) is not None) != (config != configs[0]):
        raise UserError(f"--resume {run!r} is one budget of a sweep: --resume {str(folder.parent)!r} is expected")
    if bool(getattr(found, "model_file", None)) != bool(given.model_file):
        if given.model_file:
            raise UserError(f"--model-file {given.model_file!r}: the run in {run!r} has no network of your own")
        raise UserError(f"--resume {run!r} runs code: --model-file {found.model_file!r} is needed again")
    if given.model_file:
        found.model_file = given.model_file
    found.output = found.resume = run
    found.more_epochs = getattr(given, "epochs", None)
    return found, argv


class OneLineParser(argparse.ArgumentParser):
    """argparse without the usage lines before an error, and with negative budgets read as what they are."""

    def parse_args(self, argv: list[str] | None = None) -> argparse.Namespace:  # type: ignore[override]
        """The command line; ``--budget -3MFLOPs`` is a wrong budget, not a missing one."""
        joined: list[str] = []
        for given in sys.argv[1:] if argv is None else argv:
            if given.startswith("--") and given.endswith("=--"):  # of which argparse makes an empty list
                self.error(f"argument {given[:-3]}: '--' is no value")
            if joined and joined[-1] in ("--budget", "--img-size"):
                joined[-1] += f"={given}"
            elif joined and re.fullmatch(r"--img-size=\d+", joined[-1]) and given.isdecimal():
                joined[-1] += f",{given}"
            else:
                joined.append(given)
        known = [flag for action in self._actions for flag in action.option_strings]
        for word in joined:  # before argparse misses what a misspelt flag was to give
            name = word.partition("=")[0]
            if len(name) > 2 and name.startswith("--") and name not in known:
                near = difflib.get_close_matches(name, known, 1, 0.8)
                self.error(f"unknown argument {name!r}" + (f": did you mean {near[0]}?" if near else ""))
        return super().parse_args(joined)

    def error(self, message: str) -> NoReturn:
        """Raise UserError, in one line of a length that can be read, whatever was given."""
        line = " ".join(message.split())
        raise UserError(f"{line if len(line) <= 400 else line[:397] + '...'} {HINT}")
