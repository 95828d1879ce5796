"""Obvious ways to choose a net in the budget, for a search to beat: evolution on shared weights, L1 and Taylor ranking.

Each is a function ``(lab, seed) -> (Arch, images seen)`` and sees the training images only. Training images are counted
as a search counts them; an image that is only looked at forwards counts a third.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from timm.utils import random_seed
from torch import Tensor, nn

from dnas.methods.baselines import random_arch
from dnas.methods.derive import derive
from dnas.methods.search import SearchConfig
from dnas.nets.shrink import extract
from dnas.nets.supernet import Supernet
from dnas.spec.space import KEEP, Arch
from dnas.training.loop import cycle, make_learner, train
from dnas.training.onednn import subsampled

if TYPE_CHECKING:
    from iso_setups import Lab


POPULATION, GENERATIONS = 40, 10


def train_shared(
    lab: "Lab",
    net: nn.Module,
    weights: Sequence[nn.Parameter],
    forward: Callable[[Tensor], Tensor],
    images: Tensor,
    seed: int,
    between: Callable[[], None] | None = None,
) -> int:
    """Train ``weights`` of ``net`` for as long as a search of this set-up. Returns the images seen.

    ``between`` is called between the gradients and the step.
    """
    recipe = lab.setup.search
    if recipe.channels_last:
        net.to(memory_format=torch.channels_last)
    batches = lab.data.train_batches(recipe.batch_size, seed=seed, indices=images)
    net.train()
    learner = make_learner(net, weights, recipe, len(batches))
    if between:
        learner.optimizer.register_step_pre_hook(lambda *_: between())
    for _ in train(forward, learner, batches, recipe):
        pass
    return recipe.epochs * len(batches) * recipe.batch_size


def shared_weights(lab: "Lab", seed: int) -> tuple[Supernet, Tensor, Tensor, int]:
    """A supernet trained on even draws, every second one at full width; held-out images, labels; how many it saw."""
    random_seed(seed)
    net = lab.supernet()
    draws, rng = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    steps = itertools.count()

    def forward(x: Tensor) -> Tensor:
        if next(steps) % 2 == 0:
            return net(x, net.widest(draws))
        return net(x, {d.name: d.options[rng.integers(len(d.options))] for d in net.space.decisions})

    rest, held_out = lab.data.split(SearchConfig.gate_fraction, seed)
    seen = train_shared(lab, net, net.weight_parameters(), forward, rest, seed)
    count = min(len(held_out), 500)
    x, y = next(cycle(lab.data.train_batches(count, seed=seed, indices=held_out)))
    return net, x, y, seen


@torch.no_grad()
def judge(net: Supernet, arch: Mapping, x: Tensor, y: Tensor, recalibrate: bool = True) -> float:
    """Top-1 in % of one architecture with shared weights; recalibrated: its norms use these images' statistics."""
    kept = [(b, b.clone()) for b in net.buffers()] if recalibrate else []
    net.train(recalibrate)
    logits = net(x, arch)
    for buffer, before in kept:
        buffer.copy_(before)
    return 100 * float((logits.argmax(1) == y).float().mean())


def evolution(lab: "Lab", seed: int) -> tuple[Arch, int]:
    """Evolution on shared weights (as Single Path One-Shot, Guo et al. 2020, arXiv 1904.00420; mutations only).

    A generation keeps the best quarter and refills with mutants of them: three Metropolis steps inside the budget.
    """
    net, x, y, seen = shared_weights(lab, seed)
    rng = np.random.default_rng(seed)
    args = (net.space, lab.tables, lab.budgets)
    scores: dict[Arch, float] = {}

    def add(arch: Arch) -> None:
        scores.setdefault(arch, judge(net, arch, x, y))

    for _ in range(POPULATION):
        add(random_arch(*args, seed=int(rng.integers(2**31))))
    for _ in range(GENERATIONS):
        parents = sorted(scores, key=scores.__getitem__, reverse=True)[: POPULATION // 4]
        for _ in range(POPULATION - len(parents)):
            parent = parents[rng.integers(len(parents))]
            add(random_arch(*args, seed=int(rng.integers(2**31)), start=parent, proposals=3))
    return max(scores, key=scores.__getitem__), seen + len(scores) * len(x) // 3


def l1(lab: "Lab", seed: int) -> tuple[Arch, int]:
    """Global ranking by the L1 norm of filters (Li et al., arXiv 1608.08710), each layer's scaled to mean 1."""
    return _ranked(lab, seed, "l1")


def taylor(lab: "Lab", seed: int) -> tuple[Arch, int]:
    """Global ranking by first-order Taylor importance at the norms (Molchanov et al., CVPR 2019): (gamma dL/dgamma)^2.

    Summed over ten held-out batches; each layer's scores are scaled to mean 1.
    """
    return _ranked(lab, seed, "taylor")


def _ranked(lab: "Lab", seed: int, by: str) -> tuple[Arch, int]:
    """Train the widest base net, score its channels, keep those worth most in the budget: `derive` is the same."""
    random_seed(seed)
    net = lab.supernet().cpu()
    base = {
        d.name: d.options[-1] if d.is_width else (KEEP if KEEP in d.options else d.base) for d in net.space.decisions
    }
    widest = net.space.complete(base)
    net = extract(net, widest).to(lab.device)
    rest, held_out = lab.data.split(SearchConfig.gate_fraction, seed)
    seen = train_shared(lab, net, net.weight_parameters(), lambda x: net(x, widest), rest, seed)
    batches = cycle(lab.data.train_batches(lab.setup.search.batch_size, seed=seed, indices=held_out))
    squares: dict[nn.Module, Tensor] = {}
    for _ in range(10 if by == "taylor" else 0):
        x, y = next(batches)
        net.zero_grad()
        with subsampled(net, lab.setup.search):
            loss = nn.functional.cross_entropy(net(x, widest), y)
        loss.backward()
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d) and module.weight.grad is not None:
                score = (module.weight * module.weight.grad).detach() ** 2
                squares[module] = squares.get(module, 0) + score
        seen += len(x)
    like = {d.name: np.where(np.array(d.options) == base[d.name], 0.0, -1e4) for d in net.space.decisions}
    for name, places in net.slices().items():
        score = sum(_scaled(s) for module, side in places if (s := _score(module, side, squares, by)) is not None)
        worth = np.concatenate([[0.0], np.cumsum(np.sort(score)[::-1])])
        like[name] = worth[list(net.space.by_name[name].options)]
    return derive(net.space, lab.tables, lab.budgets, like), seen


def _score(module: nn.Module, side: str, squares: dict[nn.Module, Tensor], by: str) -> Tensor | None:
    if by == "taylor":
        return squares.get(module) if side == "norm" else None
    return module.weight.detach().abs().flatten(1).sum(1) if side in ("out", "depthwise") else None


def _scaled(score: Tensor) -> np.ndarray:
    return (score / score.mean()).double().cpu().numpy()


OPPONENTS: dict[str, Callable[["Lab", int], tuple[Arch, int]]] = {"evolution": evolution, "l1": l1, "taylor": taylor}
