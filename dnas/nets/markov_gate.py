"""The Markov width gate (DMCP) and the relaxations that all gates share, as pure functions of logits.

A gate answers one decision. Every gate has ``probabilities()``, the explicit distribution over the *original* options
(zero where an option was cut off), which is what the expected cost is taken over; ``soft(...)``, what the supernet
multiplies by while the gates learn; and ``draw(...)``, one hard answer while the weights learn.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn


def marginals(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Keep-probabilities of the groups of a Markov chain, [G] logits -> [G + 1], the first one 1.

    ``P(s_k) = prod_{i <= k} sigmoid(logit_i / temperature)`` (DMCP, eq. 5; the paper has no temperature). Computed in
    logarithms: a product of 40 small factors would underflow in half precision.
    """
    return torch.cat([logits.new_ones(1), torch.cumsum(nn.functional.logsigmoid(logits / temperature), 0).exp()])


def chain_distribution(keep: Tensor) -> Tensor:
    """Distribution of where the chain stops, ``P(width = k) = P(s_k) - P(s_{k+1})``, from `marginals`, [G + 1] each."""
    return keep - torch.cat([keep[1:], keep.new_zeros(1)])


def without_scale(factor: Tensor) -> Tensor:
    """``factor`` in value; in gradient without its part along ``factor``, a change that scales all of it alike."""
    norm = torch.linalg.vector_norm(factor)
    return factor * (norm.detach() / norm)


def gumbel_softmax(logits: Tensor, temperature: float, generator: torch.Generator | None = None) -> Tensor:
    """A relaxed one-hot sample, [N] -> [N]: ``softmax((logits + g) / temperature)`` with g ~ Gumbel(0, 1).

    As torch.nn.functional.gumbel_softmax, but with its own generator, so that a search can be repeated.
    """
    uniform = torch.rand(logits.shape, generator=generator, dtype=torch.float64)
    noise = -torch.log(-torch.log(uniform.clamp(1e-12, 1 - 1e-12)))
    return torch.softmax((logits + noise.to(logits)) / temperature, 0)


def draw_index(probabilities: Tensor, generator: torch.Generator | None = None) -> int:
    """One index drawn from [N] probabilities (on the CPU, where the generator lives)."""
    return int(torch.multinomial(probabilities.detach().double().cpu(), 1, generator=generator))


@lru_cache(maxsize=128)
def _places(sizes: tuple[tuple[int, int], ...]) -> tuple[Tensor, ...]:
    """Where the links of chains of (links, options) are, one chain after the other.

    Per link: where its chain begins among all links, and its place among the slots, of which a chain has one for each
    option and one more. Per chain: its first slot. Per option: its slot.
    """
    places: tuple[list[int], ...] = ([], [], [], [])
    begins, links, firsts, options = places
    link, slot = 0, 0
    for count, of_all in sizes:
        begins += [link] * count
        links += range(slot + 1, slot + 1 + count)
        firsts.append(slot)
        options += range(slot, slot + of_all)
        link, slot = link + count, slot + of_all + 1
    return tuple(torch.tensor(own, dtype=torch.long) for own in places)


def chain_distributions(gates: Sequence["MarkovGate"]) -> list[Tensor]:
    """Distributions over the original options, [num_options] each: a few operations on all gates, not a few on each."""
    device, sizes = gates[0].alpha.device, tuple((len(g.alpha), g.num_options) for g in gates)
    begins, links, firsts, options = (places.to(device) for places in _places(sizes))
    cooling = np.repeat([1 / g.temperature for g in gates], [links for links, _ in sizes])
    cooled = torch.cat([g.alpha for g in gates]) * torch.from_numpy(cooling).to(device)
    logs = nn.functional.pad(nn.functional.logsigmoid(cooled).cumsum(0), (1, 0))
    keep = (logs[1:] - logs[begins]).exp()
    slots = keep.new_zeros(sum(n + 1 for _, n in sizes)).index_fill(0, firsts, 1.0).index_copy(0, links, keep)
    stops = (slots[options] - slots[options + 1]).to(gates[0].alpha.dtype)
    return list(stops.split([n for _, n in sizes]))


class MarkovGate(nn.Module):
    """DMCP's gate over a grid of widths (Guo et al., CVPR 2020): group k stays only if group k-1 does.

    ``alpha`` holds a logit a group beyond the first, which always stays. Deviations from the paper: widths lie on any
    ascending grid; ``alpha`` starts so that the last group has the marginal ``survival`` whatever the number of groups
    (with the paper's 9 groups, 0.9 is alpha = +4.4; its alpha = 0 would start a search at 5 % of the dense FLOPs); a
    temperature sharpens the chain towards the end of a search.
    """

    def __init__(self, widths: Sequence[int], survival: float = 0.9) -> None:
        super().__init__()
        self.widths = list(widths)  # the live ones; cutting shortens this list and alpha
        self.num_options = len(widths)
        self.temperature = 1.0
        p = torch.tensor(survival, dtype=torch.float64) ** (1 / max(1, len(widths) - 1))
        self.alpha = nn.Parameter(torch.logit(p).float().repeat(len(widths) - 1))
        # for how many gate steps in a row the marginal of each group beyond the first has been too low to live
        self.register_buffer("idle", torch.zeros(len(widths) - 1, dtype=torch.long))

    def keep(self) -> Tensor:
        """Marginal keep-probability of every live group, [live]."""
        return marginals(self.alpha, self.temperature)

    def probabilities(self) -> Tensor:
        """[number of options], zero for the widths that were cut off."""
        return chain_distributions([self])[0]

    def soft(self, generator: torch.Generator | None = None) -> Tensor:
        """The factor of every channel, [widest live width]: the marginal of its group.

        Deviation from the paper: the gradient leaves out the scale that all channels share (`without_scale`). A narrow
        network is not a quiet one, but soft factors make it so, and what is read with no norm behind it, above all by
        the classifier, would ask for width only to be louder.
        """
        sizes = torch.tensor([self.widths[0], *(b - a for a, b in zip(self.widths, self.widths[1:], strict=False))])
        return without_scale(
            torch.repeat_interleave(self.keep(), sizes.to(self.alpha.device), output_size=self.widths[-1])
        )

    def draw(self, generator: torch.Generator | None = None, uniform: bool = False) -> int:
        """A width: by the chain (the paper's direct sampling), or any live one with equal probability."""
        live = chain_distribution(self.keep())
        return self.widths[draw_index(torch.ones_like(live) if uniform else live, generator)]

    def best(self) -> int:
        """The most likely width."""
        return self.widths[int(chain_distribution(self.keep()).argmax())]
