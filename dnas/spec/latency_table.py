"""Latency tables: milliseconds of the parts of a search space, measured on one device (see `dnas.latency.profile`).

A table is a JSON file of rows with named fields. It says what the *units* of a network take: fused operations or whole
blocks, at some of their widths. Between measured widths it is interpolated linearly, along one width after the other;
never between units, and never beyond the widths that were measured.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from dnas.spec.checks import UserError, check, fail, read_json
from dnas.spec.image_size import check_size
from dnas.spec.space import Site, Space

SCHEMA = 2
MAX_BYTES = 64_000_000
SLOTS = ("in", "mid", "out")
RUNTIMES = ("eager", "compile", "cudagraph", "onnxruntime")
DTYPES = ("float32", "float16", "bfloat16")
COUNT = range(1, 2**31)
HEADER: dict[str, Any] = {
    "schema": (SCHEMA,),
    "device": str,
    "driver": str,
    "runtime": RUNTIMES,
    "dtype": DTYPES,
    "batch": COUNT,  # images of a run; the milliseconds are those of all of them together
    "threads": COUNT,
    "channels_last": (True, False),
    "torch": str,
    "date": str,
    "space": dict,  # the flags that make what was profiled, of `SPACE`
    "protocol": dict,  # how it was measured
    "pace_us": float,  # time of the network of `dnas.latency.timing.CpuSpeedReference` meanwhile; 0: a GPU
    "scale": float,  # a network takes this times the sum of its units' milliseconds ...
    "ms_per_mparam": float,  # ... and this for every million of numbers that they hold (`fit_scale`)
    "check": dict,  # whole nets, predicted and measured; empty until --check has been run
}
CHECK = {  # see `dnas.latency.profile.check_figures`
    **{"nets": COUNT, "fastest_ms": float, "slowest_ms": float, "median_error": float, "p90_error": float},
    **{"bias": float, "kendall_tau": float, "noise_median_error": float, "noise_kendall_tau": float, "date": str},
}
USES = ("device", "runtime", "dtype", "batch", "threads", "channels_last")
SPACE = {
    **{"supernet": str, "model": str, "model_kwargs": dict, "tie": [str, range(1, 1000)], "width_mult": float},
    **{"divisor": COUNT, "img_size": check_size},
}
# ``params``: parameters and buffers of the unit.
ROW = {"unit": str, "widths": dict, "params": range(2**40), "ms": float, "p10": float, "p90": float}
TABLE = {**HEADER, "rows": [ROW, range(1, 10**6)]}


@dataclass(frozen=True)
class Unit:
    """One unit's milliseconds over a full grid: ``ms`` has an axis for each of ``slots``, along ``widths``."""

    slots: tuple[str, ...]
    widths: tuple[np.ndarray, ...]
    ms: np.ndarray

    def at(self, **slots: np.ndarray) -> np.ndarray:
        """Milliseconds at these widths (arrays that broadcast), which lie within the measured ones: see `missing`."""
        table: np.ndarray = self.ms
        given = np.broadcast_arrays(*(slots[s] for s in self.slots)) if self.slots else [np.zeros(())]
        corners = []
        for width, known in zip(given, self.widths, strict=False):
            low = np.clip(np.searchsorted(known, width, side="right") - 1, 0, max(0, len(known) - 2))
            high = np.minimum(low + 1, len(known) - 1)
            span = np.maximum(known[high] - known[low], 1)
            corners.append(((low, 1 - (width - known[low]) / span), (high, (width - known[low]) / span)))
        total = np.zeros(given[0].shape)
        for corner in product(*corners):
            weight = np.ones(given[0].shape)
            for _, share in corner:
                weight = weight * share
            total = total + weight * table[tuple(index for index, _ in corner)]
        return total


@dataclass(frozen=True)
class LatencyTable:
    """A table as it was measured: ``header`` says on what and how (see `HEADER`)."""

    header: Mapping[str, Any]
    units: Mapping[str, Unit]

    def missing(self, space: Space, sites: Sequence[Site]) -> list[str]:
        """What these sites need and the table does not have, a line each; empty if it is complete."""
        lines = {}
        for site in sites:
            unit = self.units.get(site.op)
            if unit is None or set(unit.slots) != set(site.widths):
                lines[site.op] = site.op
                continue
            for slot, known in zip(unit.slots, unit.widths, strict=True):
                width = site.widths[slot]
                options = space.by_name[width].options if isinstance(width, str) else (width,)
                if not known[0] <= min(options) or not max(options) <= known[-1]:
                    asked = " to ".join(str(w) for w in dict.fromkeys((min(options), max(options))))
                    lines[site.op] = f"{site.op} with {slot} {asked}, where {known[0]} to {known[-1]} were measured"
        return list(lines.values())


def table_of(header: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> LatencyTable:
    """The table of these rows in a whole network, as its header scales them. Raises UserError as `units_of` does."""
    return LatencyTable(header, units_of(rows, header["scale"], header["ms_per_mparam"]))


def units_of(rows: Sequence[Mapping[str, Any]], scale: float = 1.0, ms_per_mparam: float = 0.0) -> dict[str, Unit]:
    """Rows by unit, as full grids. UserError for a row that is there twice, or that a grid lacks."""
    found: dict[str, dict[tuple[int, ...], float]] = {}
    slots: dict[str, tuple[str, ...]] = {}
    for row in rows:
        own = tuple(slot for slot in SLOTS if slot in row["widths"])
        if slots.setdefault(row["unit"], own) != own:
            raise UserError(f"the rows of unit {row['unit']!r} have different widths: {slots[row['unit']]} and {own}")
        points, at = found.setdefault(row["unit"], {}), tuple(row["widths"][slot] for slot in own)
        if at in points:
            raise UserError(f"there are two rows of {_place(row['unit'], own, at)}: one is allowed")
        points[at] = scale * row["ms"] + ms_per_mparam * row["params"] / 1e6
    units = {}
    for name, points in found.items():
        axes = [sorted({at[k] for at in points}) for k in range(len(slots[name]))]
        for at in product(*axes):
            if at not in points:
                raise UserError(f"the row of {_place(name, slots[name], at)} is missing: all of a grid are needed")
        ms = np.array([points[at] for at in product(*axes)]).reshape([len(axis) for axis in axes])
        units[name] = Unit(slots[name], tuple(np.array(axis) for axis in axes), ms)
    return units


def _place(unit: str, slots: Sequence[str], at: Sequence[int]) -> str:
    return f"unit {unit!r} at {', '.join(f'{slot} {width}' for slot, width in zip(slots, at, strict=True))}"


def check_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    """Raise UserError unless widths are widths, and milliseconds above 0 and between their tenths."""
    for k, row in enumerate(rows):
        if not row["widths"].keys() <= {*SLOTS}:
            raise UserError(
                f"rows[{k}].widths has {', '.join(map(repr, row['widths']))[:80]}: {', '.join(SLOTS)} are allowed"
            )
        for slot, width in row["widths"].items():
            check(f"rows[{k}].widths.{slot}", width, COUNT)
        if not 0 < row["p10"] <= row["ms"] <= row["p90"]:
            ms = ", ".join(f"{key} {row[key]}" for key in ("p10", "ms", "p90"))
            raise UserError(f"rows[{k}] has {ms}: it must be 0 < p10 <= ms <= p90")


def read_table(path: str | Path) -> LatencyTable:
    """The table in a file, whoever wrote it. Raises UserError, in one line, if anything is wrong with it."""
    try:
        content = read_json(path, MAX_BYTES)
        check("the table", content, TABLE)
        space = content["space"]
        check("space", space, {key: SPACE.get(key, type(None)) for key in space})
        if content["check"]:
            check("check", content["check"], CHECK)
        check_rows(content["rows"])
        for key, low, high in (("scale", 0.1, 10), ("ms_per_mparam", 0, 1e6), ("pace_us", 0, 1e6)):
            if not low <= content[key] <= high:
                fail(key, content[key], f"from {low} to {high:g}")
        return table_of({key: content[key] for key in HEADER}, content["rows"])
    except UserError as error:
        raise UserError(f"latency table {path}: {error}") from None


def table_text(header: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """The file: strict JSON, a row a line."""
    entries = [f" {json.dumps(key)}: {json.dumps(header[key], allow_nan=False)}" for key in HEADER]
    lines = ",\n".join(f"  {json.dumps(row, allow_nan=False)}" for row in rows)
    return "{\n" + ",\n".join(entries) + f',\n "rows": [\n{lines}\n ]\n}}\n'


def check_use(table: LatencyTable, asked: Mapping[str, Any], anyway: bool = False) -> None:
    """Raise UserError where ``table`` is of another ``device``, ``dtype``, ``batch``, ... than ``asked``.

    With ``anyway`` only what no table can be asked for is an error.
    """
    for key, value in asked.items():
        if key not in USES:
            raise UserError(f"--latency-for {key}={value!r}: {', '.join(USES)} are allowed")
        if table.header[key] != value and not anyway:
            raise UserError(
                f"the latency table is of {key} {table.header[key]!r}, where {value!r} is asked for: "
                "profile that, or insist with --latency-anyway"
            )
