"""The settings of each method. Flags are made from this file before slow imports."""

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
    """All settings of the method ``gates`` except the weights' `Recipe`. Times are shares of the whole search, 0 to 1.

    ``gate_lr`` 0 means that the rate lets a logit move by 20 over all gate steps, but is at least 0.01 and at most 0.3.
    Raises UserError with the name of the flag if a number is out of range.
    """

    gate_fraction: float = setting(
        0.3, "share of the training images held out for the gates; 0: gates learn on the weights' images"
    )
    gate_every: int = setting(2, "weight steps per gate step")
    gate_lr: float = setting(0.0, "learning rate of the gates; 0: from the number of gate steps")
    paths: int = setting(2, "candidate blocks mixed in a gate step")
    weights_on: WeightsOn = setting("hard", "nets that the weights learn on: hard, soft or sandwich")
    scale_in_gradient: bool = setting(False, "the gates' gradient keeps the scale that all channels of a width share")
    entropy: float = setting(0.0, "weight of the gates' mean entropy at the end of the search; it grows from 0")
    confidence: bool = setting(
        False, "the gates' gradient keeps the scale that all logits share (the confidence of the network)"
    )
    headroom: float = setting(
        1.5, "widths start at this many times the balanced widths of the shallowest, cheapest network; 0: at full width"
    )
    prior: float = setting(
        0.05, "weight of the sum of expected log widths in the gates' loss: pulls to balanced widths"
    )
    budget_weight: float = setting(20.0, "weight of the distance to the budget in the gates' loss")
    warmup: float = setting(0.1, "end of the warm-up: until then only weights learn, on evenly drawn nets")
    budget_from: float = setting(0.1, "progress at which the cost target starts to fall")
    budget_by: float = setting(0.4, "progress at which the cost target equals the budget")
    block_from: float = setting(0.1, "progress at which the threshold on blocks starts to rise from 0")
    block_by: float = setting(0.5, "progress at which the threshold on blocks is 1/2")
    skip_at: float = setting(
        0.1, "progress at which layers get their skip; from here to the end the threshold on layers rises from 0 to 1/2"
    )
    skip_from: float = setting(0.9, "coefficient of a skip at its start")
    temperature: float = setting(0.3, "temperature at the end; it is 1 until the cost target has fallen half-way")
    width_below: float = setting(
        0.2, "a chain group is removed when its marginal was below this for --patience gate steps"
    )
    patience: int = setting(
        5, "gate steps in a row with a marginal below --width-below before a chain group is removed"
    )

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
