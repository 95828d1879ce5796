"""dnas from Python: what the commands do, with objects where they have files."""

import argparse
import copy
import difflib
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
from timm.utils import random_seed
from torch import Tensor, nn

from dnas.cli.flags import HINT
from dnas.cli.inputs import GROUPS, data_of, device_of, grid_of, outline_of, own_of
from dnas.cli.parsers import read
from dnas.cli.parsers import search as search_parser
from dnas.cli.process import keep_freed_memory
from dnas.cli.search import INITIAL_WEIGHTS, default_output
from dnas.cli.search import main as run_search
from dnas.export.model_file import build_net, read_arch, write_state
from dnas.export.own_file import PROGRAM
from dnas.nets.layer_supernet import MacroSupernet
from dnas.nets.own_base import Own, OwnBase, given, made_by
from dnas.nets.own_supernet import OwnSupernet
from dnas.nets.supernet import Supernet
from dnas.nets.timm_space import TimmBase
from dnas.nets.timm_supernet import TimmSupernet
from dnas.nets.tracing import copied
from dnas.report.metrics import read_run
from dnas.runtime.checkpoint import Stopped
from dnas.runtime.run_folder import check_new_folder, run_folder
from dnas.runtime.signals import stop
from dnas.spec.budget import parse_budget
from dnas.spec.checks import UserError
from dnas.spec.layer_space import EfficientNetSpace
from dnas.training.batches import Data, OwnLoss, Pair
from dnas.training.given_data import data_of_loaders, on_device

Net = str | nn.Module | Callable[[], nn.Module] | EfficientNetSpace
Images = str | Path | Data | Sequence[Iterable[Pair]]
GIVEN = "given-in-python"  # in the place of a data set that only a program has


@dataclass(frozen=True)
class Result:
    """A run folder that is complete. ``own`` is what makes the network, if it is a user's own."""

    folder: Path
    own: Own | None = None

    @property
    def arch(self) -> dict[str, Any]:
        """The network that was found: decision -> choice."""
        return read_arch(self.folder / "arch.json", self.own)["answers"]

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
        """The network that was found, on the CPU: a plain timm model, or a narrower network of the user's own.

        Args:
            weights: "trained", those of the final training; "search", those that the search left; None: a fresh start.

        Raises:
            UserError: another word, or the search has cut off a part of this network.
        """
        files = {"trained": "model.safetensors", "search": "search.safetensors", None: ""}
        if weights not in files or not (path := self.folder / files[weights]).exists():
            there = [name for name, file in files.items() if (self.folder / file).exists()]
            raise UserError(f"weights {weights!r}: this run has {', '.join(map(repr, there))}")
        document = read_arch(self.folder / "arch.json", self.own)
        sizes = {key: document[key] for key in ("num_classes", "in_chans")}
        model = build_net(document["net"], **sizes, own=self.own)
        if weights:
            model.load_state_dict(safetensors.torch.load_file(path))
        return model

    def export(self, folder: str | Path) -> Path:
        """Copy ``model.py``, ``model.safetensors`` and ``arch.json`` into a new folder, and return it.

        Beside the ``model.py`` of a network of the user's own goes the user's file. A network that a program gave has
        ``model.pt2`` in the place of ``model.py``: `torch.export.load` reads it.
        """
        new = check_new_folder(folder)
        own = read_arch(self.folder / "arch.json")["net"].get("own", {})
        with run_folder(new):
            for name in {"model.py", "model.safetensors", "arch.json", PROGRAM, own.get("file", "model.py")}:
                if (self.folder / name).exists():
                    shutil.copy(self.folder / name, new)
        return new

    def report(self, path: str | Path) -> Path:
        """Copy the report, a page that loads nothing, to a file, and return it."""
        return Path(shutil.copy(self.folder / "report.html", path))


def search(
    net: Net | None = None,
    *,
    budget: str | None = None,
    method: str = "gates",
    data: Images | None = None,
    output: str | Path | None = None,
    resume: str | Path | None = None,
    loss: Callable[[Any, Tensor], Tensor] | None = None,
    score: Callable[[Any, Tensor], Tensor | float] | None = None,
    **flags: Any,
) -> Result:
    """Search a network inside a budget, train it and the nets that cost nothing to choose, and write a run folder.

    Args:
        net: the name of a search space (default "prunet") or of a network of timm's; "my_net.py:build", a function in
            a file that makes a network of your own; any torch network, whose weights the search starts from; a function
            without arguments that makes one; or a space or supernet of your own.
        budget: as on the command line: "300MFLOPs", "5MParams", "50%", several joined by commas.
        method: how the network is chosen; `dnas.methods.catalog.METHODS` lists them.
        data: "digits" (the default), an image folder or tar, a `dnas.training.data.Data`, or a pair of iterables of
            batches, for training and validation (`dnas.training.given_data`).
        output: the run folder (default: runs/ and a new name).
        resume: instead of everything but ``net`` and ``data``, which objects need again: the folder of a run that was
            stopped.
        loss, score: for anything but classes: ``loss(outputs, targets)`` is a scalar to minimise, ``score(outputs,
            targets)`` is what networks are compared by, a number in percent. Both are means over a batch. ``data`` is a
            pair of iterables of batches, and a target may be any tensor [B, ...].
        flags: all others of ``dnas search``, with ``_`` for ``-``: ``epochs=30, search_epochs=10, seed=1, lr=1e-3``.

    Raises:
        UserError: whatever is wrong with the arguments or the data, in one line.
        KeyboardInterrupt: it was interrupted; ``resume`` goes on from there.

    torch's global random numbers are set by ``seed``.
    """
    own_loss = _own_loss(loss, score, data)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("torchrun goes with the command dnas search, not with dnas.search")
    if resume is None and budget is None:
        raise UserError('a budget is needed, such as budget="50%"')
    for name in ("sweep", "dataset", "data_dir", "supernet", "model", "model_file", "dry_run"):
        if name in flags:
            raise UserError(f"{name} is no argument here: net, budget and data say it")
    known = {action.dest: action for action in search_parser([f"--method={method}"])._actions}
    words = [f"--method={method}", *_words({"budget": budget, **flags}, known), *_data_words(data)]
    if isinstance(net, str):
        flag = "model-file" if ".py:" in net else "supernet" if net in (known["supernet"].choices or ()) else "model"
        words.append(f"--{flag}={net}")
    elif isinstance(net, (EfficientNetSpace, Supernet)):
        settled = ("width_mult", "divisor", "model_kwargs", "pretrained", "initial_checkpoint", *GROUPS.values())
        for name in settled:
            if name in flags:
                raise UserError(f"{name} is no argument beside a space or supernet, which has its own")
    elif name := _timm_name(net):
        words.append(f"--model={name}")
    elif net is not None:
        for name in ("width_mult", "model_kwargs", "pretrained", "initial_checkpoint"):
            if name in flags:
                raise UserError(f"{name} is no argument beside a network of your own, which has its own")
    if resume is not None:
        if budget is not None or output is not None or flags or method != "gates":
            raise UserError("with resume, only net and data are arguments: the run has all others")
        words = [f"--resume={resume}", *([f"--model-file={net}"] if isinstance(net, str) and ".py:" in net else [])]
    try:
        args, argv = read("search", words)
    except UserError as error:
        raise UserError(error.with_flags.removesuffix(HINT).rstrip()) from None
    if args.sweep:
        raise UserError(f"{str(resume)!r} is a sweep: the command dnas search --resume goes on with it")
    if isinstance(net, (EfficientNetSpace, Supernet)):
        is_timm = isinstance(net, TimmSupernet)
        args.model, args.supernet = (net.name, None) if is_timm else (None, net.name)
    elif net is not None and not isinstance(net, str) and not _timm_name(net):
        args.model_file, args.supernet = _own_name(net), None
    args.output = str(args.output or output or default_output(args, numbered=True))
    parse_budget(args.budget)  # it and the folder are checked before data is read, which may take long
    if resume is None:
        check_new_folder(args.output)
    keep_freed_memory()
    listening = stop.listening() if threading.current_thread() is threading.main_thread() else nullcontext()
    try:
        with listening:
            images = _images(data, args, own_loss)
            own = _supernet(net, args, images)
            if isinstance(own, OwnSupernet) and args.latency_table:
                raise UserError("latency_table goes with spaces and with networks of timm's")
            if isinstance(own, TimmSupernet) and resume is None:
                argv = [*argv, f"--initial-checkpoint={Path(args.output) / INITIAL_WEIGHTS}"]
            made = own.own if own else own_of(args)  # before the search: its file may change meanwhile
            (folder,) = run_search(args, argv, images, own)
    except Stopped as stopped:
        if stopped.signal == signal.SIGINT:
            raise KeyboardInterrupt(f"stopped{stopped}".replace("--resume ", "resume=")) from None
        raise SystemExit(128 + stopped.signal) from None
    return Result(folder, made)


def prune(model: Net, *, budget: str, method: str = "taylor", data: Images | None = None, **more: Any) -> Result:
    """Narrow a network to a budget and fine-tune what is left: `search` with ``keep_weights=True``.

    ``search_epochs`` is the length of the training before the cut, ``epochs`` that of the fine-tuning. ``model`` is any
    network with the weights to start from, or the name of one of timm's (``pretrained=True`` for timm's weights).
    """
    return search(model, budget=budget, method=method, data=data, keep_weights=True, **more)


def _data_words(data: Images | None) -> list[str]:
    """The words that say which data it is. Raises UserError if it is none."""
    if data is None:
        return []
    if isinstance(data, (str, Path)):
        return ["--dataset=digits" if data == "digits" else f"--data-dir={data}"]
    if isinstance(data, Data) or (isinstance(data, (tuple, list)) and len(data) == 2):
        return [f"--dataset={GIVEN}"]
    allowed = '"digits", a folder or tar, a Data, or a pair of iterables of batches'
    raise UserError(f"data is a {type(data).__name__}: {allowed} is expected")


def _own_loss(loss: Any, score: Any, data: Images | None) -> OwnLoss | None:
    """The program's own loss, if there is one. Raises UserError if something is missing."""
    if loss is None and score is None:
        return None
    if not (callable(loss) and callable(score)):
        raise UserError("loss and score go together: both are functions of (outputs, targets)")
    if not isinstance(data, (tuple, list)):
        raise UserError("loss goes with data that is a pair of iterables of batches, (inputs, targets) each")
    return OwnLoss(loss, score)


def _images(data: Images | None, args: argparse.Namespace, own: OwnLoss | None) -> Data:
    """The data, with batches on the device of the search. Raises UserError if flags say another size."""
    device = device_of(args)
    if data is None or isinstance(data, (str, Path)):
        return data_of(args, device)
    images = on_device(data, device) if isinstance(data, Data) else data_of_loaders(data[0], data[1], device, own)
    if own and args.num_classes:  # of a network of timm's, which is built for a number of outputs
        images = replace(images, num_classes=args.num_classes)
    for name in ("img_size", "num_classes"):
        if getattr(args, name) not in (None, getattr(images, name)):
            raise UserError(f"{name} {getattr(args, name)} does not fit the data, which has {getattr(images, name)}")
    return images


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in model.state_dict().items()}


def _supernet(net: Net | None, args: argparse.Namespace, data: Data) -> Supernet | None:
    """A supernet for what is no name. A network of timm's must be what its name and ``model_kwargs`` make."""
    random_seed(args.seed)
    if isinstance(net, Supernet):
        return copy.deepcopy(net)  # a search cuts it
    if isinstance(net, EfficientNetSpace):
        return MacroSupernet(net)
    if net is None or isinstance(net, str):
        return None
    model = getattr(net, "_orig_mod", net)  # of torch.compile
    fixed = {key: getattr(data, key) for key in ("num_classes", "in_chans", "img_size")}
    if not _timm_name(model):
        outline = OwnBase(name=_own_name(model), **(fixed | grid_of(args)))
        if isinstance(model, nn.Module):
            return OwnSupernet(outline, given(model), copied(model).cpu())
        return OwnSupernet(outline, Own(made_by(model, "net")))
    base = outline_of(args, fixed)
    assert isinstance(base, TimmBase) and isinstance(model, nn.Module)
    same = replace(base, num_classes=int(getattr(model, "num_classes", 0))).create(device="meta")
    if repr(same) != repr(model) or _shapes(same) != _shapes(model):  # the size of images is in shapes only
        raise UserError(f"{base} is another network than the one given: model_kwargs has to say how it was made")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / INITIAL_WEIGHTS
        write_state(model.state_dict(), file)
        return TimmSupernet(base, checkpoint=str(file))


def _timm_name(net: Any) -> str:
    """timm's name of one of its networks; empty for any other."""
    net = getattr(net, "_orig_mod", net)  # of torch.compile
    for about in ("pretrained_cfg", "default_cfg") if type(net).__module__.startswith("timm.models.") else ():
        if name := (getattr(net, about, None) or {}).get("architecture"):
            return str(name)
    return ""


def _own_name(net: Any) -> str:
    """A name for a network of the user's own. Raises UserError if it is no network, nor makes one."""
    net = getattr(net, "_orig_mod", net)
    if not (isinstance(net, nn.Module) or callable(net)):
        allowed = "a name, a torch network, a function that makes one, a space or a supernet"
        raise UserError(f"net is a {type(net).__name__}: {allowed} is expected")
    return str(getattr(net, "__name__", type(net).__name__))


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
            words += [flag, *(f"{key}={v!r}" for key, v in value.items())]
        else:
            several = [*value] if isinstance(value, (list, tuple)) else [value]
            if not isinstance(known[name], argparse._AppendAction):  # one value of several parts: 96,128
                several = [",".join(map(str, several))]
            words += [f"{flag}={one}" for one in several]
    return words
