"""How weights are trained, as plain data."""

import math
from dataclasses import dataclass, field
from typing import Any

from dnas.spec.checks import UserError

AMP_DTYPES = (
    "auto",
    "float16",
    "bfloat16",
)  # auto: torch's default for the device, float16 on a GPU, bfloat16 on a CPU
SCHEDULES = ("cosine", "tanh", "step", "poly")


ARMS = ("finetune", "scratch-e", "scratch-b")  # of "Rethinking the Value of Network Pruning", arXiv 1810.05270


def parse_arms(text: str, keep_weights: bool) -> tuple[str, ...]:
    """``finetune,scratch-e`` as names of `ARMS`. Raises UserError for others, and for a fine-tuning without weights."""
    arms = tuple(text.split(",")) if text else ()
    if not set(arms) <= {*ARMS} or len(set(arms)) < len(arms):
        raise UserError(f"--arms {text!r}: names of {', '.join(ARMS)} are expected, each once, joined by commas")
    if "finetune" in arms and not keep_weights:
        raise UserError("--arms finetune starts from the weights of the search: --keep-weights is needed with it")
    return arms


def arm_epochs(arm: str, epochs: int, searched: int, work: float, share: float) -> int:
    """The epochs of an arm, where ``epochs`` are those of a fine-tuning.

    ``searched`` are the epochs of the search, ``work`` is what it computes in epochs of the widest net, and ``share``
    the found net's share of the widest net's cost.
    scratch-e has as many epochs as search and fine-tuning together, scratch-b as much compute. Deviation: the paper
    counts the training of the widest net without the fine-tuning. The epochs of weights from elsewhere are not known.
    """
    more = {"finetune": 0.0, "scratch-e": searched, "scratch-b": work / share}[arm]
    return epochs + round(more)


BALANCED = "balanced"


def parse_class_weights(text: str) -> tuple[float, ...]:
    """The numbers of ``1,2,0.5``. Raises UserError unless all are finite and above 0."""
    try:
        weights = tuple(float(part) for part in text.split(","))
    except ValueError:
        weights = (0.0,)
    if not all(0 < weight < math.inf for weight in weights):
        allowed = f"{BALANCED!r}, or a number above 0 for each class, joined by commas,"
        raise UserError(f"--class-weights {text!r}: {allowed} is expected")
    return weights


def told(default: Any, text: str) -> Any:
    """A field of `Recipe`, with the text that ``--help`` shows."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Recipe:
    """How weights are trained: the flags of the command line, with timm's names and meanings.

    One optimizer step takes ``grad_accum_steps`` batches of ``batch_size`` images; the last step of an epoch takes what
    is left. ``model_ema_decay`` 0 means no EMA. Raises UserError with the name of the flag if a number is out of range,
    or if ``sched`` or ``amp_dtype`` is unknown. timm checks the name in ``opt`` later
    (`dnas.training.optimizer.make_optimizer`).
    """

    epochs: int = 10
    batch_size: int = 64
    grad_accum_steps: int = told(1, "batches of one optimizer step; their gradients are averaged")
    opt: str = "adamw"
    lr: float = 5e-3
    weight_decay: float = 0.05
    sched: str = "cosine"
    warmup_epochs: int = 2
    min_lr: float = 1e-5
    smoothing: float = 0.1
    class_weights: str = told(
        "", f"weights of the classes in the loss: {BALANCED}, or a number for each, as 1,2,0.5 (default: all alike)"
    )
    mixup: float = 0.0
    cutmix: float = 0.0
    drop: float = 0.0
    drop_path: float = 0.0
    model_ema_decay: float = 0.0
    kd_model_name: str = told("", "timm network that is the teacher: distillation (default: none)")
    kd_checkpoint: str = told("", "weights of this network (default: timm's)")
    kd_temperature: float = told(4.0, "temperature of both softmaxes of the distillation")
    task_loss_weight: float = told(0.5, "weight w of the loss on labels; the distillation loss has 1 - w")
    freeze: str = told(
        "", "parts that do not learn: names of modules with * and ?, joined by commas; search: with --keep-weights"
    )
    clip_grad: float = 0.0
    amp: bool = False
    amp_dtype: str = "auto"
    channels_last: bool = True

    def __post_init__(self) -> None:
        for name, low, high in (
            ("epochs", 1, 100_000), ("batch_size", 2, 65536), ("grad_accum_steps", 1, 65536), ("lr", 1e-9, 1e3),
            ("weight_decay", 0, 10),
            ("min_lr", 0, 1e3),
            ("smoothing", 0, 0.99), ("mixup", 0, 10), ("cutmix", 0, 10), ("drop", 0, 0.99), ("drop_path", 0, 0.99),
            ("model_ema_decay", 0, 0.999999), ("warmup_epochs", 0, 100_000), ("clip_grad", 0, 1e6),
            ("kd_temperature", 0.01, 1000), ("task_loss_weight", 0, 1),
        ):  # fmt: skip
            value = getattr(self, name)
            if not low <= value <= high:
                raise UserError(f"--{name.replace('_', '-')} {value} is not between {low} and {high}")
        if not self.kd_model_name:
            for name in ("kd_checkpoint", "kd_temperature", "task_loss_weight"):
                if getattr(self, name) != getattr(Recipe, name):
                    raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)} goes with --kd-model-name")
        if self.class_weights not in ("", BALANCED):
            parse_class_weights(self.class_weights)
        for name, allowed in (("amp_dtype", AMP_DTYPES), ("sched", SCHEDULES)):
            if getattr(self, name) not in allowed:
                raise UserError(
                    f"--{name.replace('_', '-')} {getattr(self, name)!r} is not one of {', '.join(allowed)}"
                )
