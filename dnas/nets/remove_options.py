"""Cut options off a supernet for good, together with their optimizer state: widths, blocks, layers. Move pairs.

These functions do not resize modules: call `dnas.nets.supernet.Supernet.fit` after them.
"""

from collections.abc import Iterable, Sequence

from torch import Tensor, nn
from torch.optim import Optimizer

from dnas.nets.bipath_block import Prunode, parts
from dnas.nets.cut_tensors import resize_tensor
from dnas.nets.layer_choice import StochasticLayer
from dnas.nets.markov_gate import MarkovGate


def narrow(gate: MarkovGate, width: int, optimizers: Sequence[Optimizer] = ()) -> None:
    """Leave a Markov gate only its widths up to ``width``, which must be one of them."""
    gate.widths = gate.widths[: gate.widths.index(width) + 1]
    resize_tensor(gate, "alpha", 0, len(gate.widths) - 1, optimizers)
    gate.idle = gate.idle[: len(gate.widths) - 1]


def move_pair(block: Prunode, low: int, high: int, optimizers: Sequence[Optimizer] = ()) -> None:
    """Set a bi-path block's pair to the grid indices ``low <= high``.

    A copy that moves to the old width of the other copy takes over the last norm of the other copy, with its optimizer
    state. The other copy, at its new width, starts with the same values. The optimizer state of the logits is removed.
    """
    gate, (_, _, name) = block.gate, parts(block.block)
    down = gate.widths[high] == gate.small < gate.large
    up = gate.widths[low] == gate.large < gate.widths[high]
    if up or down:
        large = getattr(block.block, name)
        setattr(block.block, name, block.norm_small)
        block.norm_small = large
        kept, fresh = (getattr(block.block, name), large) if down else (large, getattr(block.block, name))
        fresh.load_state_dict(kept.state_dict())
        for optimizer in optimizers:
            for p in fresh.parameters():
                optimizer.state.pop(p, None)
    gate.move(low, high)
    for optimizer in optimizers:
        optimizer.state.pop(gate.logits, None)


def remove_block(layer: StochasticLayer, name: str, optimizers: Sequence[Optimizer] = ()) -> None:
    """Delete one candidate of a layer for good. Raises ValueError if it is the last one."""
    choice = layer.choice
    if choice is None or len(choice.alive) < 2:
        raise ValueError(f"{layer.name}: {name} is the only block left")
    gone = choice.alive.index(choice.options.index(name))
    del layer.blocks[name]
    # Remove the logit: those behind it move up by one place, in the optimizer's buffers too.
    keep = [k for k in range(len(choice.alive)) if k != gone]
    for tensor in (choice.logits.data, *_buffers_like(choice.logits, optimizers)):
        tensor[: len(keep)] = tensor[keep].clone()
    choice.alive = [choice.alive[k] for k in keep]
    resize_tensor(choice, "logits", 0, len(keep), optimizers)


def _buffers_like(parameter: nn.Parameter, optimizers: Iterable[Optimizer]) -> list[Tensor]:
    values = [v for o in optimizers for v in o.state.get(parameter, {}).values() if isinstance(v, Tensor)]
    return [v for v in values if v.shape == parameter.shape]


def remove_layer(layer: StochasticLayer) -> None:
    """Drop a residual layer for good: its output is then its input. Raises ValueError if it cannot be dropped."""
    if layer.skip is None:
        raise ValueError(f"{layer.name} cannot be dropped")
    layer.blocks.clear()
    layer.choice = None
    layer.skip.is_removed = True


def forget(module: nn.Module, optimizers: Iterable[Optimizer]) -> None:
    """Remove parameters that no longer belong to the module from the optimizers, with their state."""
    alive = {id(p) for p in module.parameters()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for p in group["params"]:
                if id(p) not in alive:
                    optimizer.state.pop(p, None)
            group["params"] = [p for p in group["params"] if id(p) in alive]
