"""Weights of a file, put into a network of timm's."""

from pathlib import Path
from pickle import UnpicklingError

from safetensors import SafetensorError
from timm.models import load_state_dict
from torch import Tensor, nn

from dnas.spec.checks import UserError


def read_weights(path: str, flag: str) -> dict[str, Tensor]:
    """The tensors of a file by name: a safetensors file, or a torch file, which is read with ``weights_only=True``.

    Of a checkpoint of timm's train.py the EMA weights are taken, if there are any. Raises UserError, with the name of
    the ``flag``, for a file that holds no weights.
    """
    given = f"{flag} {path!r}"
    if not Path(path).is_file():
        raise UserError(f"{given} is no file: weights are expected, of safetensors or torch")
    try:
        found = load_state_dict(path, weights_only=True)
    except (OSError, RuntimeError, ValueError, LookupError, TypeError, AttributeError, EOFError, UnpicklingError,
            SafetensorError) as error:  # fmt: skip
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{given} cannot be read as weights of safetensors or torch: {reason[:200]}") from None
    if not found or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise UserError(f"{given} holds no weights: names and tensors are expected")
    return dict(found)


def load_weights(model: nn.Module, path: str, flag: str) -> None:
    """Put the weights of a file (`read_weights`) into a network. Raises UserError unless all names and shapes fit."""
    found, own = read_weights(path, flag), model.state_dict()
    for name in (*own, *found):
        shapes = [list(state[name].shape) if name in state else None for state in (found, own)]
        if shapes[0] != shapes[1]:
            there, needed = ("missing" if shape is None else f"{shape}" for shape in shapes)
            expected = f"is {there}, {needed} is expected" if name in own else "is not in the network"
            raise UserError(f"{flag} {path!r} does not fit the network: {name} {expected}")
    model.load_state_dict(found)
