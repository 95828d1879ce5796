"""Cut dead parts off a supernet for good, together with their optimizer state, while it trains."""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dnas.nets.bipath_block import PairGate, Prunode, parts
from dnas.nets.layer_choice import StochasticLayer
from dnas.nets.markov_gate import MarkovGate
from dnas.nets.resize import resize_tensor
from dnas.nets.supernet import Supernet
from dnas.spec.space import Arch, Option


def cut_width(net: Supernet, name: str, width: int, optimizers: Sequence[Optimizer] = ()) -> None:
    """Leave a Markov gate only its widths up to ``width``. ValueError if it is not a live one. Call `net.fit` after."""
    gate = net.gates()[name]
    assert isinstance(gate, MarkovGate)
    if width not in gate.widths:
        raise ValueError(f"{name} has the live widths {gate.widths}, not {width}")
    gate.widths = gate.widths[: gate.widths.index(width) + 1]
    resize_tensor(gate, "alpha", 0, len(gate.widths) - 1, optimizers)
    gate.idle = gate.idle[: len(gate.widths) - 1].clone()


def move_pair(block: Prunode, low: int, high: int, optimizers: Sequence[Optimizer] = ()) -> None:
    """Set a bi-path block's pair to the grid indices ``low <= high``. Call `net.fit` after.

    A copy that slid into the other one's width takes over its last norm, optimizer state included; the copy that is new
    there starts as the other one does. The logits' optimizer state starts anew.
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


def _forget(net: Supernet, optimizers: Iterable[Optimizer]) -> None:
    """Take parameters that are no longer the net's out of the optimizers, with their state."""
    alive = {id(p) for p in net.parameters()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for p in group["params"]:
                if id(p) not in alive:
                    optimizer.state.pop(p, None)
            group["params"] = [p for p in group["params"] if id(p) in alive]


def remove_block(layer: StochasticLayer, name: str, optimizers: Sequence[Optimizer] = ()) -> None:
    """Delete one candidate of a layer for good. ValueError if it is the last. Call `net.fit` after."""
    choice = layer.choice
    if choice is None or len(choice.live) < 2:
        raise ValueError(f"{layer.name}: {name} is the only block left")
    gone = choice.live.index(choice.options.index(name))
    del layer.blocks[name]
    # The logit moves out of the vector: the ones behind it close up, in the optimizer's buffers too.
    keep = [k for k in range(len(choice.live)) if k != gone]
    for tensor in (choice.logits.data, *_buffers_like(choice.logits, optimizers)):
        tensor[: len(keep)] = tensor[keep].clone()
    choice.live = [choice.live[k] for k in keep]
    resize_tensor(choice, "logits", 0, len(keep), optimizers)


def _buffers_like(parameter: nn.Parameter, optimizers: Iterable[Optimizer]) -> list[Tensor]:
    values = [v for o in optimizers for v in o.state.get(parameter, {}).values() if isinstance(v, Tensor)]
    return [v for v in values if v.shape == parameter.shape]


def remove_layer(layer: StochasticLayer) -> None:
    """Drop a residual layer for good: its input is its output. ValueError if it may not go. Call `net.fit` after."""
    if layer.skip is None:
        raise ValueError(f"{layer.name} cannot be dropped")
    layer.blocks.clear()
    layer.choice = None
    layer.skip.is_removed = True


def shrink(
    net: Supernet,
    optimizers: Sequence[Optimizer],
    may_end_with: Callable[[Mapping[str, Sequence[int]]], bool],
    *,
    move_above: float,
    block_below: float,
    layer_below: float,
    width_below: float,
    patience: int,
) -> list[dict]:
    """All three tiers of pruning after a step of the gates; returns what happened, one record an event.

    Blocks whose clean softmax is under ``block_below`` and layers whose coefficient is under ``layer_below`` go, and
    every channel group of a Markov gate beyond the first whose marginal has been under ``width_below`` for
    ``patience`` steps in a row; pairs move as `PairGate.update` says. Nothing goes that the budget might still need:
    ``may_end_with(live options)`` is asked first.
    """
    events: list[dict] = []

    def allowed(name: str, options: Sequence[int]) -> bool:
        return may_end_with(net.live_options() | {name: list(options)})

    for layer in net.layers:
        skip, choice = layer.skip, layer.choice
        open_skip = skip is not None and skip.is_open and not skip.is_removed
        low = open_skip and float(skip.coefficient().detach()) < layer_below
        if low and allowed(f"{layer.name}/keep", [0]):
            remove_layer(layer)
            events.append({"layer": layer.name})
            continue
        if choice is not None:
            for name in choice.below(block_below):
                rest = [k for k in choice.live if choice.options[k] != name]
                if allowed(f"{layer.name}/block", rest):
                    remove_block(layer, name, optimizers)
                    events.append({"block": f"{layer.name}/{name}"})
        for block in layer.blocks.values():
            moved = block.gate.update(move_above) if isinstance(block, Prunode) else None
            if moved:
                move_pair(block, *moved, optimizers)
                events.append({"pair": block.mid, "widths": [block.gate.small, block.gate.large]})
    for name, gate in net.gates().items():
        if isinstance(gate, MarkovGate) and len(gate.widths) > 1:
            low = gate.keep().detach()[1:] < width_below  # marginals only fall along the chain: the dead are its tail
            gate.idle = torch.where(low, gate.idle + 1, 0)
            alive = 1 + int((gate.idle < patience).sum())
            if alive < len(gate.widths) and allowed(name, range(alive)):
                cut_width(net, name, gate.widths[alive - 1], optimizers)
                events.append({"width": name, "channels": gate.widths[-1]})
    if events:
        net.fit(optimizers)
        _forget(net, optimizers)
    return events


def standing(net: Supernet) -> dict[str, list[int]]:
    """Decision -> indices of the options that are physically there, of a pair of widths those two; see `cut_to`."""
    pairs = {name: gate for name, gate in net.gates().items() if isinstance(gate, PairGate)}
    return net.live_options() | {name: sorted({gate.low, gate.high}) for name, gate in pairs.items()}


def cut_to(net: Supernet, left: Mapping[str, Sequence[int]], optimizers: Sequence[Optimizer] = ()) -> None:
    """Cut the supernet down until only the options ``left`` (decision -> indices) are there."""
    by_name = net.space.by_name
    for layer in net.layers:
        if layer.skip is not None and not layer.skip.is_removed and list(left[f"{layer.name}/keep"]) == [0]:
            remove_layer(layer)
        if layer.choice is not None:
            stay = {by_name[f"{layer.name}/block"].options[k] for k in left[f"{layer.name}/block"]}
            for name in [n for n in layer.blocks if n not in stay]:
                remove_block(layer, name, optimizers)
        for block in layer.blocks.values():
            if isinstance(block, Prunode):
                move_pair(block, left[block.mid][0], left[block.mid][-1], optimizers)
    for name, gate in net.gates().items():
        if isinstance(gate, MarkovGate):
            cut_width(net, name, gate.widths[left[name][-1]], optimizers)
    net.fit(optimizers)
    _forget(net, optimizers)


def extract(net: Supernet, arch: Mapping[str, Option]) -> Supernet:
    """A copy of the supernet cut down to one architecture: one block a layer, every width fixed."""
    net = copy.deepcopy(net)
    by_name = net.space.by_name
    cut_to(net, standing(net) | {name: [by_name[name].index(option)] for name, option in arch.items()})
    return net


def plain_state(net: Supernet, arch: Arch) -> dict[str, Tensor]:
    """The weights of one architecture, from a supernet, under the names of the plain network."""
    return extract(net, arch).plain_state()
