"""Weights of a file, put into a network."""

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from safetensors import SafetensorError
from timm.models import load_state_dict
from torch import Tensor, nn

from dnas.spec.checks import UserError, first_line


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
        reason = first_line(error)
        raise UserError(f"{given} cannot be read as weights of safetensors or torch: {reason[:200]}") from None
    if not found or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise UserError(f"{given} holds no weights: names and tensors are expected")
    return dict(found)


def classifier_names(model: Any) -> set[str]:
    """The names of the tensors of a network's classifiers, by timm's ``get_classifier``; none of another network."""
    given = model.get_classifier() if hasattr(model, "get_classifier") else ()
    heads = given if isinstance(given, (tuple, list)) else (given,)
    modules = [(name, m) for name, m in model.named_modules() if any(m is head for head in heads)]
    return {f"{name}.{own}" for name, m in modules for own in m.state_dict()}


def load_weights(model: nn.Module, found: dict[str, Tensor], given: str, any_classifier: bool = False) -> bool:
    """Put the weights of `read_weights` into a network. Returns whether its classifier was among them.

    If ``any_classifier``, one of another shape, or none, is allowed: then that of the network stays as it is.

    Raises:
        UserError: a name or a shape does not fit; the message begins with ``given``.
    """
    own = model.state_dict()
    heads = classifier_names(model) if any_classifier else set()
    fits = all(name in found and found[name].shape == own[name].shape for name in heads)
    if not fits:
        found = found | {name: own[name] for name in heads}
    for name in (*own, *found):
        shapes = [list(state[name].shape) if name in state else None for state in (found, own)]
        if shapes[0] != shapes[1]:
            there, needed = ("missing" if shape is None else f"{shape}" for shape in shapes)
            expected = f"is {there}, {needed} is expected" if name in own else "is not in the network"
            raise UserError(f"{given} does not fit the network: {name} {expected}")
    model.load_state_dict(found)
    return fits
