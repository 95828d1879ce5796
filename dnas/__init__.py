"""dnas: a network inside a budget, searched by gradient descent, exported as a plain timm model.

`search` and `prune` are what the commands are, from Python; both return a `Result`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dnas.api import Result, prune, search

__version__ = "0.1.0"
__all__ = ["Result", "__version__", "prune", "search"]


def __dir__() -> list[str]:
    return [*globals(), *__all__]


def __getattr__(name: str) -> Any:
    """The public names, whose modules import torch: not before somebody asks."""
    if name in ("Result", "prune", "search"):
        return getattr(import_module("dnas.api"), name)
    raise AttributeError(f"module 'dnas' has no attribute {name!r}")
