"""What a run keeps on disk to go on where it was stopped, and how networks and optimizers are put back as they were.

A checkpoint is plain data: tensors, numbers, text, and lists and dicts of them. It is read with ``weights_only=True``.
"""

import copy
import hashlib
import io
import os
import random
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dnas.runtime.distributed import gathered, rank
from dnas.runtime.run_folder import write_whole
from dnas.spec.checks import UserError, first_line

LAST, BEFORE = "checkpoint.pt", "checkpoint.before.pt"
WORTH_KEEPING = (LAST, BEFORE, "metrics.json")  # a run folder with one of these can go on, or is complete
FORMAT = 2


def write_checkpoint(folder: Path, content: dict[str, Any]) -> None:
    """Make ``content`` the last checkpoint of ``folder``; the one that was becomes the one before.

    At every moment at least one whole checkpoint is there, once there was one. The file holds the content as bytes and
    their SHA-256. Raises OSError where it cannot be written.
    """
    inner, outer = io.BytesIO(), io.BytesIO()
    torch.save(content, inner)
    digest = hashlib.sha256(inner.getbuffer()).hexdigest()
    payload = torch.frombuffer(inner.getbuffer(), dtype=torch.uint8)
    torch.save({"format": FORMAT, "sha256": digest, "content": payload}, outer)
    new = folder / f".{LAST}.tmp"
    write_whole(new, outer.getvalue())  # first of all: the disk may be full
    if (folder / LAST).exists():
        os.replace(folder / LAST, folder / BEFORE)
    os.replace(new, folder / LAST)


def _read(path: Path) -> dict[str, Any]:
    """The content, on the CPU. UserError for whatever is wrong with a checkpoint."""
    try:
        outer = torch.load(path, map_location="cpu", weights_only=True)
        content = outer["content"].numpy().tobytes()
        if outer["format"] != FORMAT:
            raise ValueError(f"its format is {outer['format']!r}, not {FORMAT}")
        if hashlib.sha256(content).hexdigest() != outer["sha256"]:
            raise ValueError("its checksum is wrong")
        found: dict[str, Any] = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        return found
    except Exception as error:  # on damaged files torch raises almost anything
        reason = first_line(error)
        raise UserError(f"{str(path)!r} is no checkpoint, or a damaged one: {reason}") from None


def read_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The last checkpoint that is whole, its tensors on the CPU wherever they were; None if there never was one.

    A damaged last one gives way to the one before, with a warning. Raises UserError if all are damaged.
    """
    there = [folder / name for name in (LAST, BEFORE) if (folder / name).exists()]
    for path in there:
        try:
            return _read(path)
        except UserError as error:
            if path == there[-1]:
                raise
            warnings.warn(f"{error}; the one before is taken", stacklevel=2)
    return None


@contextmanager
def checkpoint_errors() -> Iterator[None]:
    """Inside, what does not fit is a checkpoint that is not of this run: a UserError."""
    try:
        yield
    except UserError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, AssertionError) as error:
        reason = (str(error).splitlines() or [""])[-1].strip() or type(error).__name__
        raise UserError(f"the checkpoint is not of this run, or of another version of dnas: {reason[:200]}") from None


def module_data(module: nn.Module) -> dict[str, Any]:
    """The state of a module, to be read back by `load_module`."""
    return {name: t.detach() if isinstance(t, Tensor) else t for name, t in module.state_dict().items()}


def load_module(module: nn.Module, data: dict[str, Any]) -> None:
    """Restore a module, including the memory layout of its parameters: kernels, and hence bits, depend on it.

    ``data`` may be on another device: each parameter stays on its own.
    """
    module.load_state_dict(data)
    for name, p in module.named_parameters():
        p.data = data[name].to(p.device, copy=True)


def optimizer_data(optimizer: Optimizer, module: nn.Module) -> list[dict[str, Any]]:
    """Groups of an optimizer of parameters of ``module``, with their state, by the parameters' names.

    By name, because cutting takes parameters out, and swaps them.
    """
    names = {id(p): name for name, p in module.named_parameters()}
    return [
        {
            "options": {key: value for key, value in group.items() if key != "params"},
            "names": [names[id(p)] for p in group["params"]],
            "state": {names[id(p)]: dict(optimizer.state[p]) for p in group["params"] if p in optimizer.state},
        }
        for group in optimizer.param_groups
    ]


def load_optimizer(optimizer: Optimizer, module: nn.Module, data: list[dict[str, Any]]) -> None:
    """Put the state of `optimizer_data` into an optimizer of the same kind, on the devices of its parameters.

    A tensor "step" stays on the CPU, as torch's own ``load_state_dict`` leaves it, unless the optimizer needs it there.
    """
    by_name = dict(module.named_parameters())
    optimizer.state.clear()
    for group, saved in zip(optimizer.param_groups, data, strict=True):
        group.update(saved["options"])
        group["params"] = [by_name[name] for name in saved["names"]]
        steps_on_device = group.get("capturable") or group.get("fused")
        for name, state in saved["state"].items():
            p = by_name[name]
            optimizer.state[p] = {
                key: value.to(p.device, copy=True)
                if isinstance(value, Tensor) and (key != "step" or steps_on_device)
                else copy.copy(value)
                for key, value in state.items()
            }


def random_data(device: torch.device) -> dict[str, Any]:
    """The state of Python's, numpy's and torch's global random numbers."""
    numpy = np.random.get_state(legacy=False)
    numpy["state"]["key"] = numpy["state"]["key"].tolist()
    return {
        "python": random.getstate(),
        "numpy": numpy,
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def load_random(data: dict[str, Any], device: torch.device) -> None:
    """Go on with the random numbers of `random_data`."""
    numpy = data["numpy"]
    numpy["state"]["key"] = np.array(numpy["state"]["key"], dtype=np.uint32)
    random.setstate(data["python"])
    np.random.set_state(numpy)
    torch.set_rng_state(data["torch"].cpu())
    if device.type == "cuda" and data["cuda"] is not None:
        torch.cuda.set_rng_state(data["cuda"].cpu(), device)


class Stopped(BaseException):
    """The process was asked to stop by this signal; the run is on disk if there is a ``folder``."""

    def __init__(self, signal: int, folder: Path | None = None) -> None:
        super().__init__(f": --resume {folder} goes on from here" if folder else "")
        self.signal = signal


class Journal:
    """What a run has come to: ``done``, results of what is finished, and the state of what is under way.

    Args:
        folder: the run folder.
        every_s: seconds between checkpoints while something is under way.
        stop: the number of a signal that asks the run to stop, 0 while there is none.
        resumed: the folder that ``--resume`` takes, if it is another one: of a sweep, or of the first process.

    Of several processes the first one writes, and all go on from what it has read.
    """

    def __init__(
        self, folder: Path, device: torch.device, every_s: float, stop: Callable[[], int], resumed: Path | None = None
    ) -> None:
        self.folder, self.device, self.every_s, self.stop = folder, device, every_s, stop
        self.resumed = resumed or folder
        saved = gathered(read_checkpoint(folder) if rank() == 0 else None)[0]
        if saved is None:
            saved = {"done": {}, "under_way": {}}
        with checkpoint_errors():
            self.done: dict[str, Any] = {**saved["done"]}
            self._under_way: dict[str, Any] = {**saved["under_way"]}
        self._written = time.monotonic()

    def knows(self, what: str) -> bool:
        """Whether ``what`` was under way when the run was stopped."""
        return self._under_way.get("what") == what

    def under_way(self, what: str) -> Any:
        """The state that ``what`` was in when the run was stopped, and random numbers go on from there; None if new."""
        if not self.knows(what):
            return None
        found, self._under_way = self._under_way, {}
        with checkpoint_errors():
            load_random(found["random"], self.device)
            return found["state"]

    def finish(self, what: str, result: Any) -> None:
        """``what`` is finished, and came to ``result``."""
        self.done[what] = result
        self._write({})

    def step(self, what: str, state: Callable[[], Any], last: bool = False) -> None:
        """After a step of ``what``: write a checkpoint if it is time to, or the step was the last one.

        So nothing that comes after the steps can lose them. Raises `Stopped` if it is time to go.
        """
        signal = self.stop()
        if signal or last or time.monotonic() - self._written >= self.every_s:
            self._write({"what": what, "state": state(), "random": random_data(self.device)} if rank() == 0 else {})
        if signal:
            raise Stopped(signal, self.resumed)

    def _write(self, under_way: dict[str, Any]) -> None:
        if rank() == 0:
            write_checkpoint(self.folder, {"done": self.done, "under_way": under_way})
        self._written = time.monotonic()

    def close(self) -> None:
        """The run is complete: there is nothing to go on with."""
        if rank() == 0:
            for name in (BEFORE, LAST):
                (self.folder / name).unlink(missing_ok=True)
