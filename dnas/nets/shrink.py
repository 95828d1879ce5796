"""Cut unlikely options off a supernet for good, together with their optimizer state, while it trains."""

import copy
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from scipy.special import expit, logit
from torch import Tensor
from torch.optim import Optimizer

from dnas.nets.bipath_block import PairGate, Prunode
from dnas.nets.markov_gate import MarkovGate
from dnas.nets.remove_options import forget, move_pair, narrow, remove_block, remove_layer
from dnas.nets.supernet import Supernet
from dnas.spec.space import Arch, Option


def cut_width(net: Supernet, name: str, width: int, optimizers: Sequence[Optimizer] = ()) -> None:
    """Leave a Markov gate only its widths up to ``width``. Call `net.fit` after it.

    Raises ValueError if ``width`` is not a live width.
    """
    gate = net.gates()[name]
    assert isinstance(gate, MarkovGate)
    if width not in gate.widths:
        raise ValueError(f"{name} has the live widths {gate.widths}, not {width}")
    narrow(gate, width, optimizers)


def moved_pair(gate: PairGate, p: np.ndarray, temperature: float, threshold: float) -> tuple[int, int] | None:
    """Where a pair moves by `PairGate.update`; None if it stays.

    ``p`` has the probabilities at ``temperature``; the rule gets them converted to temperature 1.
    """
    if gate.settled:
        return None
    large = float(np.clip(p[gate.high], 1e-12, 1 - 1e-12))
    return gate.update(float(expit(temperature * logit(large))), threshold)


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
    temperature: float = 1.0,
) -> list[dict]:
    """Remove blocks, layers and widths after a gate step, and move pairs. Returns one record for each event.

    * A block is removed if its softmax without noise is below ``block_below``.
    * A layer is removed if its coefficient is below ``layer_below``.
    * A chain group of a Markov gate, except the first, is removed if its marginal has been below ``width_below`` for
      ``patience`` steps in a row.
    * A pair moves as `PairGate.update` says, with the threshold ``move_above``.

    Nothing is removed that the budget may still need: ``may_end_with(live options)`` is asked first.
    """
    events: list[dict] = []
    p = net.seen(temperature)

    def allowed(name: str, options: Sequence[int]) -> bool:
        return may_end_with(net.live_options() | {name: list(options)})

    for layer in net.layers:
        skip, choice = layer.skip, layer.choice
        low = skip is not None and not skip.settled and p[f"{layer.name}/keep"][1] < layer_below
        if low and allowed(f"{layer.name}/keep", [0]):
            remove_layer(layer)
            events.append({"layer": layer.name})
            continue
        if choice is not None:
            for name in choice.below(block_below, p[f"{layer.name}/block"]):
                rest = [k for k in choice.alive if choice.options[k] != name]
                if allowed(f"{layer.name}/block", rest):
                    remove_block(layer, name, optimizers)
                    events.append({"block": f"{layer.name}/{name}"})
        for block in layer.blocks.values():
            if isinstance(block, Prunode) and (moved := moved_pair(block.gate, p[block.mid], temperature, move_above)):
                move_pair(block, *moved, optimizers)
                events.append({"pair": block.mid, "widths": [block.gate.small, block.gate.large]})
    for name, gate in net.gates().items():
        if isinstance(gate, MarkovGate) and len(gate.widths) > 1:
            marginals = p[name][::-1].cumsum()[::-1][1 : len(gate.widths)]  # they never rise: low ones are at the end
            gate.idle = [k + 1 if low else 0 for k, low in zip(gate.idle, marginals < width_below, strict=True)]
            alive = 1 + sum(k < patience for k in gate.idle)
            if alive < len(gate.widths) and allowed(name, range(alive)):
                cut_width(net, name, gate.widths[alive - 1], optimizers)
                events.append({"width": name, "channels": gate.widths[-1]})
    if events:
        net.fit(optimizers)
        forget(net, optimizers)
    return events


def extract(net: Supernet, arch: Mapping[str, Option]) -> Supernet:
    """A copy of the supernet, cut to one arch: one block in each layer, every width fixed."""
    net = copy.deepcopy(net)
    by_name = net.space.by_name
    net.cut_to(net.structure() | {name: [by_name[name].index(option)] for name, option in arch.items()})
    return net


def plain_state(net: Supernet, arch: Arch) -> dict[str, Tensor]:
    """The weights of one arch from a supernet, under the names of the plain network."""
    return extract(net, arch).plain_state()


def has_weights_of(net: Supernet, arch: Arch) -> bool:
    """Whether the supernet still has all weights of this arch."""
    present, by_name = net.present_options(), net.space.by_name
    return all(by_name[name].index(option) in present[name] for name, option in arch.items())
