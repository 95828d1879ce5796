"""dnas from Python: what the commands do, with objects where they have files."""

import argparse
import difflib
import shutil
import signal
import threading
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import nn

from dnas.cli.flags import HINT
from dnas.cli.inputs import device_of
from dnas.cli.parsers import read
from dnas.cli.parsers import search as search_parser
from dnas.cli.process import keep_freed_memory
from dnas.cli.search import default_output
from dnas.cli.search import main as run_search
from dnas.export.model_file import build_net, read_arch, write_state
from dnas.nets.layer_supernet import MacroSupernet
from dnas.nets.supernet import Supernet
from dnas.nets.timm_supernet import TimmSupernet
from dnas.report.metrics import read_run
from dnas.runtime.checkpoint import Stopped
from dnas.runtime.distributed import processes
from dnas.runtime.run_folder import check_new_folder
from dnas.runtime.signals import stop
from dnas.spec.checks import UserError
from dnas.spec.layer_space import EfficientNetSpace
from dnas.training.data import Data, Pair
from dnas.training.given_data import data_of_loaders

Images = str | Path | Data | tuple[Iterable[Pair], Iterable[Pair]]
GIVEN = "given-in-python"  # in the place of a data set that only a program has


@dataclass(frozen=True)
class Result:
    """A run folder that is complete."""

    folder: Path

    @property
    def arch(self) -> dict[str, Any]:
        """The network that was found: decision -> choice."""
        return read_arch(self.folder / "arch.json")["answers"]

    @property
    def metrics(self) -> dict[str, Any]:
        """What metrics.json has: of the nets ``found``, ``uniform`` and ``balanced`` the costs and the top-1, ..."""
        return dict(read_run(self.folder).metrics)

    @property
    def costs(self) -> dict[str, float]:
        """Metric (``macs``, ``params`` and ``ms``, where there is a table) -> cost of the network that was found."""
        found = self.metrics["found"]
        return {metric: found[metric] for metric in ("macs", "params", "ms") if metric in found}

    def model(self, weights: str | None = "trained") -> nn.Module:
        """The network that was found, a plain timm model on the CPU.

        Args:
            weights: "trained", those of the final training; "search", those that the search left; None: a fresh start.

        Raises:
            UserError: another word, or the search has cut off a part of this network.
        """
        files = {"trained": "model.safetensors", "search": "search.safetensors", None: ""}
        if weights not in files or not (path := self.folder / files[weights]).exists():
            there = [name for name, file in files.items() if (self.folder / file).exists()]
            raise UserError(f"weights {weights!r}: this run has {', '.join(map(repr, there))}")
        document = read_arch(self.folder / "arch.json")
        model = build_net(document["net"], num_classes=document["num_classes"], in_chans=document["in_chans"])
        if weights:
            model.load_state_dict(safetensors.torch.load_file(path))
        return model

    def export(self, folder: str | Path) -> Path:
        """Copy ``model.py``, ``model.safetensors`` and ``arch.json`` into a new folder, and return it."""
        new = check_new_folder(folder)
        new.mkdir(parents=True, exist_ok=True)
        for name in ("model.py", "model.safetensors", "arch.json"):
            shutil.copy(self.folder / name, new)
        return new

    def report(self, path: str | Path) -> Path:
        """Copy the report, a page that loads nothing, to a file, and return it."""
        return Path(shutil.copy(self.folder / "report.html", path))


def search(
    net: str | nn.Module | EfficientNetSpace | None = None,
    *,
    budget: str | None = None,
    method: str = "gates",
    data: Images | None = None,
    output: str | Path | None = None,
    resume: str | Path | None = None,
    **flags: Any,
) -> Result:
    """Search a network inside a budget, train it and the nets that cost nothing to choose, and write a run folder.

    Args:
        net: the name of a search space (default "prunet") or of a network of timm's; such a network itself, whose
            weights the search starts from; or a space or supernet of your own.
        budget: as on the command line: "300MFLOPs", "5MParams", "50%", several joined by commas.
        method: how the network is chosen; `dnas.methods.catalog.METHODS` lists them.
        data: "digits" (the default), an image folder or tar, a `dnas.training.data.Data`, or a pair of iterables of
            batches, for training and validation (`dnas.training.given_data`).
        output: the run folder (default: runs/ and a new name).
        resume: instead of everything but ``net`` and ``data``, which objects need again: the folder of a run that was
            stopped.
        flags: all others of ``dnas search``, with ``_`` for ``-``: ``epochs=30, search_epochs=10, seed=1, lr=1e-3``.

    Raises:
        UserError: whatever is wrong with the arguments or the data, in one line.
        KeyboardInterrupt: it was interrupted; ``resume`` goes on from there.

    torch's global random numbers are set by ``seed``.
    """
    if resume is None and budget is None:
        raise UserError('a budget is needed, such as budget="50%"')
    if (wrong := [name for name in ("sweep", "dataset", "data_dir", "supernet", "model") if name in flags]) != []:
        raise UserError(f"{wrong[0]} is no argument here: net, budget and data take its place")
    known = {action.dest: action for action in search_parser([f"--method={method}"])._actions}
    words = [f"--method={method}", *_words({"budget": budget, **flags}, known)]
    given, own = data if isinstance(data, (Data, tuple)) else None, net if isinstance(net, Supernet) else None
    if given is not None:
        words.append(f"--dataset={GIVEN}")
    elif data is not None:
        words.append("--dataset=digits" if data == "digits" else f"--data-dir={data}")
    if isinstance(net, str):
        words.append(f"--supernet={net}" if net in (known["supernet"].choices or ()) else f"--model={net}")
    elif isinstance(net, EfficientNetSpace):
        own = MacroSupernet(net)
    elif net is not None and own is None and resume is None:
        words.append(f"--model={_name_of(net)}")
    try:
        args, argv = read("search", words if resume is None else [f"--resume={resume}"])
    except UserError as error:
        raise UserError(error.with_flags.removesuffix(HINT).rstrip()) from None
    if own is not None:
        args.model, args.supernet = (own.name, None) if isinstance(own, TimmSupernet) else (None, own.name)
    if resume is None:
        args.output = str(output or default_output(args, numbered=True))
        if isinstance(net, nn.Module) and own is None:
            file = check_new_folder(args.output).with_name(Path(args.output).name + "-initial.safetensors")
            file.parent.mkdir(parents=True, exist_ok=True)
            write_state(net.state_dict(), file)
            args.initial_checkpoint, argv = str(file), [*argv, f"--initial-checkpoint={file}"]
    if isinstance(given, tuple):
        given = data_of_loaders(*given, device=device_of(args))
    keep_freed_memory()
    listening = stop.listening() if threading.current_thread() is threading.main_thread() else nullcontext()
    try:
        with listening, processes():
            (folder,) = run_search(args, argv, given, own)
    except Stopped as stopped:
        if stopped.signal == signal.SIGINT:
            raise KeyboardInterrupt(f"stopped{stopped}".replace("--resume ", "resume=")) from None
        raise
    return Result(folder)


def prune(
    model: str | nn.Module, *, budget: str, method: str = "taylor", data: Images | None = None, **more: Any
) -> Result:
    """Narrow a network of timm's to a budget and fine-tune what is left: `search` with ``keep_weights=True``.

    ``search_epochs`` is the length of the training before the cut, ``epochs`` that of the fine-tuning. ``model`` is a
    network of timm's with the weights to start from, or its name (``pretrained=True`` for timm's weights).
    """
    return search(model, budget=budget, method=method, data=data, keep_weights=True, **more)


def _name_of(model: nn.Module) -> str:
    """timm's name of one of its networks."""
    name = getattr(model, "pretrained_cfg", {}).get("architecture") or getattr(model, "default_cfg", {}).get(
        "architecture"
    )
    if not name:
        raise UserError(
            f"{type(model).__name__} is no network that timm has made: a name or such a network is expected"
        )
    return str(name)


def _words(flags: Mapping[str, Any], known: Mapping[str, argparse.Action]) -> list[str]:
    """These arguments as the words of a command line, so that config.json says the same for both."""
    words = []
    for name, value in flags.items():
        if name not in known or name in ("help", "resume"):
            near = difflib.get_close_matches(name, known, 1, 0.7)
            raise UserError(f"unknown argument {name!r}" + (f": did you mean {near[0]}?" if near else ""))
        flag = f"--{name.replace('_', '-')}"
        if value is None or (value is False and f"--no-{name.replace('_', '-')}" not in known[name].option_strings):
            continue
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        elif isinstance(value, Mapping):
            words += [flag, *(f"{key}={v if isinstance(v, str) else repr(v)}" for key, v in value.items())]
        else:
            words += [f"{flag}={one}" for one in (value if isinstance(value, (list, tuple)) else [value])]
    return words
