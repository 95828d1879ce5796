"""The Markov width gate (DMCP), as pure functions of logits."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn

from dnas.nets.gate import Gate, split_like


def marginals(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Keep-probabilities of the groups of a Markov chain, [G] logits -> [G + 1], the first one 1.

    ``P(s_k) = prod_{i <= k} sigmoid(logit_i / temperature)`` (DMCP, eq. 5; the paper has no temperature). Computed in
    logarithms: a product of 40 small factors would underflow in half precision.
    """
    return torch.cat([logits.new_ones(1), torch.cumsum(nn.functional.logsigmoid(logits / temperature), 0).exp()])


def without_scale(factor: Tensor) -> Tensor:
    """``factor`` in value; in gradient without its part along ``factor``, a change that scales all of it alike."""
    norm = torch.linalg.vector_norm(factor)
    return factor * (norm.detach() / norm)


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


def chain_distributions(gates: Sequence["MarkovGate"], temperature: float = 1.0) -> list[Tensor]:
    """Distributions over the original options, [num_options] each: a few operations on all gates, not a few on each."""
    device, sizes = gates[0].alpha.device, tuple((len(g.alpha), len(g.options)) for g in gates)
    begins, links, firsts, options = (places.to(device) for places in _places(sizes))
    cooled = torch.cat([g.alpha for g in gates]).double() / temperature
    logs = nn.functional.pad(nn.functional.logsigmoid(cooled).cumsum(0), (1, 0))
    keep = (logs[1:] - logs[begins]).exp()
    slots = keep.new_zeros(sum(n + 1 for _, n in sizes)).index_fill(0, firsts, 1.0).index_copy(0, links, keep)
    stops = (slots[options] - slots[options + 1]).to(gates[0].alpha.dtype)
    return split_like(stops, gates)


class MarkovGate(Gate):
    """DMCP's gate over a grid of widths (Guo et al., CVPR 2020): group k stays only if group k-1 does.

    ``alpha`` holds a logit a group beyond the first, which always stays. Deviations from the paper: widths lie on any
    ascending grid; ``alpha`` starts so that the last group has the marginal ``survival`` whatever the number of groups
    (with the paper's 9 groups, 0.9 is alpha = +4.4; its alpha = 0 would start a search at 5 % of the dense FLOPs); a
    temperature sharpens the chain towards the end of a search.
    """

    def __init__(self, widths: Sequence[int], survival: float = 0.9) -> None:
        super().__init__()
        self.options = tuple(widths)
        self.widths = list(widths)  # the live ones; cutting shortens this list, alpha and idle
        p = torch.tensor(survival, dtype=torch.float64) ** (1 / max(1, len(widths) - 1))
        self.alpha = nn.Parameter(torch.logit(p).float().repeat(len(widths) - 1))
        # for how many gate steps in a row the marginal of each group beyond the first has been too low to live
        self.idle = [0] * (len(widths) - 1)

    def live(self) -> list[int]:
        """The first ones of the grid."""
        return list(range(len(self.widths)))

    def keep(self, temperature: float = 1.0) -> Tensor:
        """Marginal keep-probability of every live group, [live]."""
        return marginals(self.alpha, temperature)

    def probabilities(self, temperature: float = 1.0) -> Tensor:
        """[number of options], zero for the widths that were cut off."""
        return chain_distributions([self], temperature)[0]

    def soft(self, temperature: float = 1.0, with_scale: bool = False) -> Tensor:
        """The factor of every channel, [widest live width]: the marginal of its group.

        Deviation from the paper: the gradient leaves out the scale that all channels share (`without_scale`), unless
        asked for. Soft factors below 1 also shrink the scale of activations, which a narrower width would not. Readers
        without a norm, above all the classifier, would widen the stream to regain scale.
        """
        sizes = torch.tensor([self.widths[0], *(b - a for a, b in zip(self.widths, self.widths[1:], strict=False))])
        sizes = sizes.to(self.alpha.device)
        factor = torch.repeat_interleave(self.keep(temperature), sizes, output_size=self.widths[-1])
        return factor if with_scale else without_scale(factor)
