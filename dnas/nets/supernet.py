"""The supernet: all networks of a space in one module, with a gate for every decision that is still open."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dnas.nets.bipath_block import PairGate, Prunode, pair_distributions
from dnas.nets.channels import ChannelAxis
from dnas.nets.gate import Gate
from dnas.nets.layer_choice import Answer, Answers, ChoiceGate, SkipGate, choice_distributions, skip_distributions
from dnas.nets.markov_gate import MarkovGate, chain_distributions
from dnas.nets.remove_options import forget, move_pair, narrow, remove_block, remove_layer
from dnas.runtime.distributed import to_host
from dnas.spec.cost import CostTable
from dnas.spec.space import Arch, Option, Space

# kind of gate -> the distributions of many gates at a temperature: one by one they would be thousands of operations
DISTRIBUTIONS: dict[type, Callable[[Sequence[Any], float], list[Tensor]]] = {
    MarkovGate: chain_distributions,
    PairGate: pair_distributions,
    ChoiceGate: choice_distributions,
    SkipGate: skip_distributions,
}


class Supernet(nn.Module):
    """All networks of a space in one module.

    ``forward(x, answers)`` runs any network of ``space``: ``answers`` maps each decision to an option (an `Arch` will
    do) or to the weights that its gate gives while the gates learn; see `widest`, `draw` and `soft`. There are two
    kinds: `dnas.nets.layer_supernet.MacroSupernet`, built of layers, and `dnas.nets.timm_supernet.TimmSupernet`, around
    a network of timm's.
    """

    outline: Any  # the plain data (a dataclass) that it was built from
    space: Space
    layers: nn.ModuleList  # of `StochasticLayer`, whose blocks and skips are searched; none in a network of timm's

    @property
    def name(self) -> str:
        """That of its outline."""
        return self.outline.name

    def forward(self, x: Tensor, answers: Answers) -> Tensor:
        """[B, in_chans, H, W] -> [B, num_classes]."""
        raise NotImplementedError

    def gates(self) -> dict[str, Gate]:
        """Decision -> its gate, for every decision that is still part of the net."""
        raise NotImplementedError

    def fit(self, optimizers: Sequence[Optimizer] = ()) -> None:
        """Cut every module, with its optimizer state, to what the live gates need (see `dnas.nets.shrink`)."""
        raise NotImplementedError

    def net_of(self, arch: Mapping[str, Option]) -> dict[str, Any]:
        """One network of the space as the plain data that `dnas.export.model_file.build_net` builds."""
        raise NotImplementedError

    def plain_state(self) -> dict[str, Tensor]:
        """The weights under the names of the plain network, once one is left (`dnas.nets.shrink.extract`)."""
        raise NotImplementedError

    def channel_axes(self) -> dict[str, list[ChannelAxis]]:
        """Width decision -> the tensor axes that hold its channels, in every layer that writes or reads them."""
        raise NotImplementedError

    @torch.no_grad()
    def reorder(self, orders: Mapping[str, Tensor]) -> None:
        """Permute the channels of widths: unit k becomes the one that was ``orders[decision][k]``.

        The networks that have all of these channels compute what they did. One that is narrower keeps the first ones,
        which are now others: so the weights of the best channels are kept. Only one block of each layer may be left,
        as blocks share tensors.
        """
        for name, axes in self.channel_axes().items():
            for axis in axes if name in orders else ():
                tensor: Tensor = getattr(axis.module, axis.name)
                places = torch.from_numpy(axis.places).to(tensor.device)
                index = torch.arange(tensor.shape[axis.dim], device=tensor.device)
                index[places.flatten()] = places[orders[name].to(tensor.device)].flatten()
                tensor.copy_(tensor.index_select(axis.dim, index))

    def tensors(self) -> list[Tensor]:
        """All parameters and buffers."""
        return [*self.parameters(), *self.buffers()]

    def gate_parameters(self) -> list[nn.Parameter]:
        return [p for gate in self.gates().values() for p in gate.parameters()]

    def weight_parameters(self) -> list[nn.Parameter]:
        of_gates = {id(p) for p in self.gate_parameters()}
        return [p for p in self.parameters() if id(p) not in of_gates]

    def probabilities(self, temperature: float = 1.0) -> dict[str, Tensor]:
        """Decision -> distribution over its original options, for every live decision."""
        gates = self.gates()
        found: dict[str, Tensor] = {}
        for kind, distributions in DISTRIBUTIONS.items():
            own = {name: gate for name, gate in gates.items() if isinstance(gate, kind)}
            if own:
                found |= dict(zip(own, distributions([*own.values()], temperature), strict=True))
        return {name: found[name] for name in gates}

    def probabilities_on_host(self, temperature: float = 1.0) -> dict[str, Tensor]:
        """The same in float64 on the CPU, differentiable: one copy for all gates, which is all that a GPU waits for."""
        found = self.probabilities(temperature)
        flat = to_host(torch.cat([p.double() for p in found.values()]))
        return dict(zip(found, flat.split([len(p) for p in found.values()]), strict=True))

    @torch.no_grad()
    def seen(self, temperature: float = 1.0) -> dict[str, np.ndarray]:
        """The same as arrays, for drawing and cutting."""
        return {name: p.detach().numpy() for name, p in self.probabilities_on_host(temperature).items()}

    def soft(
        self, generator: torch.Generator | None = None, paths: int = 0, temperature: float = 1.0,
        p: Mapping[str, np.ndarray] | None = None, with_scale: bool = False,
    ) -> dict[str, Answer]:  # fmt: skip
        """What the net is multiplied by while the gates learn; ``paths`` blocks a layer (0: all live ones).

        ``p``: what `seen` gives, where it has been read already. ``with_scale``: see `MarkovGate.soft`.
        """
        p = self.seen(temperature) if p is None else p
        answers: dict[str, Answer] = {}
        for name, gate in self.gates().items():
            if gate.settled:
                answers[name] = gate.widest()
            elif isinstance(gate, ChoiceGate):
                answers[name] = gate.soft(temperature, generator, paths, p[name])
            elif isinstance(gate, PairGate):
                answers[name] = gate.soft(temperature, generator)
            elif isinstance(gate, SkipGate):
                answers[name] = gate.coefficient(temperature)
            else:
                answers[name] = gate.soft(temperature, with_scale)
        return answers

    def draw(
        self, generator: torch.Generator | None = None, uniform: bool = False, temperature: float = 1.0
    ) -> dict[str, Answer]:
        """One hard network, by the gates' probabilities or evenly over what is alive."""
        gates, p = self.gates(), {} if uniform else self.seen(temperature)
        draws = torch.rand(len(gates), generator=generator, dtype=torch.float64).numpy()
        nothing = np.empty(0)
        return {n: g.pick(p.get(n, nothing), u, uniform) for (n, g), u in zip(gates.items(), draws, strict=True)}

    def widest(self, generator: torch.Generator | None = None, temperature: float = 1.0) -> dict[str, Answer]:
        """Every live width at its widest, every live layer in; blocks are drawn by their probabilities."""
        return self._end(Gate.widest, generator, temperature)

    def narrowest(self, generator: torch.Generator | None = None, temperature: float = 1.0) -> dict[str, Answer]:
        """Every live width at its narrowest, every layer out that may go by now; blocks are drawn as in `widest`."""
        return self._end(Gate.narrowest, generator, temperature)

    def _end(
        self, end: Callable[[Gate], Option], generator: torch.Generator | None, temperature: float
    ) -> dict[str, Answer]:
        gates = self.gates()
        answers: dict[str, Answer] = {name: end(gate) for name, gate in gates.items()}
        choices = {name: gate for name, gate in gates.items() if isinstance(gate, ChoiceGate) and not gate.settled}
        if choices:
            p = self.seen(temperature)
            draws = torch.rand(len(choices), generator=generator, dtype=torch.float64).numpy()
            answers |= {n: g.pick(p[n], u) for (n, g), u in zip(choices.items(), draws, strict=True)}
        return answers

    def live_options(self) -> dict[str, list[int]]:
        """Decision -> indices of the options that the search can still end with."""
        live = {d.name: list(range(len(d.options))) for d in self.space.decisions}
        return live | {name: gate.reachable() for name, gate in self.gates().items()}

    def best(self) -> Arch:
        """The most likely option of every decision, whatever it costs."""
        fallback = {d.name: d.options[0] for d in self.space.decisions}
        return self.space.complete(fallback | {name: gate.best() for name, gate in self.gates().items()})

    def live_cost(self, table: CostTable) -> float:
        """Cost of the dearest network that is physically there: of its live widths, blocks and layers."""
        return table.of(table.extremes(self.present_options())[1])

    def present_options(self) -> dict[str, list[int]]:
        """Decision -> indices of the options whose weights are physically there; a pair may still move beyond its."""
        live = self.live_options()
        return live | {name: [k for k in live[name] if k <= gate.live()[-1]] for name, gate in self.gates().items()}

    def structure(self) -> dict[str, list[int]]:
        """Decision -> indices of the options that are physically there, of a pair of widths those two; see `cut_to`."""
        pairs = {name: gate.live() for name, gate in self.gates().items() if isinstance(gate, PairGate)}
        return self.live_options() | pairs

    def cut_to(self, left: Mapping[str, Sequence[int]], optimizers: Sequence[Optimizer] = ()) -> None:
        """Cut the supernet down until only the options ``left`` (decision -> indices) are there."""
        by_name = self.space.by_name
        for layer in self.layers:
            if layer.skip is not None and not layer.skip.is_removed and list(left[f"{layer.name}/keep"]) == [0]:
                remove_layer(layer)
            if layer.choice is not None:
                stay = {by_name[f"{layer.name}/block"].options[k] for k in left[f"{layer.name}/block"]}
                for name in [n for n in layer.blocks if n not in stay]:
                    remove_block(layer, name, optimizers)
            for block in layer.blocks.values():
                if isinstance(block, Prunode):
                    move_pair(block, left[block.mid][0], left[block.mid][-1], optimizers)
        for name, gate in self.gates().items():
            if isinstance(gate, MarkovGate):
                narrow(gate, gate.widths[left[name][-1]], optimizers)
        self.fit(optimizers)
        forget(self, optimizers)

    # What is left, beside the tensors: with it `load_state_dict` restores a supernet that has been cut, whole.

    def get_extra_state(self) -> dict[str, Any]:
        """Plain data: see `structure`; which skips are open; what gates remember of the steps before."""
        gates = self.gates()
        return {
            "structure": self.structure(),
            "open": [name for name, gate in gates.items() if isinstance(gate, SkipGate) and gate.is_open],
            "idle": {name: list(gate.idle) for name, gate in gates.items() if isinstance(gate, MarkovGate)},
            "average": {name: gate.average for name, gate in gates.items() if isinstance(gate, PairGate)},
        }

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Cut to the structure of ``state``, of which this supernet must have all options left."""
        self.cut_to(state["structure"])
        for name, gate in self.gates().items():
            if isinstance(gate, SkipGate):
                gate.is_open = name in state["open"]
            elif isinstance(gate, MarkovGate):
                gate.idle = list(state["idle"][name])
            elif isinstance(gate, PairGate):
                gate.average = state["average"][name]
