"""One formula for every cost. Search, derivation, report and export all use it:

    cost(p) = sum over sites s of  p[when of s] * sum over widths  p_in[i] * p_mid[m] * p_out[j] * T_s[i, m, j]

With one-hot ``p`` it gives the exact cost of an `Arch`. With the gates' probabilities it gives the exact expectation,
because the decisions are drawn independently. The formula averages the costs of widths; it never takes the cost of an
average width. The two can differ, because a latency is a step function of the width.
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
# `size` is the number of output positions (height * width), `size_in` the number of input positions of a block, which
# may have a stride, `se` the squeeze width (0: none).


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


# A part of a layer of a network of timm's (`dnas.nets.timm_space.space_of_channels`): `macs` and `params` are its costs
# for one unit of each width. A unit is `step_in` or `step_out` channels of the width.


def _channels_macs(*, macs, params, step_in, step_out, **width):
    return macs * (width["in"] // step_in) * (width["out"] // step_out)


def _channels_params(*, macs, params, step_in, step_out, **width):
    return params * (width["in"] // step_in) * (width["out"] // step_out)


# Parameters: a norm has two for each channel. Convolutions of squeeze-excite have biases; other convolutions have none.


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
    # A decision in two slots (a convolution inside one stream) is one axis, so both slots have the same width.
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
    """Entries of one shape, which are summed in one operation. ``tables`` is [n, *shape].

    ``axes`` and ``when`` hold places of probabilities in one flat vector. ``axes`` has an array [n, length of the axis]
    for each axis. ``when`` is [n, conditions].
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

    The gradient is written by hand in numpy, because autograd is slow on so many small products (`expected_cost_share`
    of benchmarks/speed.py).
    """

    @staticmethod
    def forward(ctx: Any, flat: Tensor, batches: Sequence[_Batch]) -> Tensor:
        p, total = flat.detach().numpy(), 0.0
        slope = np.zeros_like(p)
        for batch in batches:
            n, weights, given = len(batch.tables), [p[axis] for axis in batch.axes], p[batch.when]
            share = given.prod(1)
            left, value = batch.tables, batch.tables  # left: the tables, summed over all axes before this one
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
    """The cost of every site for every option, in one metric. `build` and `measured` make tables."""

    def __init__(self, space: Space, metric: str, entries: tuple[_Entry, ...]) -> None:
        self.space, self.metric, self._entries = space, metric, entries
        self._touching: dict[str, list[_Entry]] = {d.name: [] for d in space.decisions}
        for entry in entries:
            for name in {*entry.axes, *(name for name, _ in entry.when)}:
                self._touching[name].append(entry)

    @classmethod
    def build(cls, space: Space, metric: str, sites: Sequence[Site] | None = None) -> "CostTable":
        """The closed-form costs for ``"macs"`` or ``"params"`` of ``sites``, by default of all sites of the space.

        Raises KeyError for another metric or an unknown operation.
        """
        forms, sites = CLOSED_FORMS[metric], space.sites if sites is None else sites
        return cls._merged(space, metric, (_entry(site, space, forms[site.op]) for site in sites))

    @classmethod
    def measured(cls, space: Space, sites: Sequence[Site], table: LatencyTable) -> "CostTable":
        """The costs of ``sites`` in milliseconds. The operation of each site is the name of a unit of ``table``.

        Raises:
            UserError: the table lacks a unit, or the measured widths of a unit do not cover the widths of the space.
        """
        if lines := table.missing(space, sites):
            more = f" and {len(lines) - 1} more" if len(lines) > 1 else ""
            raise UserError(f"the latency table has {len(table.units)} units and lacks {lines[0]}{more}: profile them")
        entries = (_entry(site, space, table.units[site.op].at) for site in sites)
        return cls._merged(space, "ms", entries)

    @classmethod
    def _merged(cls, space: Space, metric: str, entries: Iterable[_Entry]) -> "CostTable":
        merged: dict[tuple, _Entry] = {}  # sites that depend on the same decisions share one table
        for entry in entries:
            key = entry.axes, entry.when
            table = entry.table + merged[key].table if key in merged else entry.table
            merged[key] = _Entry(table, *key)
        return cls(space, metric, tuple(merged.values()))

    @cached_property
    def _layout(self) -> tuple[list[str], list[_Batch]]:
        """The decisions in the order of the flat vector, and the batches. Many tables never need them."""
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
        """The exact cost of one arch: the same sum with one-hot probabilities. It is an int if it is a whole number."""
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
        """The cost of all sites that depend on ``decision``, for each of its options: [number of options].

        All other choices are fixed: ``at`` gives the option *index* of every decision, including decisions without
        effect.
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
        """The cheapest and the most expensive `Arch` of the space, or of its ``live`` options (decision -> indices).

        The result is exact if costs rise with every width, and if a site depends on at most one block decision and on
        whether its own layer stays. This holds for closed forms. It may not hold for a measured table; then each result
        is an optimum in each decision alone.
        """
        live = live or {d.name: range(len(d.options)) for d in self.space.decisions}
        ends = []
        for best, edge in ((np.argmin, 0), (np.argmax, -1)):
            at = {name: options[edge] for name, options in live.items()}
            for d in reversed(self.space.decisions):  # first inner decisions, then those that they depend on
                if not d.is_width:
                    given = at | {name: self.space.by_name[name].index(option) for name, option in d.when}
                    at[d.name] = live[d.name][int(best(self.along(d, given)[list(live[d.name])]))]
            ends.append(self.space.complete({d.name: d.options[at[d.name]] for d in self.space.decisions}))
        return ends[0], ends[1]

    def without(self, gone: set[str]) -> "CostTable":
        """The table without all sites that depend on the decisions ``gone``, because their blocks were removed."""
        return CostTable(
            self.space,
            self.metric,
            tuple(e for e in self._entries if gone.isdisjoint((*e.axes, *(name for name, _ in e.when)))),
        )


def resolve_budgets(tables: Mapping[str, CostTable], budgets: tuple[Budget, ...]) -> tuple[Budget, ...]:
    """The budgets as absolute limits: percentages are of the cost of the widest net.

    Raises UserError if the cheapest network is above a limit, or if every limit is above the most expensive network.
    """
    ranges = {b.metric: tuple(tables[b.metric].of(arch) for arch in tables[b.metric].extremes()) for b in budgets}
    resolved = tuple(b.resolve(ranges[b.metric][1]) for b in budgets)
    for given, b in zip(budgets, resolved, strict=True):
        low, high = ranges[b.metric]
        if b.limit < low or all(other.limit > ranges[other.metric][1] for other in resolved):
            reach = f"{show(b.metric, low)} to {show(b.metric, high)}"
            raise UserError(f"budget {given} is out of reach: the networks of this search space have {reach}")
    return resolved
