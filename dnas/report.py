"""What a search came to, from the rows of its history."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor

from dnas.arch import DROP, KEEP, Arch, Space
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
    taught = [row for row in rows if row.get("gate_loss") is not None]
    skipped = sum("skipped" in row or "gates_skipped" in row for row in rows)
    return {
        "seconds": seconds,
        "steps": len(rows),
        "images": images,
        "skipped_steps": skipped,
        "peak_memory_mb": peak_memory_mb(device),
        "first_step_ms": median(some[:10]),
        "last_step_ms": median(some[-10:]),
        "relative_cost": (1e3 * seconds / images) / (plain_ms / recipe.batch_size),
        "plain_step_ms": plain_ms,
        "expected": taught[-1]["expected"],
        "gate_loss": fmean(row["gate_loss"] for row in taught[-max(1, len(taught) // 10) :]),
    }


def no_better_than_a_guess(loss: float, num_classes: int) -> list[str]:
    """What to say of a search that ended at this cross entropy; nothing if its supernet knew more than nothing."""
    guess = math.log(num_classes)
    if loss < 0.98 * guess:
        return []
    said = f"the search ended at a loss of {loss:.2f}, and a guess has {guess:.2f}"
    return [f"{said}: its gates had nothing to go by; try another --lr or a longer --search-epochs"]


def signs_of_collapse(space: Space, found: Arch, uniform: Arch, distributions: Mapping[str, Tensor]) -> list[str]:
    """What is suspicious about a network that a search found, a line each, with what to try.

    ``uniform`` is the uniform net of the same budget and ``distributions`` are those of the gates as the search left
    them (`dnas.supernet.Supernet.probabilities`).
    """
    said = []
    by_name = space.by_name
    keeps = [option for name, option in found.items() if name.endswith("/keep")]
    if len(keeps) > 1 and set(keeps) == {DROP} and KEEP in (uniform.get(name) for name in found):
        said.append(
            f"all {len(keeps)} layers that may go are gone: skips may have won because blocks had learnt nothing; "
            "try a longer --search-epochs, or a later --skip-at"
        )
    widths = {name: width for name, width in found.items() if by_name[name].is_width and len(by_name[name].options) > 1}
    if widths and all(width == by_name[name].options[0] for name, width in widths.items()):
        said.append(
            f"all {len(widths)} widths are the narrowest of their grids: the budget leaves no choice; "
            "try a smaller --width-mult or --divisor, or a larger budget"
        )
    steps = [abs(by_name[n].index(w) - by_name[n].index(uniform[n])) for n, w in widths.items() if n in uniform]
    if steps and len(steps) == len(widths) and max(steps) <= 1 and len(keeps) < 2:
        said.append(
            "every width is within a step of the uniform net's: the search told no group of channels from another; "
            "try a longer --search-epochs, or a smaller budget, where widths matter more"
        )
    open_ones = [p[p > 0] for p in distributions.values() if int((p > 0).sum()) > 1]
    if open_ones:
        share = fmean(float(torch.special.entr(p).sum()) / math.log(len(p)) for p in open_ones)
        if share > 0.9:
            said.append(
                f"gates are undecided ({100 * share:.0f} % of the most entropy there is): what was derived is "
                "near a draw; try a longer --search-epochs, or a higher --gate-lr"
            )
    return said
