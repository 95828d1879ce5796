"""The supernet: all networks of a space in one module, with a gate for every decision that is still open."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dnas.nets.bipath_block import PairGate, Prunode, pair_distributions
from dnas.nets.channels import ChannelAxis
from dnas.nets.layer_choice import Answer, Answers, ChoiceGate, SkipGate, choice_distributions, skip_distributions
from dnas.nets.markov_gate import MarkovGate, chain_distributions
from dnas.nets.surgery import forget, move_pair, narrow, remove_block, remove_layer
from dnas.spec.cost import CostTable
from dnas.spec.space import DROP, KEEP, Arch, Option, Space

Gate = MarkovGate | PairGate | ChoiceGate | SkipGate
DISTRIBUTIONS: dict[type, Callable[[Sequence[Any]], list[Tensor]]] = {
    MarkovGate: chain_distributions,
    PairGate: pair_distributions,
    ChoiceGate: choice_distributions,
    SkipGate: skip_distributions,
}


class Supernet(nn.Module):
    """What the search, the surgery and the derivation know of a supernet.

    ``forward(x, answers)`` runs any network of ``space``: ``answers`` maps each decision to an option (an `Arch` will
    do) or to the weights that its gate gives while the gates learn; see `widest`, `draw` and `soft`. There are two
    kinds: `dnas.nets.macro.MacroSupernet`, built of layers, and `dnas.nets.timm_net.TimmSupernet`, around a network
    of timm's.
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

    def tensors(self) -> list[Tensor]:
        """All parameters and buffers."""
        return [*self.parameters(), *self.buffers()]

    def gate_parameters(self) -> list[nn.Parameter]:
        return [p for gate in self.gates().values() for p in gate.parameters()]

    def weight_parameters(self) -> list[nn.Parameter]:
        of_gates = {id(p) for p in self.gate_parameters()}
        return [p for p in self.parameters() if id(p) not in of_gates]

    def probabilities(self) -> dict[str, Tensor]:
        """Decision -> distribution over its original options, for every live decision.

        All gates of a kind at once: one by one they would be thousands of small operations.
        """
        gates = self.gates()
        found: dict[str, Tensor] = {}
        for kind, distributions in DISTRIBUTIONS.items():
            own = {name: gate for name, gate in gates.items() if isinstance(gate, kind)}
            if own:
                found |= dict(zip(own, distributions([*own.values()]), strict=True))
        return {name: found[name] for name in gates}

    def soft(self, generator: torch.Generator | None = None, paths: int = 0) -> dict[str, Answer]:
        """What the net is multiplied by while the gates learn; ``paths`` blocks a layer (0: all live ones)."""
        answers: dict[str, Answer] = {}
        for name, gate in self.gates().items():
            if isinstance(gate, ChoiceGate):
                answers[name] = gate.soft(generator, paths)
            elif isinstance(gate, MarkovGate) and len(gate.widths) == 1:
                answers[name] = gate.widths[0]
            else:
                answers[name] = gate.soft(generator)
        return answers

    def draw(self, generator: torch.Generator | None = None, uniform: bool = False) -> dict[str, Answer]:
        """One hard network, by the gates' probabilities or evenly over what is alive."""
        return {name: gate.draw(generator, uniform) for name, gate in self.gates().items()}

    def widest(self, generator: torch.Generator | None = None) -> dict[str, Answer]:
        """Every live width at its widest, every live layer in; blocks are drawn by their probabilities."""
        answers: dict[str, Answer] = {}
        for name, gate in self.gates().items():
            if isinstance(gate, ChoiceGate):
                answers[name] = gate.draw(generator)
            elif isinstance(gate, SkipGate):
                answers[name] = DROP if gate.is_removed else KEEP
            else:
                answers[name] = gate.widths[-1] if isinstance(gate, MarkovGate) else gate.large
        return answers

    def narrowest(self, generator: torch.Generator | None = None) -> dict[str, Answer]:
        """Every live width at its narrowest, every layer out that may go by now; blocks are drawn as in `widest`."""
        answers = self.widest(generator)
        for name, gate in self.gates().items():
            if isinstance(gate, SkipGate):
                answers[name] = DROP if gate.is_open else KEEP
            elif not isinstance(gate, ChoiceGate):
                answers[name] = gate.widths[0] if isinstance(gate, MarkovGate) else gate.small
        return answers

    def live_options(self) -> dict[str, list[int]]:
        """Decision -> indices of the options that the search can still end with."""
        live = {d.name: list(range(len(d.options))) for d in self.space.decisions}
        for name, gate in self.gates().items():
            if isinstance(gate, MarkovGate):
                live[name] = live[name][: len(gate.widths)]
            elif isinstance(gate, ChoiceGate):
                live[name] = list(gate.live)
            elif isinstance(gate, SkipGate) and gate.is_removed:
                live[name] = [0]
        return live

    def best(self) -> Arch:
        """The most likely option of every decision, whatever it costs."""
        fallback = {d.name: d.options[0] for d in self.space.decisions}
        return self.space.complete(fallback | {name: gate.best() for name, gate in self.gates().items()})

    def live_cost(self, table: CostTable) -> float:
        """Cost of the dearest network that is physically there: of its live widths, blocks and layers."""
        live = self.live_options()
        for name, gate in self.gates().items():
            if isinstance(gate, PairGate):
                live[name] = live[name][: gate.high + 1]
        return table.of(table.extremes(live)[1])

    def structure(self) -> dict[str, list[int]]:
        """Decision -> indices of the options that are physically there, of a pair of widths those two; see `cut_to`."""
        pairs = {name: gate for name, gate in self.gates().items() if isinstance(gate, PairGate)}
        return self.live_options() | {name: sorted({gate.low, gate.high}) for name, gate in pairs.items()}

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
        """Plain data: see `structure`; which skips are open; the temperature of every gate."""
        gates = self.gates()
        return {
            "structure": self.structure(),
            "open": [name for name, gate in gates.items() if isinstance(gate, SkipGate) and gate.is_open],
            "temperature": {name: gate.temperature for name, gate in gates.items()},
        }

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Cut to the structure of ``state``, of which this supernet must have all options left."""
        self.cut_to(state["structure"])
        for name, gate in self.gates().items():
            gate.temperature = state["temperature"][name]
            if isinstance(gate, SkipGate):
                gate.is_open = name in state["open"]
