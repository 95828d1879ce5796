"""The stochastic layer: a choice of candidate block, the threshold that removes some, the skip (PruNet)."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from dnas.nets.bipath_block import GatedBlock, Made, Prunode
from dnas.nets.markov_gate import draw_index, gumbel_softmax
from dnas.spec.space import DROP, KEEP, Option

Answer = Option | Tensor | dict[str, Tensor]  # one option (hard), or the gate's weights (soft)
Answers = Mapping[str, Answer]  # decision -> answer


class ChoiceGate(nn.Module):
    """Which block: a logit for each live candidate (FBNet's Gumbel-softmax)."""

    def __init__(self, options: Sequence[str]) -> None:
        super().__init__()
        self.options = list(options)
        self.live = list(range(len(options)))  # indices into options
        self.temperature = 1.0
        self.logits = nn.Parameter(torch.zeros(len(options)))

    def clean(self) -> Tensor:
        """Softmax of the live logits without noise, [live]."""
        return torch.softmax(self.logits / self.temperature, 0)

    def probabilities(self) -> Tensor:
        """[number of options], zero for removed blocks."""
        return choice_distributions([self])[0]

    def soft(self, generator: torch.Generator | None = None, paths: int = 0) -> dict[str, Tensor] | str:
        """Gumbel-softmax weights ``{block: weight}`` of the live blocks; the name itself where one is left.

        ``paths`` > 0 takes only that many blocks, those that the noise favours, with their weights scaled to sum to 1
        (as ProxylessNAS trains two paths at a time): the cost of a step then does not grow with the number of blocks.
        """
        if len(self.live) == 1:
            return self.options[self.live[0]]
        weights = gumbel_softmax(self.logits, self.temperature, generator)
        taken = weights.topk(min(paths or len(weights), len(weights))).indices.tolist()
        share = weights[taken] / weights[taken].sum()
        return {self.options[self.live[k]]: w for k, w in sorted(zip(taken, share, strict=True), key=lambda kw: kw[0])}

    def draw(self, generator: torch.Generator | None = None, uniform: bool = False) -> str:
        """One live block, by the clean softmax or evenly."""
        p = self.clean()
        return self.options[self.live[draw_index(torch.ones_like(p) if uniform else p, generator)]]

    def best(self) -> str:
        """The likeliest live block."""
        return self.options[self.live[int(self.logits.argmax())]]

    def below(self, threshold: float) -> list[str]:
        """Live blocks whose clean softmax is under ``threshold``, least likely first, never the best one."""
        p = self.clean().tolist()
        order = sorted(range(len(p)), key=p.__getitem__)
        return [self.options[self.live[k]] for k in order[:-1] if p[k] < threshold]


def choice_distributions(gates: Sequence[ChoiceGate]) -> list[Tensor]:
    """Distributions over all options, removed ones included: a few operations on all gates, not a few on each."""
    logits = torch.cat([g.logits for g in gates])
    most, first = max(len(g.live) for g in gates), 0
    slots: list[int] = []
    places: list[int] = []
    for row, gate in enumerate(gates):
        slots += range(row * most, row * most + len(gate.live))
        places += [first + k for k in gate.live]
        first += len(gate.options)
    slot, place = torch.tensor([slots, places], device=logits.device)
    rows = logits.new_full((len(gates) * most,), -math.inf).index_copy(0, slot, logits).view(len(gates), most)
    p = torch.softmax(rows / rows.new_tensor([g.temperature for g in gates])[:, None], 1).flatten()
    return list(p.new_zeros(first).index_copy(0, place, p[slot]).split([len(g.options) for g in gates]))


class SkipGate(nn.Module):
    """Whether a residual layer stays: a coefficient ``s = sigmoid(3 kappa / T)`` on its branch (PruNet).

    Before ``open()`` the layer is simply there. The skip scales the branch; it is never averaged with the candidates,
    where it would compete with untrained blocks and win: what makes searches of this kind collapse. The factor 3 lets s
    cross 1/2 in a third of the steps that the bare logit would take.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kappa = nn.Parameter(torch.tensor(0.0))  # `open` sets it
        self.temperature = 1.0
        self.is_open, self.is_removed = False, False

    @torch.no_grad()
    def open(self, start: float = 0.9) -> None:
        """Let the layer be dropped from now on, beginning at s = ``start`` whatever the temperature is by now."""
        self.is_open = True
        self.kappa.fill_(math.log(start / (1 - start)) / 3 * self.temperature)

    def coefficient(self) -> Tensor:
        """s, a scalar in [0, 1]."""
        return torch.sigmoid(3 * self.kappa / self.temperature)

    def probabilities(self) -> Tensor:
        """(P(drop), P(keep))."""
        return skip_distributions([self])[0]

    def soft(self, generator: torch.Generator | None = None) -> Tensor | str:
        """The coefficient itself, never sampled, or the fixed answer while closed or removed."""
        return self.coefficient() if self.is_open and not self.is_removed else self.best()

    def draw(self, generator: torch.Generator | None = None, uniform: bool = False) -> str:
        """Keep with probability s; a uniform draw leaves the layer in until the skip is open."""
        if self.is_removed or not self.is_open:
            return self.best()
        s = 0.5 if uniform else float(self.coefficient().detach())
        return KEEP if float(torch.rand((), generator=generator)) < s else DROP

    def best(self) -> str:
        """Drop below s = 1/2."""
        return DROP if self.is_removed or (self.is_open and float(self.kappa.detach()) < 0) else KEEP


def skip_distributions(gates: Sequence[SkipGate]) -> list[Tensor]:
    """(P(drop), P(keep)) of all gates at once. Those that cannot learn (closed or removed) get no gradient either."""
    learning = [g for g in gates if g.is_open and not g.is_removed]
    fixed = (g for g in gates if g not in learning)
    found = {g: g.kappa.new_tensor([float(g.is_removed), float(not g.is_removed)]) for g in fixed}
    if learning:
        cooling = gates[0].kappa.new_tensor([3 / g.temperature for g in learning])
        s = torch.sigmoid(torch.stack([g.kappa for g in learning]) * cooling)
        found |= dict(zip(learning, torch.stack([1 - s, s], 1), strict=True))
    return [found[g] for g in gates]


class StochasticLayer(nn.Module):
    """Candidate blocks, one of which will stay, and for a residual layer the coefficient that may drop it.

    Args:
        name: prefix of the decisions ``name/block`` and ``name/keep``.
        blocks: candidate name -> block.
        out: the decision on the output width.
        residual: whether input is added to output (stride 1, one stream).
        droppable: whether the layer may vanish; only a residual one can.
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
        """The one block that is left. ValueError while there are several."""
        (name,) = self.blocks
        return name

    def forward(self, x: Tensor, answers: Answers) -> Tensor:
        """[B, in, H, W] -> [B, out, H', W'].

        Whatever an answer multiplies the branch by, its block's last norm does (`dnas.nets.bipath_block.scaled_norm`).
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
