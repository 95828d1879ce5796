"""The Markov width gate (DMCP), and the functions of logits that it uses."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn

from dnas.nets.gate import Gate, split_like


def marginals(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """The probabilities that the chain groups of a Markov gate stay: [G] logits -> [G + 1]. The first one is 1.

    ``P(s_k) = prod_{i <= k} sigmoid(logit_i / temperature)`` (DMCP, eq. 5; the paper has no temperature). The product
    is computed in logarithms, because a product of 40 small factors would underflow in half precision.
    """
    return torch.cat([logits.new_ones(1), torch.cumsum(nn.functional.logsigmoid(logits / temperature), 0).exp()])


def without_scale(factor: Tensor) -> Tensor:
    """``factor`` with an unchanged value. Its gradient has no component along ``factor``.

    This component would scale all entries of ``factor`` alike.
    """
    norm = torch.linalg.vector_norm(factor)
    return factor * (norm.detach() / norm)


@lru_cache(maxsize=128)
def _places(sizes: tuple[tuple[int, int], ...]) -> tuple[Tensor, ...]:
    """The places of several chains in flat vectors, from (number of links, number of options) of each chain.

    The chains follow each other. A chain has one slot for each option, and one more. Returns four vectors of indices:
    for each link the first link of its chain; for each link its slot; for each chain its first slot; for each option
    its slot.
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
    """The distributions of all gates over their original options, [number of options] each.

    A few operations compute all gates together, instead of a few operations for each gate.
    """
    device, sizes = gates[0].alpha.device, tuple((len(g.alpha), len(g.options)) for g in gates)
    begins, links, firsts, options = (places.to(device) for places in _places(sizes))
    cooled = torch.cat([g.alpha for g in gates]).double() / temperature
    logs = nn.functional.pad(nn.functional.logsigmoid(cooled).cumsum(0), (1, 0))
    keep = (logs[1:] - logs[begins]).exp()
    slots = keep.new_zeros(sum(n + 1 for _, n in sizes)).index_fill(0, firsts, 1.0).index_copy(0, links, keep)
    stops = (slots[options] - slots[options + 1]).to(gates[0].alpha.dtype)
    return split_like(stops, gates)


class MarkovGate(Gate):
    """DMCP's gate over a grid of widths (Guo et al., CVPR 2020): chain group k stays only if chain group k-1 stays.

    ``alpha`` holds one logit for each chain group except the first, which always stays. Deviations from the paper:

    * Widths lie on any ascending grid.
    * ``alpha`` starts so that the marginal of the last chain group is ``survival``, for any number of chain groups. For
      0.9 and 9 logits, as in the paper, this is alpha = +4.4. DMCP's start alpha = 0 would give 5 % of the dense net's
      FLOPs.
    * A temperature sharpens the chain towards the end of a search.
    """

    def __init__(self, widths: Sequence[int], survival: float = 0.9) -> None:
        super().__init__()
        self.options = tuple(widths)
        self.widths = list(widths)  # the live widths; a cut shortens this list, alpha and idle
        p = torch.tensor(survival, dtype=torch.float64) ** (1 / max(1, len(widths) - 1))
        self.alpha = nn.Parameter(torch.logit(p).float().repeat(len(widths) - 1))
        # for each chain group except the first: for how many gate steps in a row its marginal has been too low
        self.idle = [0] * (len(widths) - 1)

    def live(self) -> list[int]:
        """Indices of the live widths: the first ones of the grid."""
        return list(range(len(self.widths)))

    def keep(self, temperature: float = 1.0) -> Tensor:
        """The marginal probability that each live chain group stays, [live]."""
        return marginals(self.alpha, temperature)

    def probabilities(self, temperature: float = 1.0) -> Tensor:
        """[number of options], zero for the widths that were cut off."""
        return chain_distributions([self], temperature)[0]

    def soft(self, temperature: float = 1.0, with_scale: bool = False) -> Tensor:
        """The factor of every channel, [widest live width]: the marginal of its chain group.

        Deviation from the paper: without ``with_scale`` the gradient leaves out the scale that all channels share
        (`without_scale`). Soft factors below 1 reduce the scale of activations; a narrower width does not. So layers
        that read the channels without a norm, above all the classifier, would widen the stream only to raise the scale.
        """
        sizes = torch.tensor([self.widths[0], *(b - a for a, b in zip(self.widths, self.widths[1:], strict=False))])
        sizes = sizes.to(self.alpha.device)
        factor = torch.repeat_interleave(self.keep(temperature), sizes, output_size=self.widths[-1])
        return factor if with_scale else without_scale(factor)
