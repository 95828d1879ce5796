"""The stochastic layer (PruNet): a gate over candidate blocks, the threshold that removes blocks, and the skip."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from dnas.nets.bipath_block import GatedBlock, Made, Prunode
from dnas.nets.gate import Gate, gumbel, split_like
from dnas.spec.space import DROP, KEEP, Option

Answer = Option | Tensor | dict[str, Tensor]  # one option (hard), or the gate's weights (soft)
Answers = Mapping[str, Answer]  # decision -> answer


class ChoiceGate(Gate):
    """A gate over candidate blocks: one logit for each live block (FBNet's Gumbel-softmax)."""

    def __init__(self, options: Sequence[str]) -> None:
        super().__init__()
        self.options = tuple(options)
        self.alive = list(range(len(options)))  # indices into options
        self.logits = nn.Parameter(torch.zeros(len(options)))

    def live(self) -> list[int]:
        """Indices of the blocks that were not removed."""
        return self.alive

    def probabilities(self, temperature: float = 1.0) -> Tensor:
        """[number of options], zero for removed blocks: the softmax of the live logits, without noise."""
        return choice_distributions([self], temperature)[0]

    def soft(
        self, temperature: float = 1.0, generator: torch.Generator | None = None, paths: int = 0,
        p: np.ndarray | None = None,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Gumbel-softmax weights ``{block: weight}`` of the live blocks.

        If ``paths`` > 0, only this many blocks are taken: those that the noise favours. Their weights are scaled to sum
        to 1 (as ProxylessNAS trains two paths at a time). So the cost of a step does not grow with the number of
        blocks. ``p`` are the probabilities at this temperature, if they are known already.
        """
        if p is None:
            p = self.probabilities(temperature).detach().double().cpu().numpy()
        noise = gumbel(len(self.alive), generator)
        favoured = temperature * np.log(np.maximum(p[self.alive], 1e-300)) + noise.numpy()  # logits, up to a constant
        taken = sorted(np.argsort(-favoured, kind="stable")[: paths or len(favoured)].tolist())
        weights = torch.softmax((self.logits + noise.to(self.logits)) / temperature, 0)
        weights = weights[taken] / weights[taken].sum()
        return {self.options[self.alive[k]]: w for k, w in zip(taken, weights, strict=True)}

    def below(self, threshold: float, p: np.ndarray) -> list[str]:
        """Live blocks with a probability ``p`` below ``threshold``, least likely first; never the most likely block."""
        order = sorted(self.alive, key=p.__getitem__)
        return [str(self.options[k]) for k in order[:-1] if p[k] < threshold]


def choice_distributions(gates: Sequence[ChoiceGate], temperature: float = 1.0) -> list[Tensor]:
    """The distributions of all gates over all their options, [number of options] each; 0 for removed blocks.

    A few operations compute all gates together, instead of a few operations for each gate.
    """
    logits = torch.cat([g.logits for g in gates])
    most, first = max(len(g.alive) for g in gates), 0
    slots: list[int] = []
    places: list[int] = []
    for row, gate in enumerate(gates):
        slots += range(row * most, row * most + len(gate.alive))
        places += [first + k for k in gate.alive]
        first += len(gate.options)
    slot, place = torch.tensor([slots, places], device=logits.device)
    rows = logits.new_full((len(gates) * most,), -math.inf).index_copy(0, slot, logits).view(len(gates), most)
    p = torch.softmax(rows / temperature, 1).flatten()
    return split_like(p.new_zeros(first).index_copy(0, place, p[slot]), gates)


class SkipGate(Gate):
    """Whether a residual layer stays: a coefficient ``s = sigmoid(3 kappa / T)`` scales its branch (PruNet).

    Before ``open()`` the layer always stays. The skip scales the branch and is not averaged with the candidate blocks.
    In an average it would compete with untrained blocks and win; this makes searches of this kind collapse. With the
    factor 3, s crosses 1/2 in a third of the steps that the plain logit would need.
    """

    options = (DROP, KEEP)

    def __init__(self) -> None:
        super().__init__()
        self.kappa = nn.Parameter(torch.tensor(0.0))  # `open` sets it
        self.is_open, self.is_removed = False, False

    @torch.no_grad()
    def open(self, start: float = 0.9, temperature: float = 1.0) -> None:
        """From now on the layer may be dropped. s begins at ``start``, at this temperature."""
        self.is_open = True
        self.kappa.fill_(math.log(start / (1 - start)) / 3 * temperature)

    def live(self) -> list[int]:
        """Indices: only keep before `open`, both after it, only drop once the layer is removed."""
        return [0] if self.is_removed else [0, 1] if self.is_open else [1]

    def reachable(self) -> list[int]:
        """Both indices until the layer is removed, because a closed skip opens later."""
        return [0] if self.is_removed else [0, 1]

    def coefficient(self, temperature: float = 1.0) -> Tensor:
        """s, a scalar in [0, 1]."""
        return torch.sigmoid(3 * self.kappa / temperature)

    def probabilities(self, temperature: float = 1.0) -> Tensor:
        """(P(drop), P(keep))."""
        return skip_distributions([self], temperature)[0]


def skip_distributions(gates: Sequence[SkipGate], temperature: float = 1.0) -> list[Tensor]:
    """(P(drop), P(keep)) of all gates at once. Gates that cannot learn (closed or removed) get no gradient either."""
    learning = [not g.settled for g in gates]
    s = torch.sigmoid(3 * torch.stack([g.kappa for g in gates]) / temperature)
    fixed = s.new_tensor([float(not g.is_removed) for g in gates])
    s = torch.where(torch.tensor(learning, device=s.device), s, fixed)
    return list(torch.stack([1 - s, s], 1))


class StochasticLayer(nn.Module):
    """Candidate blocks, of which one stays in the end, and for a residual layer the coefficient that may drop it.

    Args:
        name: prefix of the decisions ``name/block`` and ``name/keep``.
        blocks: candidate name -> block.
        out: the decision on the output width.
        residual: whether the input is added to the output (stride 1, one stream).
        droppable: whether the layer may be dropped; only a residual layer can be.
    """

    def __init__(
        self, name: str, blocks: Mapping[str, Prunode | GatedBlock], out: str, residual: bool, droppable: bool
    ) -> None:
        super().__init__()
        self.name, self.out, self.residual = name, out, residual
        self.blocks = nn.ModuleDict(blocks)
        self.choice: ChoiceGate | None = ChoiceGate(list(blocks)) if len(blocks) > 1 else None
        self.skip = SkipGate() if droppable else None

    @property
    def only(self) -> str:
        """The name of the one block that is left. Raises ValueError if there are several."""
        (name,) = self.blocks
        return name

    def forward(self, x: Tensor, answers: Answers) -> Tensor:
        """[B, in, H, W] -> [B, out, H', W'].

        The last norm of each block multiplies the branch by the factors of the answers
        (`dnas.nets.bipath_block.scaled_norm`).
        """
        keep = answers[f"{self.name}/keep"] if self.skip else KEEP
        if isinstance(keep, str) and keep == DROP:
            return x
        pick, out = answers[f"{self.name}/block"] if self.choice else self.only, answers[self.out]
        times = None if isinstance(keep, str) else keep
        if isinstance(pick, str):
            block = self.blocks[pick]
            y = block(x, answers[block.mid], out, times)
        else:
            made: Made = {}
            paths = [(self.blocks[name], w if times is None else w * times) for name, w in pick.items()]
            y = sum(block(x, answers[block.mid], out, w, made) for block, w in paths)
        return x + y if self.residual else y
