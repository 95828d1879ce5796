"""The base class of all gates. A gate is a decision that is still open, with a distribution over its options.

Probabilities are given for all *original* options, and are 0 for options that were cut off. The expected cost is taken
over this distribution. The temperature is always an argument, because it belongs to the search and not to the gate.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from dnas.spec.space import Option


class Gate(nn.Module):
    """A decision with learned probabilities of ``options``. Subclasses say which options are live and how likely."""

    options: tuple[Option, ...]

    def live(self) -> list[int]:
        """Indices of the options that the network can have now, ascending."""
        raise NotImplementedError

    def reachable(self) -> list[int]:
        """Indices of the options that the search can still end with."""
        return self.live()

    @property
    def settled(self) -> bool:
        """Whether only one option is live. Then nothing can be learnt now."""
        return len(self.live()) == 1

    def widest(self) -> Option:
        """The last live option: the widest width, or that the layer stays."""
        return self.options[self.live()[-1]]

    def probabilities(self, temperature: float = 1.0) -> Tensor:
        """[number of options]. `dnas.nets.supernet.Supernet.probabilities` computes those of many gates at once."""
        raise NotImplementedError

    def pick(self, p: np.ndarray, draw: float, even: bool = False) -> Option:
        """The live option for ``draw``, a number in [0, 1): by the probabilities ``p``, or evenly if ``even``."""
        live = self.live()
        if even:
            return self.options[live[int(draw * len(live))]]
        reached = np.cumsum(p[live])
        return self.options[live[min(int(np.searchsorted(reached, draw * reached[-1], "right")), len(live) - 1)]]

    @torch.no_grad()
    def draw(self, generator: torch.Generator | None = None, uniform: bool = False, temperature: float = 1.0) -> Option:
        """One live option, drawn by the probabilities, or evenly if ``uniform``."""
        draw = torch.rand((), generator=generator, dtype=torch.float64).item()
        return self.pick(self.probabilities(temperature).double().cpu().numpy(), draw, uniform)

    @torch.no_grad()
    def best(self) -> Option:
        """The most likely option. Of equally likely options it is the last."""
        p = self.probabilities().double().cpu().numpy()
        return self.options[int(np.flatnonzero(p == p.max())[-1])]


def gumbel(count: int, generator: torch.Generator | None = None) -> Tensor:
    """[count] random numbers of the Gumbel(0, 1) distribution: float64, on the CPU, as the generator is on the CPU."""
    uniform = torch.rand(count, generator=generator, dtype=torch.float64)
    return -torch.log(-torch.log(uniform.clamp(1e-12, 1 - 1e-12)))


def gumbel_softmax(logits: Tensor, temperature: float, generator: torch.Generator | None = None) -> Tensor:
    """A relaxed one-hot sample, [N] -> [N]: ``softmax((logits + g) / temperature)`` with g ~ Gumbel(0, 1).

    As torch.nn.functional.gumbel_softmax, but with a generator of its own, so that a search can be repeated.
    """
    return torch.softmax((logits + gumbel(len(logits), generator).to(logits)) / temperature, 0)


def split_like(flat: Tensor, gates: Sequence[Gate]) -> list[Tensor]:
    """[all options of all gates] -> [number of options] of each gate."""
    return list(flat.split([len(g.options) for g in gates]))
