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
from dnas.nets.own_base import Own
from dnas.nets.remove_options import forget, move_pair, narrow, remove_block, remove_layer
from dnas.runtime.distributed import to_host
from dnas.spec.cost import CostTable
from dnas.spec.space import Arch, Option, Space

# kind of gate -> the distributions of many gates at a temperature; gate by gate it would be thousands of operations
DISTRIBUTIONS: dict[type, Callable[[Sequence[Any], float], list[Tensor]]] = {
    MarkovGate: chain_distributions,
    PairGate: pair_distributions,
    ChoiceGate: choice_distributions,
    SkipGate: skip_distributions,
}


class Supernet(nn.Module):
    """All networks of a space in one module.

    ``forward(x, answers)`` runs any network of ``space``. ``answers`` maps each decision to an option, as an `Arch`
    does. While the gates learn, it maps a decision to the weights that its gate gives; see `widest`, `draw` and `soft`.
    There are two kinds: `dnas.nets.layer_supernet.MacroSupernet` is built of layers,
    `dnas.nets.traced_supernet.TracedSupernet` is built around a network of timm's or the user's.
    """

    outline: Any  # the plain data (a dataclass) that it was built from
    own: Own | None = None  # what makes the network, if it is a user's own
    space: Space
    layers: nn.ModuleList  # `StochasticLayer` of a macro; of a traced network the `ResidualBlock`s that may be dropped

    @property
    def name(self) -> str:
        """The name of its outline."""
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
        """One network of the space as plain data, which `dnas.export.model_file.build_net` builds."""
        raise NotImplementedError

    def plain_state(self) -> dict[str, Tensor]:
        """The weights under the names of the plain network.

        Only one network may be left in the supernet (`dnas.nets.shrink.extract`).
        """
        raise NotImplementedError

    def channel_axes(self) -> dict[str, list[ChannelAxis]]:
        """Width decision -> the tensor axes that hold its channels, in every layer that writes or reads them."""
        raise NotImplementedError

    def layer_weights(self) -> dict[str, list[nn.Parameter]]:
        """Decision on whether a layer stays -> the weights of this layer; none if it is gone."""
        layers = [layer for layer in self.layers if layer.skip is not None]
        return {f"{layer.name}/keep": [p for p in layer.blocks.parameters() if p.ndim > 1] for layer in layers}

    @torch.no_grad()
    def reorder(self, orders: Mapping[str, Tensor], optimizers: Sequence[Optimizer] = ()) -> None:
        """Permute the channels of widths in place: unit k becomes the old unit ``orders[decision][k]``.

        Optimizer buffers with the shape of a parameter are permuted with it.

        A network with all of these channels computes the same as before. A narrower network keeps the first channels.
        So it keeps the weights of the best channels, if they are now the first. Only one block of each layer may be
        left, because blocks share tensors.
        """
        for name, axes in self.channel_axes().items():
            for axis in axes if name in orders else ():
                tensor: Tensor = getattr(axis.module, axis.name)
                places = torch.from_numpy(axis.places).to(tensor.device)
                index = torch.arange(tensor.shape[axis.dim], device=tensor.device)
                index[places.flatten()] = places[orders[name].to(tensor.device)].flatten()
                buffers = [t for o in optimizers for t in o.state.get(tensor, {}).values() if isinstance(t, Tensor)]
                for own in (tensor, *(t for t in buffers if t.shape == tensor.shape)):
                    own.copy_(own.index_select(axis.dim, index))

    def tensors(self) -> list[Tensor]:
        """All parameters and buffers."""
        return [*self.parameters(), *self.buffers()]

    def gate_parameters(self) -> list[nn.Parameter]:
        return [p for gate in self.gates().values() for p in gate.parameters()]

    def weight_parameters(self) -> list[nn.Parameter]:
        """The weights that learn: a network may come with parts that are frozen."""
        of_gates = {id(p) for p in self.gate_parameters()}
        return [p for p in self.parameters() if p.requires_grad and id(p) not in of_gates]

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
        """`probabilities` in float64 on the CPU, differentiable.

        All gates are copied in one piece, so that the CPU waits for a GPU only once.
        """
        found = self.probabilities(temperature)
        flat = to_host(torch.cat([p.double() for p in found.values()]))
        return dict(zip(found, flat.split([len(p) for p in found.values()]), strict=True))

    @torch.no_grad()
    def seen(self, temperature: float = 1.0) -> dict[str, np.ndarray]:
        """`probabilities` as arrays in float64, for draws and for cutting."""
        return {name: p.detach().numpy() for name, p in self.probabilities_on_host(temperature).items()}

    def soft(
        self, generator: torch.Generator | None = None, paths: int = 0, temperature: float = 1.0,
        p: Mapping[str, np.ndarray] | None = None, with_scale: bool = False,
    ) -> dict[str, Answer]:  # fmt: skip
        """The answers of the soft net that gates learn on: the weights of each gate, or its option if only one is live.

        ``paths`` is the number of blocks that are mixed in a layer (0: all live blocks). ``p`` is the result of `seen`,
        if it is known already. ``with_scale``: see `MarkovGate.soft`.
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
        """The answers of one hard network, drawn by the gates' probabilities, or evenly if ``uniform``."""
        gates, p = self.gates(), {} if uniform else self.seen(temperature)
        draws = torch.rand(len(gates), generator=generator, dtype=torch.float64).numpy()
        nothing = np.empty(0)
        return {n: g.pick(p.get(n, nothing), u, uniform) for (n, g), u in zip(gates.items(), draws, strict=True)}

    def widest(self, generator: torch.Generator | None = None, temperature: float = 1.0) -> dict[str, Answer]:
        """The answers with every live layer and the widest live option of every width.

        Blocks are drawn by their probabilities.
        """
        gates = self.gates()
        answers: dict[str, Answer] = {name: gate.widest() for name, gate in gates.items()}
        choices = {name: gate for name, gate in gates.items() if isinstance(gate, ChoiceGate) and not gate.settled}
        if choices:
            p = self.seen(temperature)
            draws = torch.rand(len(choices), generator=generator, dtype=torch.float64).numpy()
            answers |= {n: g.pick(p[n], u) for (n, g), u in zip(choices.items(), draws, strict=True)}
        return answers

    def live_options(self) -> dict[str, list[int]]:
        """Decision -> indices of the options that the search can still end with.

        A decision without a gate has all its options.
        """
        live = {d.name: list(range(len(d.options))) for d in self.space.decisions}
        return live | {name: gate.reachable() for name, gate in self.gates().items()}

    def best(self) -> Arch:
        """The arch of the most likely options, whatever it costs."""
        fallback = {d.name: d.options[0] for d in self.space.decisions}
        return self.space.complete(fallback | {name: gate.best() for name, gate in self.gates().items()})

    def live_cost(self, table: CostTable) -> float:
        """The cost of the most expensive network that is left: of live widths, blocks and layers."""
        return table.of(table.extremes(self.present_options())[1])

    def present_options(self) -> dict[str, list[int]]:
        """Decision -> indices of the options whose weights are there now.

        A pair of inner widths may still move to wider options.
        """
        live = self.live_options()
        return live | {name: [k for k in live[name] if k <= gate.live()[-1]] for name, gate in self.gates().items()}

    def structure(self) -> dict[str, list[int]]:
        """Decision -> indices of the options that are left, as `cut_to` takes them.

        The width of a bi-path block has only the options of its pair.
        """
        pairs = {name: gate.live() for name, gate in self.gates().items() if isinstance(gate, PairGate)}
        return self.live_options() | pairs

    def cut_to(self, left: Mapping[str, Sequence[int]], optimizers: Sequence[Optimizer] = ()) -> None:
        """Cut the supernet in place until only the options ``left`` (decision -> indices) remain."""
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

    # The extra state says what is left of the supernet, so that `load_state_dict` restores one that has been cut.

    def get_extra_state(self) -> dict[str, Any]:
        """Plain data: `structure`, the names of the open skips, and the numbers that gates keep from step to step."""
        gates = self.gates()
        return {
            "structure": self.structure(),
            "open": [name for name, gate in gates.items() if isinstance(gate, SkipGate) and gate.is_open],
            "idle": {name: list(gate.idle) for name, gate in gates.items() if isinstance(gate, MarkovGate)},
            "average": {name: gate.average for name, gate in gates.items() if isinstance(gate, PairGate)},
        }

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Cut to the structure of ``state``, and restore the numbers of the gates.

        This supernet must still have all options of the structure.
        """
        self.cut_to(state["structure"])
        for name, gate in self.gates().items():
            if isinstance(gate, SkipGate):
                gate.is_open = name in state["open"]
            elif isinstance(gate, MarkovGate):
                gate.idle = list(state["idle"][name])
            elif isinstance(gate, PairGate):
                gate.average = state["average"][name]
