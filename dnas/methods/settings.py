"""What a user may set of each method. Flags are made of it before anything slow is imported."""

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from dnas.spec.checks import UserError


def setting(default: Any, text: str) -> Any:
    """A field of a method's config, with the text that ``--help`` shows."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class NoConfig:
    """The config of a method without settings."""


WeightsOn = Literal["hard", "soft", "sandwich"]


@dataclass(frozen=True)
class GatesConfig:
    """Everything about this search beyond the weights' `Recipe`. Times are shares of the whole search, in [0, 1].

    ``gate_lr`` 0 means: such that a logit can travel 20 over all gate steps, within [0.01, 0.3]. Raises UserError for a
    number that makes no sense, naming the flag.
    """

    gate_fraction: float = setting(
        0.3, "of the training images, held out for the gates; 0: they see the weights' images"
    )
    gate_every: int = setting(2, "weight steps to a gate step")
    gate_lr: float = setting(0.0, "learning rate of the gates; 0: by the number of their steps")
    paths: int = setting(2, "candidate blocks mixed in a gate step")
    weights_on: WeightsOn = setting("hard", "nets that the weights learn on: hard, soft or sandwich")
    scale_in_gradient: bool = setting(False, "the gates' gradient keeps the scale that all channels of a width share")
    entropy: float = setting(0.0, "weight of the gates' mean entropy at the end of the search; it grows from 0")
    confidence: bool = setting(
        False, "the gates' gradient keeps the scale that all logits share: how sure the network is"
    )
    headroom: float = setting(
        1.5, "widths begin at so many times the balanced ones of the shallowest, cheapest network; 0: at full width"
    )
    prior: float = setting(0.05, "weight of the sum of expected log widths in the gates' loss: towards balanced widths")
    budget_weight: float = setting(20.0, "weight of the distance to the budget in the gates' loss")
    warmup: float = setting(0.1, "weights only, nets drawn evenly, until then")
    budget_from: float = setting(0.1, "progress at which the cost target starts to fall")
    budget_by: float = setting(0.4, "progress at which the cost target equals the budget")
    block_from: float = setting(0.1, "progress at which the threshold on blocks starts to rise from 0")
    block_by: float = setting(0.5, "progress at which the threshold on blocks is 1/2")
    skip_at: float = setting(
        0.1, "layers get their skip; the threshold on them rises from 0 to 1/2 from here to the end"
    )
    skip_from: float = setting(0.9, "the coefficient that they begin with")
    temperature: float = setting(0.3, "at the end; 1 until the budget is reached half-way")
    width_below: float = setting(
        0.2, "a group of channels goes when its marginal has been below this for --patience steps"
    )
    patience: int = setting(5, "gate steps in a row that a marginal must be below --width-below")

    def __post_init__(self) -> None:
        shares = ("warmup", "budget_from", "budget_by", "block_from", "block_by", "skip_at")
        for name, low, high in (
            ("gate_fraction", 0, 0.9), ("gate_every", 1, 10_000), ("gate_lr", 0, 10), ("paths", 2, 64),
            ("skip_from", 0.51, 0.9999),
            ("patience", 1, 10**6), ("budget_weight", 0, 1e6), ("temperature", 0.01, 10), ("width_below", 0, 0.5),
            ("prior", 0, 1e3), ("headroom", 0, 1e3),
            ("entropy", 0, 1e3),
            *((name, 0, 1) for name in shares),
        ):  # fmt: skip
            if not low <= getattr(self, name) <= high:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)} is not between {low} and {high}")
        if self.weights_on not in get_args(WeightsOn):
            raise UserError(f"--weights-on {self.weights_on!r} is not one of {', '.join(get_args(WeightsOn))}")
        for first, then in (("budget_from", "budget_by"), ("block_from", "block_by")):
            if getattr(self, first) > getattr(self, then):
                raise UserError(f"--{first.replace('_', '-')} must not come after --{then.replace('_', '-')}")


# By the names that ``--method`` takes, in the order of `dnas.methods.catalog.METHODS`.
CONFIGS: dict[str, type] = {
    "gates": GatesConfig,
    "l1": NoConfig,
    "taylor": NoConfig,
    "balanced": NoConfig,
    "uniform": NoConfig,
    "random": NoConfig,
}
