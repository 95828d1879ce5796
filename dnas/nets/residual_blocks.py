"""Residual blocks of a network that may be dropped as a whole: found by one forward pass, and scaled by a skip gate.

A residual block adds what it computes to its input, ``M(x) = x + F(x)``. A network without it has ``nn.Identity`` in
its place. The skip s of a block (PruNet) gives ``x + s (M(x) - x)``, which is ``x + s F(x)``. So nothing inside a block
is changed, and an activation after the sum (ResNet) needs no rule: at s = 0 and s = 1 the output is exact.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dnas.nets.channels import is_inside
from dnas.nets.layer_choice import SkipGate
from dnas.nets.tracing import RULES, leaves, on_meta, rearrangement, view
from dnas.spec.checks import first_line
from dnas.spec.space import KEEP, When

MOVES = {name for name, rule in RULES.items() if rule in (rearrangement, view)}


class ResidualBlock(nn.Module):
    """The skip of a block of a traced network. It has the form of a `StochasticLayer` without candidates.

    The module itself belongs to the network, where its name is ``name``.
    """

    choice = None

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.skip, self.blocks = name, SkipGate(), nn.ModuleDict()


def when_inside(name: str, blocks: Collection[str]) -> When:
    """The condition under which a network has this module or parameter: that the block around it stays."""
    return tuple((f"{block}/keep", KEEP) for block in blocks if is_inside(name, block))


@dataclass
class _Running:
    """A call of a module: the tensors that are its input, moved, passed through activations, or with terms added."""

    name: str
    x: Tensor | None
    carried: set[int] = field(default_factory=set)
    version: int = 0
    adds: bool = False


class _Follower(TorchDispatchMode):
    """Follows the inputs of all running modules through the operations of a pass."""

    def __init__(self) -> None:
        super().__init__()
        self.running: list[_Running] = []
        self.held: list[Any] = []  # keeps tensors alive: ids are unique only while they live

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        tensors = [t for t in leaves((args, kwargs or {})) if isinstance(t, Tensor)]
        self.held.append((tensors, out))
        adds = name in ("add", "add_") and len(tensors) == 2
        if adds or (len(tensors) == 1 and (name in MOVES or torch.Tag.pointwise in func.tags)):
            for call in self.running:
                if not call.carried.isdisjoint(map(id, tensors)):
                    call.carried |= set(map(id, leaves(out)))
            if adds and self.running and id(out) in self.running[-1].carried:
                self.running[-1].adds = True
        return out


def residual_blocks(model: nn.Module, image: Sequence[int], layers: Collection[str]) -> tuple[list[str], list[str]]:
    """The modules that may be dropped, and reasons why others may not, as "module: reason".

    Such a module reads one tensor and writes one of the same shape: its input, to which its own forward adds what the
    ``layers`` in it compute. It runs once in a pass, and shares no parameter with the rest of the network. Of blocks
    inside blocks the outermost counts. The network must run without the block, which a pass shows. All passes run on
    the device ``meta`` on an image of (channels, height, width).
    """
    model = on_meta(model).eval()
    follower, found, calls = _Follower(), set[str](), dict[str, int]()

    def enter(name: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        x = args[0] if len(args) == 1 and not kwargs and isinstance(args[0], Tensor) else None
        calls[name] = calls.get(name, 0) + 1
        follower.running.append(_Running(name, x, set() if x is None else {id(x)}, 0 if x is None else x._version))

    def leave(module: nn.Module, args: tuple, out: Any) -> None:
        call = follower.running.pop()
        if call.x is None or not (call.adds and isinstance(out, Tensor) and id(out) in call.carried):
            return
        # A module that changes its input in place leaves nothing that could be its output without it.
        if out.shape == call.x.shape and call.x._version == call.version:
            found.add(call.name)

    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(partial(enter, name), with_kwargs=True))
        handles.append(module.register_forward_hook(leave))
    x = torch.zeros(1, *image, device="meta", dtype=next(model.parameters()).dtype)
    with torch.no_grad(), follower:
        shapes = [t.shape for t in leaves(model(x)) if isinstance(t, Tensor)]
    for handle in handles:
        handle.remove()

    names: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    blocks, reasons = list[str](), list[str]()
    for block in [name for name, _ in model.named_modules() if name in found]:  # a block before those inside
        if not block or any(is_inside(block, other) for other in blocks):
            continue
        if not any(is_inside(layer, block) for layer in layers):
            continue
        if calls[block] > 1:
            reasons.append(f"{block}: it runs {calls[block]} times")
        elif any(len({is_inside(name, block) for name in own}) > 1 for own in names.values()):
            reasons.append(f"{block}: it shares a parameter with the rest of the network")
        elif why := _fails_without(model, block, x, shapes):
            reasons.append(f"{block}: without it the network fails: {why}")
        else:
            blocks.append(block)
    return blocks, reasons


def _fails_without(model: nn.Module, block: str, x: Tensor, shapes: Sequence[torch.Size]) -> str:
    """Why the network does not run with `nn.Identity` in the place of a block. Empty if it does."""
    module = model.get_submodule(block)
    model.set_submodule(block, nn.Identity())
    try:
        with torch.no_grad():
            found = [t.shape for t in leaves(model(x)) if isinstance(t, Tensor)]
    except Exception as problem:  # any error of the network's own code
        return first_line(problem)
    finally:
        model.set_submodule(block, module)
    return "" if found == list(shapes) else "its results have other shapes"


@contextmanager
def scaled_blocks(model: nn.Module, skips: Mapping[str, Tensor], dropped: Collection[str]) -> Iterator[None]:
    """Inside the context, what a block adds is scaled by its skip, a scalar; blocks ``dropped`` are not computed."""

    def scale(s: Tensor, module: nn.Module, args: tuple, out: Tensor) -> Tensor:
        return args[0] + s.to(out.dtype) * (out - args[0])

    handles, gone = [], [model.get_submodule(name) for name in dropped]
    try:
        for name, s in skips.items():
            handles.append(model.get_submodule(name).register_forward_hook(partial(scale, s)))
        for module in gone:
            module.forward = _unchanged
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in gone:
            vars(module).pop("forward", None)


def _unchanged(x: Tensor) -> Tensor:
    return x
