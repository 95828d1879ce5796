"""The budget term of the gates' loss: an annealed target and a two-sided penalty on the log ratio."""

from collections.abc import Mapping

import torch
from torch import Tensor


def ramp(t: float, start: float, end: float) -> float:
    """0 up to ``start``, 1 from ``end`` on, linear in between. ``t`` is the search's progress in [0, 1]."""
    return min(1.0, max(0.0, (t - start) / max(end - start, 1e-9)))


def target(first: float, limit: float, progress: float) -> float:
    """The cost target, geometric from the cost at the start to the budget: ``first^(1-progress) * limit^progress``."""
    return first ** (1 - progress) * limit**progress


def budget_penalty(expected: Mapping[str, Tensor], targets: Mapping[str, float]) -> Tensor:
    """``sum relu(log r)^2 + relu(-log max r)^2`` over the ratios r = expected / target, one for each metric. A scalar.

    The penalty is two-sided for the budget that binds: a net below all budgets is pulled up. It is one-sided for the
    other budgets. The penalty has a constant weight and an annealed target, because dual ascent on a multiplier
    overshoots.
    """
    ratios = torch.stack([torch.log(expected[m] / targets[m]) for m in targets])
    return ratios.clamp(min=0).square().sum() + (-ratios.max()).clamp(min=0).square()
