"""Export of a network of the user's own: ``model.py`` calls the user's function and applies the smaller sizes.

A network that a program gave has no function in a file. It is exported with its weights as a program of torch.export.
"""

import copy
import hashlib
import inspect
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dnas.export import narrowed
from dnas.nets.own_base import Own
from dnas.spec.checks import UserError, first_line

PROGRAM = "model.pt2"

_SOURCE = '''"""{name}: a network found by dnas, {file}:{function} with fewer channels. Needs torch and safetensors.

    import model  # this file
    net = model.create(pretrained=True)  # weights: model.safetensors beside this file

Found for inputs of {shape}. To change the network, change MODULES.
"""

import importlib.util
import math
import sys
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

{body}


# For each module what is smaller than {file} makes it: shapes of tensors (None: as there) and the numbers that the
# module keeps.
MODULES = {modules}

DROPPED = {dropped}  # blocks that are left out

HERE = Path(__file__).resolve().parent


def create(pretrained: bool = False) -> nn.Module:
    """The network, freshly initialised, or with the weights beside this file."""
    spec = importlib.util.spec_from_file_location("{name}_source", HERE / "{file}")
    source = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(source)
    model = source.{function}()
    drop(model, DROPPED)
    narrow(model, MODULES)
    if pretrained:
        model.load_state_dict(safetensors.torch.load_file(HERE / "model.safetensors"))
    return model
'''


def needed(net: dict[str, Any], own: Own | None) -> Own:
    """``own``, which makes this network. Raises UserError if there is none, or if it is another one."""
    made_by = net["own"]
    if own is None:
        if "file" in made_by:
            raise UserError(f"--model-file {made_by['file']}:{made_by['function']} is needed: it makes this network")
        raise UserError(f"only the program that gave {made_by['name']} can make it again")
    if own.file and hashlib.sha256(own.text).hexdigest() != made_by.get("sha256"):
        raise UserError(f"{own.file} is another file than the one that made this network")
    return own


def build_own(net: dict[str, Any], own: Own | None) -> nn.Module:
    """The network, freshly initialised. Raises UserError if nothing makes it, or if its sizes do not fit."""
    model = needed(net, own).create()
    try:
        narrowed.drop(model, net.get("dropped", []))
        narrowed.narrow(model, net["modules"])
    except (AttributeError, TypeError, ValueError, IndexError) as error:
        raise UserError(
            f"the network does not fit the sizes in arch.json: {' '.join(str(error).split())[:200]}"
        ) from None
    return model


def own_source(name: str, net: dict[str, Any], shape: tuple[int, ...], pretty: Callable[[Any], str]) -> str:
    """The text of ``model.py``."""
    parts = (narrowed.drop, narrowed.narrow, narrowed._narrow, narrowed._scale)
    own = net["own"]
    return _SOURCE.format(
        name=name,
        file=own["file"],
        function=own["function"],
        shape=" x ".join(map(str, shape)),
        body="\n\n".join(inspect.getsource(part) for part in parts).strip(),
        modules=pretty(net["modules"]),
        dropped=pretty(net.get("dropped", [])),
    )


@torch.no_grad()
def write_program(model: nn.Module, shape: tuple[int, ...], folder: Path) -> None:
    """Write the network with its weights to ``model.pt2``, for any number of images. UserError if torch cannot."""
    model = copy.deepcopy(model).cpu().eval()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch about its own parts
            batch = torch.export.Dim("batch", min=1)
            program = torch.export.export(model, (torch.zeros(2, *shape),), dynamic_shapes=({0: batch},))
            torch.export.save(program, folder / f"part-{PROGRAM}")
    except Exception as error:  # whatever the network's code does that cannot be exported
        reason = first_line(error)
        raise UserError(
            f"torch.export fails ({reason}): the file of the network is needed, as net='my_net.py:build'"
        ) from error
    (folder / f"part-{PROGRAM}").replace(folder / PROGRAM)
