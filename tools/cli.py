"""What the tools share: flags, progress, and how a user's mistake is told."""

import argparse
import atexit
import ctypes
import difflib
import errno
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from timm.utils import ParseKwargs

from dnas.checkpoint import WORTH_KEEPING, Journal, Stopped, of_this_run
from dnas.data import Data, load_data
from dnas.distributed import processes, rank
from dnas.latency import LatencyTable, check_use, read_table
from dnas.macro import Macro
from dnas.plain import read_json
from dnas.runs import MAX_BYTES, check_new_folder, provenance
from dnas.timm_net import TimmBase
from dnas.train import AMP_DTYPES, Recipe, check_recipe
from dnas.units import UserError
from supernets import SUPERNETS

console = Console(highlight=False)
EVERY_S = 60.0  # between two lines on progress in a log
Trained = TypeVar("Trained")
# fvcore scripts its helpers when it is imported, which newer torch deprecates: nothing that a user could mend.
warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated")


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
    parser.add_argument("--width-mult", type=float, help="width of the widest net (search: twice the budget's)")
    parser.add_argument("--divisor", type=int, help="widths are multiples of this (default 8; 4 for toy)")


def outline_of(args: argparse.Namespace, fixed: dict[str, int]) -> TimmBase | Callable[..., Macro]:
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
        if args.model_kwargs:
            raise UserError("--model-kwargs goes with --model")
        return partial(SUPERNETS[args.supernet or "prunet"], **fixed)
    if args.supernet or args.width_mult is not None:
        raise UserError("--model is the search space: neither --supernet nor --width-mult goes with it")
    return TimmBase(args.model, **fixed, kwargs=args.model_kwargs)


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
    return check_recipe(Recipe(**{field.name: getattr(args, field.name) for field in fields(Recipe)}))


def add_resume_flags(parser: argparse.ArgumentParser, group) -> None:
    """``--resume`` (in ``group``) and how often a run is written down."""
    group.add_argument("--resume", metavar="RUN", help="go on with a run that was stopped; it knows its flags")
    parser.add_argument("--checkpoint-every", type=_seconds, default=60.0, help="seconds (default 60)")


def flags_of(parser: "OneLineParser") -> tuple[argparse.Namespace, list[str]]:
    """The flags, and the words of the command line that they are in; with --resume those of the run.

    A run's config.json has the words, and the same parser reads them: nothing gets in that a user could not type.
    ``output`` and ``resume`` are the run's folder; that of a sweep has one for each budget in it.
    """
    argv = sys.argv[1:]
    args = parser.parse_args(argv)
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
    found = parser.parse_args(argv)
    if found.resume is not None or getattr(found, "dry_run", False):
        what = "a dry run" if getattr(found, "dry_run", False) else "no run"
        raise UserError(f"--resume {args.resume!r}: {config} is of {what}: one that was stopped is expected")
    if (getattr(found, "sweep", None) is not None) != (config != configs[0]):
        raise UserError(
            f"--resume {args.resume!r} is one budget of a sweep: --resume {str(folder.parent)!r} is expected"
        )
    found.output = found.resume = args.resume
    return found, argv


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


@contextmanager
def progress_bar(text: str, total: int) -> Iterator[Callable[..., None]]:
    """A bar with the time that remains: ``advance(note, steps, total)``. A line a minute where there is no terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as bar:
        bar.add_task(text, total=total)
        task, told = bar.tasks[0], time.monotonic()

        def advance(note: str = "", steps: int = 1, total: int | None = None) -> None:
            nonlocal told
            bar.update(task.id, advance=steps, total=total, description=f"{text} {note}".rstrip())
            if bar.disable and time.monotonic() - told >= EVERY_S:
                told = time.monotonic()
                console.print(f"{task.description}: {task.completed:.0f} of {task.total:.0f}", soft_wrap=True)

        yield advance


def new_folder(path: str) -> Path:
    """The run folder, not there yet. Of several processes the others write, too, but where nobody looks."""
    if rank() == 0:
        return check_new_folder(path)
    aside = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, aside, ignore_errors=True)
    return Path(aside)


def keep_freed_memory(most: int = 2**30) -> None:
    """Let glibc keep up to ``most`` bytes that were freed, as torch does on a GPU; nothing happens without glibc.

    Else each step's larger tensors are mapped, zeroed page by page and unmapped again, which took a third of a step of
    `prunet` with 96 images of 32 px on two cores. The numbers are M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    for option in (-1, -3) if mallopt else ():
        mallopt(option, most)


class Stop:
    """What SIGTERM, Ctrl-C and a terminal that hangs up do: `Stopped`, at once, or when a journal has written."""

    def __init__(self) -> None:
        self._signal, self._waits = 0, False
        self._folder: Path | None = None

    def asked(self) -> int:
        """The number of the signal that has come; 0 if none has."""
        return self._signal

    @contextmanager
    def between_steps(self) -> Iterator[None]:
        """Inside, a first signal waits for `dnas.checkpoint.Journal.step`; a second one does not."""
        self._waits = True
        try:
            yield
        finally:
            self._waits = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, signals come here."""
        kinds = [signal.SIGTERM, signal.SIGINT]
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # not under nohup
            kinds.append(signal.SIGHUP)
        before = [signal.signal(kind, self._take) for kind in kinds]
        self._signal, self._folder = 0, None
        try:
            yield
        finally:
            for kind, handler in zip(kinds, before, strict=True):
                signal.signal(kind, handler)

    def _take(self, number: int, frame: object) -> None:
        if self._signal or not self._waits:
            folder = self._folder
            can_go_on = folder and any((folder / name).exists() for name in WORTH_KEEPING)
            raise Stopped(number, folder if can_go_on else None)
        self._signal = number

    def journal(self, folder: Path, device: torch.device, every_s: float) -> Journal:
        """The journal of the run in ``folder``: what stops this process from here on says how to go on, if it can."""
        self._folder = folder
        return Journal(folder, device, every_s, self.asked)


stop = Stop()


def what_failed(error: Exception) -> str:
    """One line on a machine that fails, and what to do; empty for any other error."""
    text = (str(error).splitlines() or [""])[0]
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in text:
        return "out of memory: a smaller --batch-size, --img-size or --width-mult, or fewer --paths are needed"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space is left on the disk for {error.filename or 'a file of the run'}"
    if "DataLoader worker" in text:
        return f"a process that reads images has died; --workers 0 does without ({text})"
    return ""


def run(main: Callable[[], None]) -> None:
    """Call ``main``. A user's mistake is one line on stderr and exit code 2, and so is a machine that fails, with 1.

    SIGTERM ends with 143, Ctrl-C with 130 and a terminal that hangs up with 129.
    """
    keep_freed_memory()
    try:
        with stop.listening(), processes():
            console.quiet = rank() > 0
            main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except Stopped as stopped:
        print(f"stopped{stopped}", file=sys.stderr)
        sys.exit(128 + stopped.signal)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if not (line := what_failed(error)):
            raise
        print(f"error: {line}", file=sys.stderr)
        sys.exit(1)


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
            if len(name) > 2 and name.startswith("--") and not any(flag.startswith(name) for flag in known):
                near = difflib.get_close_matches(name, known, 1, 0.8)
                self.error(f"unknown argument {name!r}" + (f": did you mean {near[0]}?" if near else ""))
        return super().parse_args(joined)

    def error(self, message: str) -> None:  # type: ignore[override]
        print(f"error: {message} (--help lists what is allowed)", file=sys.stderr)
        sys.exit(2)
