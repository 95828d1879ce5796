"""Warnings about a search that has ended. Each is one line, and says what to try."""

import math
from collections.abc import Mapping
from statistics import fmean

import torch
from torch import Tensor

from dnas.spec.budget import show
from dnas.spec.space import DROP, KEEP, Arch, Space


def no_better_than_a_guess(loss: float, num_classes: int) -> list[str]:
    """A warning if a search ended at a cross entropy that is not at least 2 % below that of a guess; otherwise none.

    ``loss`` is this cross entropy. That of a guess is log(``num_classes``).
    """
    guess = math.log(num_classes)
    if loss < 0.98 * guess:
        return []
    than = "worse than" if loss > guess else "not even 2 % below"
    said = f"the search ended at a loss of {loss:.2f}, which is {than} a guess's {guess:.2f}"
    return [f"{said}: its gates had nothing to go by; try another --lr or a longer --search-epochs"]


def as_good_as_one_answer(top1: Mapping[str, float], share: float, name: str) -> list[str]:
    """What to say of trained networks (kind -> top-1) that are no better than to answer the largest class always.

    ``share`` is the share of that class, ``name`` its name.
    """
    poor = [kind for kind, reached in top1.items() if reached <= 100 * share + 1e-6]
    if not poor:
        return []
    nets = f"the {poor[0]} net is" if len(poor) == 1 else f"the {', '.join(poor)} nets are"
    said = f"{nets} no better than always to answer {name!r}, which is right for {100 * share:.2f} % of the validation"
    return [f"{said} images; balanced accuracy and accuracy by class are in metrics.json; try a longer --epochs"]


def over_budget(expected: Mapping[str, float], limits: Mapping[str, float]) -> list[str]:
    """A warning for each metric whose expected cost at the end of a search is more than 5 % over the budget.

    The tolerance of 5 % was chosen by hand.
    """
    return [
        f"the gates ended at {show(metric, expected[metric])}, over the budget of {show(metric, limit)}: the net was "
        "cut to fit when it was derived; try a longer --search-epochs, or a higher --gate-lr or --budget-weight"
        for metric, limit in limits.items()
        if expected[metric] > 1.05 * limit
    ]


def signs_of_collapse(space: Space, found: Arch, uniform: Arch, distributions: Mapping[str, Tensor]) -> list[str]:
    """Warnings about the network that a search found: one line each, with what to try.

    ``uniform`` is the uniform net of the same budget. ``distributions`` are those of the gates at the end of the search
    (`dnas.nets.supernet.Supernet.probabilities`).
    """
    said = []
    by_name = space.by_name
    keeps = [option for name, option in found.items() if by_name[name].kind == "keep"]
    if len(keeps) > 1 and set(keeps) == {DROP} and KEEP in (uniform.get(name) for name in found):
        said.append(
            f"all {len(keeps)} layers that may go are gone: skips may have won because blocks had learnt nothing; "
            "try a longer --search-epochs; if that does not help, a later --skip-at"
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
