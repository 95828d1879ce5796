"""A network of the user's own as the widest net of a space: its description, and the function that makes it."""

import copy
import hashlib
import importlib.util
import re
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from torch import nn

from dnas.spec.checks import UserError, told
from dnas.spec.image_size import ImgSize


class Own(NamedTuple):
    """What makes a network of the user's own: a function, and the file that it is from.

    ``text`` is the content of the file when it was run: the file itself may change while a search runs. Both are empty
    if a program gave the network.
    """

    create: Callable[[], nn.Module]  # makes the network anew, with fresh weights
    file: str = ""
    text: bytes = b""


@dataclass(frozen=True)
class OwnBase:
    """A network of the user's own, which is the widest net of a space.

    ``file`` and ``function`` say where the function is that makes it, and ``digest`` is the SHA-256 of this file. They
    are empty for a network that a program gave. For the other fields see `dnas.nets.timm_space.TimmBase`.
    """

    name: str
    num_classes: int
    in_chans: int = 3
    img_size: ImgSize = 224
    divisor: int = 8
    ties: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    divisors: tuple[str, ...] = ()
    min_widths: tuple[str, ...] = ()
    most_widths: int = 32
    depth: bool = False
    file: str = ""
    function: str = ""
    digest: str = ""

    def __str__(self) -> str:
        return f"--model-file {self.file}:{self.function}" if self.file else self.name


def read_function(given: str) -> tuple[Own, dict[str, str]]:
    """The function that ``given``, "my_net.py:build", names, and the fields of `OwnBase` that say which it is.

    The file is run. It may import packages, but no files beside it, which an export would lack. Raises UserError if
    there is no such file or function, or the file fails.
    """
    file, _, name = given.rpartition(":")
    path = Path(file)
    if not (name.isidentifier() and path.suffix == ".py" and path.is_file()):
        raise UserError(f"--model-file {given!r}: FILE.py:FUNCTION is expected, with a file that is there")
    text = path.read_bytes()
    digest = hashlib.sha256(text).hexdigest()
    spec = importlib.util.spec_from_file_location(f"{path.stem}_{digest[:12]}", path)
    assert spec  # it is a .py file
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    try:
        exec(compile(text, path, "exec"), vars(module))
    except Exception as error:  # of the user's own code
        raise UserError(f"--model-file {given!r} cannot be run: {told(error)}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"--model-file {given!r}: {file} has no function {name!r}")
    about = {"name": name, "file": file, "function": name, "digest": digest}
    return Own(made_by(function, f"--model-file {given!r}"), file, text), about


def name_of_copy(file: str) -> str:
    """The name of the file in an export, where ``model.py`` is the export's own: letters, digits and _."""
    stem = re.sub(r"\W", "_", Path(file).stem, flags=re.ASCII)[:48]
    return f"{stem}.py" if stem != "model" and stem.isidentifier() else f"own_{stem}.py"


def made_by(function: Callable[[], object], what: str) -> Callable[[], nn.Module]:
    """``function``, checked at every call.

    A call raises UserError if the function fails, makes no network with weights, or returns the one of the call before:
    a supernet cuts its network.
    """
    before: list[weakref.ref] = []

    def create() -> nn.Module:
        try:
            model = function()
        except Exception as error:  # of the user's own code
            raise UserError(f"{what} makes no network: {told(error)}") from error
        if not (isinstance(model, nn.Module) and any(True for _ in model.parameters())):
            raise UserError(f"{what} makes a {type(model).__name__}: an nn.Module with parameters is expected")
        if before and before[0]() is model:
            raise UserError(f"{what} returns the same network twice: a new one at each call is expected")
        before[:] = [weakref.ref(model)]
        return model

    return create


def given(model: nn.Module) -> Own:
    """What makes a network anew that a program gave: copies of it, with fresh weights.

    Every module with a function ``reset_parameters`` (or ``_reset_parameters``, as torch's attention) draws its weights
    anew, a module after its parts. Other parameters stay.
    """

    def create() -> nn.Module:
        copied = copy.deepcopy(model).cpu()
        for module in reversed([*copied.modules()]):
            reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
            if callable(reset):
                reset()
        return copied

    return Own(create)
