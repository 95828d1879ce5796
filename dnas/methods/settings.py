"""The settings of each method. Flags are made from this file before slow imports."""

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from dnas.spec.checks import UserError


def check_ranges(config: Any, *ranges: tuple[str, float, float]) -> None:
    """Raise UserError with the name of the flag if a number of ``config`` is not between (name, low, high)."""
    for name, low, high in ranges:
        if not low <= getattr(config, name) <= high:
            raise UserError(f"--{name.replace('_', '-')} {getattr(config, name)} is not between {low} and {high}")


def setting(default: Any, text: str) -> Any:
    """A field of a method's config, with the text that ``--help`` shows."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class NoConfig:
    """The config of a method without settings."""


WeightsOn = Literal["hard", "soft"]


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
    weights_on: WeightsOn = setting("hard", "nets that the weights learn on: hard or soft")
    scale_in_gradient: bool = setting(False, "the gates' gradient keeps the scale that all channels of a width share")
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
        check_ranges(
            self,
            ("gate_fraction", 0, 0.9), ("gate_every", 1, 10_000), ("gate_lr", 0, 10), ("paths", 2, 64),
            ("skip_from", 0.51, 0.9999),
            ("patience", 1, 10**6), ("budget_weight", 0, 1e6), ("temperature", 0.01, 10), ("width_below", 0, 0.5),
            ("prior", 0, 1e3), ("headroom", 0, 1e3),
            *((name, 0, 1) for name in shares),
        )  # fmt: skip
        if self.weights_on not in get_args(WeightsOn):
            raise UserError(f"--weights-on {self.weights_on!r} is not one of {', '.join(get_args(WeightsOn))}")
        for first, then in (("budget_from", "budget_by"), ("block_from", "block_by")):
            if getattr(self, first) > getattr(self, then):
                raise UserError(f"--{first.replace('_', '-')} must not come after --{then.replace('_', '-')}")


Cut = Literal["knapsack", "threshold"]


@dataclass(frozen=True)
class ScoreConfig:
    """The settings of all methods that score channels. Raises UserError if one is out of range."""

    cut: Cut = setting(
        "knapsack", "knapsack: the highest sum of scores inside the budget; threshold: one score for all layers"
    )
    score_batches: int = setting(10, "batches of training images that scores are taken over")

    def __post_init__(self) -> None:
        check_ranges(self, ("score_batches", 1, 10**6))
        if self.cut not in get_args(Cut):
            raise UserError(f"--cut {self.cut!r} is not one of {', '.join(get_args(Cut))}")


@dataclass(frozen=True)
class SnipConfig(ScoreConfig):
    """The settings of the method ``snip``. Raises UserError if one is out of range."""

    score_batches: int = setting(1, "batches of training images that scores are taken over")


@dataclass(frozen=True)
class RankConfig(ScoreConfig):
    """The settings of all methods that train the dense net and score channels. UserError if one is out of range."""

    cuts: int = setting(1, "number of cuts, evenly over the search; each lowers the cost by the same factor")
    rewind: bool = setting(False, "after each cut the weights that are left return to those of the start")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, ("cuts", 1, 100))


@dataclass(frozen=True)
class TaylorConfig(RankConfig):
    """The settings of the method ``taylor``. UserError if one is out of range."""

    order: int = setting(1, "order of the expansion: 1, or 2 with the exact second derivatives (slow)")
    group: int = setting(1, "channels in a row that have one score together")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, ("order", 1, 2), ("group", 1, 10**6))


@dataclass(frozen=True)
class DropnetConfig(RankConfig):
    """The settings of the method ``dropnet``. UserError if one is out of range."""

    cuts: int = setting(5, "number of cuts, evenly over the search; each lowers the cost by the same factor")
    rewind: bool = setting(True, "after each cut the weights that are left return to those of the start")


@dataclass(frozen=True)
class KfacConfig(RankConfig):
    """The settings of the method ``kfac``. UserError if one is out of range."""

    cuts: int = setting(5, "number of cuts, evenly over the search; each lowers the cost by the same factor")
    flatness: float = setting(0.0, "weight of the spectral radius of the curvature in the loss; 0: not computed")
    radius: float = setting(1.0, "spectral radius from which the curvature is penalised")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, ("flatness", 0, 1e3), ("radius", 0, 1e6))


@dataclass(frozen=True)
class PenaltyConfig(RankConfig):
    """The settings of methods that train with a penalty. UserError if one is out of range."""

    penalty: float = setting(1e-4, "weight of the penalty in the loss")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, ("penalty", 0, 1e3))


@dataclass(frozen=True)
class SslConfig(PenaltyConfig):
    """The settings of the method ``ssl``. Raises UserError if one is out of range."""

    depth_penalty: float = setting(0.0, "weight of the norms of whole layers in the loss; 0: all layers stay")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, ("depth_penalty", 0, 1e3))


@dataclass(frozen=True)
class AdmmConfig(ScoreConfig):
    """The settings of the method ``admm``. Raises UserError if one is out of range."""

    penalty: float = setting(1e-2, "weight of the squared distance to the network inside the budget")
    updates: int = setting(10, "updates of the duals, evenly over the search")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, ("penalty", 0, 1e3), ("updates", 1, 10_000))


# By the names that ``--method`` takes, in the order of `dnas.methods.catalog.METHODS`.
CONFIGS: dict[str, type] = {
    "gates": GatesConfig,
    "l1": RankConfig,
    "taylor": TaylorConfig,
    "hrank": RankConfig,
    "dropnet": DropnetConfig,
    "lasso": RankConfig,
    "ispasp": RankConfig,
    "kfac": KfacConfig,
    "snip": SnipConfig,
    "slimming": PenaltyConfig,
    "ssl": SslConfig,
    "admm": AdmmConfig,
    "balanced": NoConfig,
    "uniform": NoConfig,
    "random": NoConfig,
}
