"""The supernet: all networks of a space in one module, with a gate for every decision that is still open."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dnas.nets.bipath_block import PairGate, pair_distributions
from dnas.nets.layer_choice import Answer, Answers, ChoiceGate, SkipGate, choice_distributions, skip_distributions
from dnas.nets.markov_gate import MarkovGate, chain_distributions
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
