"""What is changed in a search, one thing at a time: the ablations of `iso_flops.py`.

All change the search of before its gates became blind to the scale of the logits (``older``). Ablations are many, so
most change one of half its length, and are compared with that one.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from dnas.methods.derive import Likelihood, gate_likelihood
from dnas.methods.settings import GatesConfig
from dnas.nets.bipath_block import PairGate
from dnas.nets.supernet import Supernet


def likeliest_width(net: Supernet, temperature: float) -> Likelihood:
    """As `gate_likelihood`, but of widths too it is the log-probability that counts."""
    like = dict(gate_likelihood(net, temperature))
    for name, gate in net.gates().items():
        if net.space.by_name[name].is_width:
            p = gate.probabilities(temperature).detach().double().cpu().numpy()
            if isinstance(gate, PairGate) and np.count_nonzero(p) > 1:  # it knows two: falling by e a step
                at = np.arange(len(p))
                p = np.exp(-np.abs(at[:, None] - at[p > 0])) @ p[p > 0]
            like[name] = np.log(np.maximum(p, 1e-30))
    return like


OLDER = GatesConfig(
    **{"confidence": True, "headroom": 0.0, "prior": 0.0, "warmup": 0.2, "budget_from": 0.2, "budget_by": 0.7},
    **{"block_from": 0.25, "block_by": 0.8, "skip_at": 0.2},
)
# The rows of all ablations were made when groups of channels lived longer.
LONGER = replace(OLDER, width_below=0.05)


@dataclass(frozen=True)
class Variant:
    """What is changed in a search.

    ``length`` is a factor on its epochs, ``recipe`` are fields of the weights' recipe.
    """

    config: GatesConfig = LONGER
    length: float = 0.5
    recipe: Mapping[str, Any] = field(default_factory=dict)
    bipath: bool = True
    likelihood: Callable[[Supernet, float], Likelihood] = gate_likelihood


SGD = {"opt": "sgd", "lr": 0.1, "weight_decay": 1e-3, "warmup_epochs": 1}
VARIANTS = {
    "default": Variant(GatesConfig(), length=1),
    "older": Variant(OLDER, length=1),
    "late-widths": Variant(length=1),
    "half-length": Variant(),
    "quarter-length": Variant(length=0.25),
    "sgd": Variant(length=1, recipe=SGD),
    "gates-every-step": Variant(replace(LONGER, gate_every=1)),
    "gates-every-4": Variant(replace(LONGER, gate_every=4)),
    "no-sharpening": Variant(replace(LONGER, temperature=1.0)),
    "constant-target": Variant(replace(LONGER, budget_from=0.2, budget_by=0.2)),
    "late-skip": Variant(replace(LONGER, skip_at=0.6, skip_from=0.999)),
    "early-closed-skip": Variant(replace(LONGER, skip_from=0.999)),
    "no-warmup": Variant(replace(LONGER, warmup=0.0, skip_at=0.0)),
    "long-warmup": Variant(replace(LONGER, warmup=0.5, budget_from=0.5, budget_by=0.8, block_from=0.5, skip_at=0.5)),
    "soft-weights": Variant(replace(LONGER, weights_on="soft")),
    "same-images": Variant(replace(LONGER, gate_fraction=0.0)),
    "fixed-grid": Variant(bipath=False),
    "slow-shrinking": Variant(replace(LONGER, block_from=0.8, block_by=1.0, width_below=0.005)),
    "fast-shrinking": Variant(replace(LONGER, block_from=0.2, block_by=0.4, width_below=0.2)),
    "scale-in-gradient": Variant(replace(LONGER, scale_in_gradient=True)),
    "likeliest-width": Variant(likelihood=likeliest_width),
    "likeliest-width-with-scale": Variant(replace(LONGER, scale_in_gradient=True), likelihood=likeliest_width),
}


GONE = ("entropy", "sandwich")  # ablations of half the length whose code brought nothing and was removed


def baseline_of(method: str) -> str:
    """What a method is compared with: an ablation with the search that it changes, everything else with the default."""
    if method in GONE:
        return "half-length"
    if method not in VARIANTS or method in ("default", "older"):
        return "default"
    return "half-length" if VARIANTS[method].length == 0.5 and method != "half-length" else "older"
