"""What a search came to, from the rows of its history."""

import math
from collections.abc import Sequence
from statistics import fmean, median
from typing import Any

import torch

from dnas.runs import peak_memory_mb
from dnas.train import Recipe


def search_figures(
    rows: Sequence[dict], recipe: Recipe, seconds: float, plain_ms: float, device: torch.device
) -> dict[str, Any]:
    """The ``search`` part of metrics.json.

    A first and a last step are medians over up to ten steps that taught both weights and gates; the very first of them
    mixes all blocks once, to see that every gate is alive, and does not count.
    """
    both = [row["weight_ms"] + row["gate_ms"] for row in rows if "gate_ms" in row]
    images = sum(recipe.batch_size + row.get("images", 0) for row in rows)
    some = both[1:] or both
    taught = [row for row in rows if "expected" in row]
    return {
        "seconds": seconds,
        "steps": len(rows),
        "images": images,
        "peak_memory_mb": peak_memory_mb(device),
        "first_step_ms": median(some[:10]),
        "last_step_ms": median(some[-10:]),
        "relative_cost": (1e3 * seconds / images) / (plain_ms / recipe.batch_size),
        "plain_step_ms": plain_ms,
        "expected": taught[-1]["expected"],
        "gate_loss": fmean(row["gate_loss"] for row in taught[-max(1, len(taught) // 10) :]),
    }


def no_better_than_a_guess(loss: float, num_classes: int) -> str:
    """What to say of a search that ended at this cross entropy; empty if its supernet knew more than nothing."""
    guess = math.log(num_classes)
    if loss < 0.98 * guess:
        return ""
    said = f"warning: the search ended at a loss of {loss:.2f}, and a guess has {guess:.2f}"
    return f"{said}: its gates had nothing to go by; another --lr or more --search-epochs may help"
