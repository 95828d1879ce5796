"""Read budgets from text, and write them as text.

**FLOPs means multiply-accumulates here**: one multiply-accumulate (MAC) counts as one FLOP, as in the papers, in fvcore
and in timm's ``gmacs``. Convolutions, linear layers and matrix products of two feature maps (attention) count; norms,
activations and pooling do not. timm's mobilenetv2_100 has 300.8 M and its resnet50 has 4089.2 M, as published.
``300MFLOPs``, ``300MMACs`` and ``0.3G`` are the same budget. No other place in the code defines this.
"""

import math
import re
from dataclasses import dataclass

from dnas.spec.checks import UserError

_UNITS = {"flops": "macs", "macs": "macs", "flop": "macs", "mac": "macs", "": "macs", "params": "params"}
_SCALE = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_SHOWN = {"macs": "FLOPs", "params": "Params", "ms": "ms"}
_TIME = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*(ms|us|s)", re.IGNORECASE)
_MS = {"us": 1e-3, "ms": 1.0, "s": 1e3}
_TEXT = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*(?:(%)?([kmgt]?)(flops?|macs?|params)|(%)|([KMGT]))", re.IGNORECASE)
ALLOWED = (
    "a number with a unit (300MFLOPs, 0.3G, 5MParams, 1.2ms, or 50% or 50%Params of the widest net), joined by commas"
)


@dataclass(frozen=True)
class Budget:
    """An upper limit on one metric of a network.

    ``metric`` is ``"macs"``, ``"params"`` or ``"ms"``. ``limit`` is a number of multiply-accumulates, of parameters or
    of milliseconds. If ``percent``, it is a percentage of the cost of the widest net.
    """

    metric: str
    limit: float
    percent: bool = False

    def resolve(self, full: float) -> "Budget":
        """The absolute budget, from the cost ``full`` of the widest net. An absolute budget is returned unchanged."""
        return Budget(self.metric, self.limit / 100 * full) if self.percent else self

    def __str__(self) -> str:
        unit = _SHOWN[self.metric] if self.metric != "macs" else ""
        return f"{self.limit:g}%{unit}" if self.percent else show(self.metric, self.limit)


def show(metric: str, value: float) -> str:
    """A cost as text with four significant digits and its unit: ``show("macs", 3e6) == "3MFLOPs"``."""
    if metric == "ms":
        return f"{value:.4g}ms"
    scale = next((s for s in "tgmk" if value >= _SCALE[s]), "")
    return f"{value / _SCALE[scale]:.4g}{scale.upper() if scale != 'k' else 'k'}{_SHOWN[metric]}"


def parse_budget(text: str) -> tuple[Budget, ...]:
    """The budgets in a text such as ``"300MFLOPs"`` or ``"300MFLOPs,5MParams"``. A network must keep all of them.

    A metric has at most one budget. A percentage without a unit is a budget in FLOPs.

    Raises:
        UserError: a number is not positive and finite, a percentage is above 100, a unit is missing or unknown, or a
            metric is given twice.
    """
    budgets: list[Budget] = []
    for part in text.split(","):
        given = part.strip()
        if match := _TIME.fullmatch(given):
            percent, metric, limit = None, "ms", float(match[1]) * _MS[match[2].lower()]
        elif match := _TEXT.fullmatch(given):
            number, of_unit, prefix, unit, alone, bare = match.groups()
            percent = of_unit or alone
            if percent and prefix:
                raise UserError(f"budget {given!r} is not {ALLOWED}")
            scale = 1 if percent else _SCALE[(prefix or bare or "").lower()]
            metric, limit = _UNITS[(unit or "").lower()], float(number) * scale
        else:
            raise UserError(f"budget {given!r} is not {ALLOWED}")
        if not (0 < limit < math.inf) or (percent and limit > 100):
            raise UserError(f"budget {given!r} must be above 0{' and at most 100%' if percent else ''}: {ALLOWED}")
        if any(b.metric == metric for b in budgets):
            raise UserError(f"budget {text!r} gives {_SHOWN[metric]} twice: one limit a metric is allowed")
        budgets.append(Budget(metric, limit, bool(percent)))
    return tuple(budgets)
