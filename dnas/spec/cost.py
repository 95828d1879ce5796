"""One formula for every cost, so that search, derivation, report and export cannot disagree:

    cost(p) = sum over sites s of  p[when of s] * sum over widths  p_in[i] * p_mid[m] * p_out[j] * T_s[i, m, j]

With one-hot ``p`` it is the exact cost of an `Arch`; with the gates' probabilities it is the exact expectation, because
the decisions are drawn independently of each other. No cost of an expected width appears anywhere: a latency is a
staircase in width, and the staircase has to be in the expectation.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dnas.spec.budget import Budget, show
from dnas.spec.checks import UserError
from dnas.spec.latency_table import LatencyTable
from dnas.spec.space import Arch, Decision, Option, Site, Space

Form = Callable[..., np.ndarray]

# Closed forms per operation. Slots and `fixed` numbers come as keywords; widths are broadcastable arrays.
# `size` is the number of output positions (height * width), `size_in` that of the input of a strided block,
# `se` the squeeze width (0: none).


def _conv_macs(*, kernel, size, **width):
    return width["in"] * width["out"] * kernel**2 * size


def _linear_macs(**width):
    return width["in"] * width["out"]


def _squeeze_macs(mid, se):
    return 2 * mid * se  # two 1x1 convolutions on one position


def _separable_macs(*, kernel, size, se, **width):
    return width["in"] * (kernel**2 * size + 2 * se) + width["in"] * width["out"] * size


def _inverted_macs(*, kernel, size, size_in, se, mid, **width):
    return width["in"] * mid * size_in + mid * kernel**2 * size + _squeeze_macs(mid, se) + mid * width["out"] * size


def _fused_macs(*, kernel, size, size_in, se, mid, **width):
    return width["in"] * mid * kernel**2 * size + _squeeze_macs(mid, se) + mid * width["out"] * size


# A share of a layer whose widths go with whole groups of channels: its cost for one step of each
# (dnas.nets.timm_supernet).


def _channels_macs(*, macs, params, step_in, step_out, **width):
    return macs * (width["in"] // step_in) * (width["out"] // step_out)


def _channels_params(*, macs, params, step_in, step_out, **width):
    return params * (width["in"] // step_in) * (width["out"] // step_out)


# Parameters: a norm has two a channel; squeeze-excite's convolutions have biases, no other convolution has one.


def _squeeze_params(mid, se):
    return 2 * mid * se + (mid + se) * (se > 0)


def _conv_params(*, kernel, size, **width):
    return (width["in"] * kernel**2 + 2) * width["out"]


def _linear_params(**width):
    return (width["in"] + 1) * width["out"]


def _separable_params(*, kernel, size, se, **width):
    return width["in"] * (kernel**2 + 2) + _squeeze_params(width["in"], se) + (width["in"] + 2) * width["out"]


def _inverted_params(*, kernel, size, size_in, se, mid, **width):
    return (width["in"] + 2 + kernel**2 + 2) * mid + _squeeze_params(mid, se) + (mid + 2) * width["out"]


def _fused_params(*, kernel, size, size_in, se, mid, **width):
    return (width["in"] * kernel**2 + 2) * mid + _squeeze_params(mid, se) + (mid + 2) * width["out"]


CLOSED_FORMS: dict[str, dict[str, Form]] = {
    "macs": {
        "conv": _conv_macs,
        "linear": _linear_macs,
        "ds": _separable_macs,
        "ir": _inverted_macs,
        "er": _fused_macs,
        "channels": _channels_macs,
    },
    "params": {
        "conv": _conv_params,
        "linear": _linear_params,
        "ds": _separable_params,
        "ir": _inverted_params,
        "er": _fused_params,
        "channels": _channels_params,
    },
}


@dataclass(frozen=True)
class _Entry:
    """A site's costs: ``table`` has one axis for each *distinct* width decision in ``axes``."""

    table: np.ndarray
    axes: tuple[str, ...]
    when: tuple[tuple[str, int], ...]


def _entry(site: Site, space: Space, form: Form) -> _Entry:
    # A decision in two slots (a convolution inside one stream) is one axis: the diagonal is taken by construction.
    axes = tuple(dict.fromkeys(w for w in site.widths.values() if isinstance(w, str)))
    slots: dict[str, np.ndarray] = {}
    for slot, width in site.widths.items():
        if isinstance(width, str):
            along = [-1 if axis == width else 1 for axis in axes]
            slots[slot] = np.array(space.by_name[width].options, dtype=np.int64).reshape(along)
        else:
            slots[slot] = np.array(width, dtype=np.int64)
    shape = tuple(len(space.by_name[axis].options) for axis in axes)
    table = np.broadcast_to(np.asarray(form(**slots, **site.fixed)), shape)
    when = tuple((name, space.by_name[name].index(option)) for name, option in site.when)
    return _Entry(table.astype(np.float64), axes, when)


@dataclass(frozen=True)
class _Batch:
    """Entries of one shape, to be summed at once: ``tables`` is [n, *shape].

    ``axes`` holds for each axis, and ``when`` for all conditions, the places of their probabilities in one flat vector:
    [n, length of the axis] each, and [n, conditions].
    """

    tables: np.ndarray
    axes: tuple[np.ndarray, ...]
    when: np.ndarray


def _batches(entries: Iterable[_Entry], starts: Mapping[str, int]) -> list[_Batch]:
    alike: dict[tuple, list[_Entry]] = {}
    for entry in entries:
        alike.setdefault((entry.table.shape, len(entry.when)), []).append(entry)
    batches = []
    for (shape, conditions), some in alike.items():
        firsts = np.array([[starts[name] for name in e.axes] for e in some], dtype=np.int64).reshape(len(some), -1)
        axes = tuple(firsts[:, k, None] + np.arange(size) for k, size in enumerate(shape))
        when = np.array([[starts[name] + index for name, index in e.when] for e in some], dtype=np.int64)
        batches.append(_Batch(np.stack([e.table for e in some]), axes, when.reshape(len(some), conditions)))
    return batches


class _Expected(torch.autograd.Function):
    """The formula and its gradient, for probabilities in one flat vector on the CPU.

    By hand and in numpy: autograd is slow over so many small products (`expected_cost_share` of benchmarks/speed.py).
    """

    @staticmethod
    def forward(ctx: Any, flat: Tensor, batches: Sequence[_Batch]) -> Tensor:
        p, total = flat.detach().numpy(), 0.0
        slope = np.zeros_like(p)
        for batch in batches:
            n, weights, given = len(batch.tables), [p[axis] for axis in batch.axes], p[batch.when]
            share = given.prod(1)
            left, value = batch.tables, batch.tables  # left: summed over all axes before this one
            for k, axis in enumerate(batch.axes):
                rest = left
                for own in reversed(weights[k + 1 :]):
                    rest = (rest @ own.reshape(n, *[1] * (rest.ndim - 3), -1, 1))[..., 0]
                np.add.at(slope, axis, rest * share[:, None])
                left = (weights[k][:, None] @ left.reshape(n, weights[k].shape[1], -1)).reshape(n, *left.shape[2:])
                value = left
            for j in range(given.shape[1]):
                np.add.at(slope, batch.when[:, j], value * np.delete(given, j, 1).prod(1))
            total += float(value @ share)
        ctx.slope = torch.from_numpy(slope)
        return torch.tensor(total, dtype=torch.float64)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.slope, None


class CostTable:
    """What every site costs under every answer, for one metric. Build it with `CostTable.build`."""

    def __init__(self, space: Space, metric: str, entries: tuple[_Entry, ...]) -> None:
        self.space, self.metric, self._entries = space, metric, entries
        self._touching: dict[str, list[_Entry]] = {d.name: [] for d in space.decisions}
        for entry in entries:
            for name in {*entry.axes, *(name for name, _ in entry.when)}:
                self._touching[name].append(entry)

    @classmethod
    def build(cls, space: Space, metric: str, sites: Sequence[Site] | None = None) -> "CostTable":
        """Closed-form costs for ``"macs"`` or ``"params"`` of all sites, or of these.

        KeyError for another metric or an unknown operation.
        """
        forms, sites = CLOSED_FORMS[metric], space.sites if sites is None else sites
        return cls._merged(space, metric, (_entry(site, space, forms[site.op]) for site in sites))

    @classmethod
    def measured(cls, space: Space, sites: Sequence[Site], table: LatencyTable) -> "CostTable":
        """Milliseconds of ``sites``, whose operations are units of a latency table.

        Raises:
            UserError: the table does not have all of them, at all widths of the space.
        """
        if lines := table.missing(space, sites):
            more = f" and {len(lines) - 1} more" if len(lines) > 1 else ""
            raise UserError(f"the latency table has {len(table.units)} units and lacks {lines[0]}{more}: profile them")
        entries = (_entry(site, space, table.units[site.op].at) for site in sites)
        return cls._merged(space, "ms", entries)

    @classmethod
    def _merged(cls, space: Space, metric: str, entries: Iterable[_Entry]) -> "CostTable":
        merged: dict[tuple, _Entry] = {}  # sites that hang on the same decisions are one table
        for entry in entries:
            key = entry.axes, entry.when
            table = entry.table + merged[key].table if key in merged else entry.table
            merged[key] = _Entry(table, *key)
        return cls(space, metric, tuple(merged.values()))

    @cached_property
    def _layout(self) -> tuple[list[str], list[_Batch]]:
        """Decisions in the order of the flat vector, and the entries on it; many a table is never asked for it."""
        names = [name for name, entries in self._touching.items() if entries]
        starts = np.cumsum([0, *(len(self.space.by_name[name].options) for name in names)])
        return names, _batches(self._entries, dict(zip(names, starts.tolist(), strict=False)))

    def expected(self, probabilities: Mapping[str, Tensor]) -> Tensor:
        """The formula above: a float64 scalar, differentiable in ``probabilities`` ([number of options] each)."""
        names, batches = self._layout
        flat = torch.cat([probabilities[name] for name in names]).double()
        total: Tensor = _Expected.apply(flat.cpu(), batches)
        return total.to(flat.device)

    def of(self, arch: Mapping[str, Option]) -> int | float:
        """The exact cost of one architecture: the same sum, at one-hot probabilities."""
        at = {name: self.space.by_name[name].index(option) for name, option in arch.items()}
        total = sum(
            float(entry.table[tuple(at[axis] for axis in entry.axes)])
            for entry in self._entries
            if all(at.get(name) == index for name, index in entry.when)
        )
        return int(total) if float(total).is_integer() else total

    def scaled(self, factor: float) -> "CostTable":
        """The same table with every cost times ``factor``."""
        entries = (_Entry(entry.table * factor, entry.axes, entry.when) for entry in self._entries)
        return CostTable(self.space, self.metric, tuple(entries))

    def along(self, decision: Decision, at: Mapping[str, int]) -> np.ndarray:
        """Cost of the sites that ``decision`` touches, for each of its options, all other answers held.

        ``at`` gives the option *index* of every decision, those without effect included.
        """
        total = np.zeros(len(decision.options))
        for entry in self._touching[decision.name]:
            gates = [(name, index) for name, index in entry.when if name != decision.name]
            if any(at[name] != index for name, index in gates):
                continue
            costs = entry.table[tuple(slice(None) if a == decision.name else at[a] for a in entry.axes)]
            own = [index for name, index in entry.when if name == decision.name]
            if own:
                total[own[0]] += costs
            else:
                total += costs
        return total

    def extremes(self, live: Mapping[str, Sequence[int]] | None = None) -> tuple[Arch, Arch]:
        """The cheapest and the dearest `Arch` of the space, or of its ``live`` options (decision -> indices).

        Exact if costs rise with every width and a site depends on one choice and on its own layer's keep (closed
        forms do; a measured table need not, and then it is a coordinate-wise optimum).
        """
        live = live or {d.name: range(len(d.options)) for d in self.space.decisions}
        ends = []
        for best, edge in ((np.argmin, 0), (np.argmax, -1)):
            at = {name: options[edge] for name, options in live.items()}
            for d in reversed(self.space.decisions):  # inner choices first, then those that they depend on
                if not d.is_width:
                    given = at | {name: self.space.by_name[name].index(option) for name, option in d.when}
                    at[d.name] = live[d.name][int(best(self.along(d, given)[list(live[d.name])]))]
            ends.append(self.space.complete({d.name: d.options[at[d.name]] for d in self.space.decisions}))
        return ends[0], ends[1]

    def without(self, gone: set[str]) -> "CostTable":
        """The table of what is left when these decisions are no more, because the blocks they are in were removed."""
        return CostTable(
            self.space,
            self.metric,
            tuple(e for e in self._entries if gone.isdisjoint((*e.axes, *(name for name, _ in e.when)))),
        )


def resolve_budgets(tables: Mapping[str, CostTable], budgets: tuple[Budget, ...]) -> tuple[Budget, ...]:
    """Percentages made absolute; UserError unless every limit can be kept and at least one of them can bind."""
    ranges = {b.metric: tuple(tables[b.metric].of(arch) for arch in tables[b.metric].extremes()) for b in budgets}
    resolved = tuple(b.resolve(ranges[b.metric][1]) for b in budgets)
    for given, b in zip(budgets, resolved, strict=True):
        low, high = ranges[b.metric]
        if b.limit < low or all(other.limit > ranges[other.metric][1] for other in resolved):
            reach = f"{show(b.metric, low)} to {show(b.metric, high)}"
            raise UserError(f"budget {given} is out of reach: the networks of this search space have {reach}")
    return resolved
