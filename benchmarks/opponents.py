"""Obvious ways to choose a net in the budget, for a search to beat: evolution on shared weights.

A way is a function ``(lab, seed) -> (Arch, images seen)`` and sees the training images only. Training images are
counted as a search counts them; an image that is only looked at forwards counts a third.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from timm.utils import random_seed
from torch import Tensor, nn

from dnas.methods.rules import random_arch
from dnas.methods.settings import GatesConfig
from dnas.nets.supernet import Supernet
from dnas.spec.budget import Budget
from dnas.spec.space import Arch
from dnas.training.loop import cycle, make_learner, steps_per_epoch, train

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
    criterion = nn.CrossEntropyLoss(label_smoothing=recipe.smoothing)
    if recipe.channels_last:
        net.to(memory_format=torch.channels_last)
    batches = lab.data.train_batches(recipe.batch_size, seed=seed, indices=images)
    net.train()
    learner = make_learner(net, weights, recipe, steps_per_epoch(batches, recipe))
    if between:
        learner.optimizer.register_step_pre_hook(lambda *_: between())
    for _ in train(lambda x, y: criterion(forward(x).float(), y), learner, batches, recipe):
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

    rest, held_out = lab.data.split(GatesConfig.gate_fraction, seed)
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


def evolve(lab: "Lab", budgets: Sequence[Budget], net: Supernet, x: Tensor, y: Tensor, seed: int) -> tuple[Arch, int]:
    """The best network inside the budgets that evolution meets, by `judge`; and how many images it looked at.

    A generation keeps the best quarter and refills with mutants of them: three Metropolis steps inside the budget.
    """
    rng = np.random.default_rng(seed)
    args = (net.space, lab.tables, budgets)
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
    return max(scores, key=scores.__getitem__), len(scores) * len(x)


def evolution(lab: "Lab", seed: int) -> tuple[Arch, int]:
    """Evolution on shared weights (as Single Path One-Shot, Guo et al. 2020, arXiv 1904.00420; mutations only)."""
    net, x, y, seen = shared_weights(lab, seed)
    arch, looked = evolve(lab, lab.budgets, net, x, y, seed)
    return arch, seen + looked // 3


OPPONENTS: dict[str, Callable[["Lab", int], tuple[Arch, int]]] = {"evolution": evolution}
