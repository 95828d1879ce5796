"""Latency tables: milliseconds of the parts of a search space, measured on one device (see `dnas.latency.profile`).

A table is a JSON file of rows with named fields. It gives the time of each *unit* of a network at some of its widths. A
unit is a set of fused operations or a whole block. Between measured widths the time is interpolated linearly along each
width. The table is not interpolated between units, and not extrapolated beyond the measured widths.
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
SCALES = (0.1, 10)  # a network takes so many times the sum of its parts, at least and at most
HEADER: dict[str, Any] = {
    "schema": (SCHEMA,),
    "device": str,
    "driver": str,
    "runtime": RUNTIMES,
    "dtype": DTYPES,
    "batch": COUNT,  # images in a run; the milliseconds are those of the whole run
    "threads": COUNT,
    "channels_last": (True, False),
    "torch": str,
    "date": str,
    "space": dict,  # the flags that define the space that was profiled: those of `SPACE`
    "protocol": dict,  # how it was measured
    "pace_us": float,  # time of the reference network (`dnas.latency.timing.CpuSpeedReference`) meanwhile; 0: a GPU
    "scale": float,  # milliseconds of a network = this * the sum of the milliseconds of its units ...
    "ms_per_mparam": float,  # ... + this * the millions of `params` of its units (`dnas.latency.profile.fit_scale`)
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
        """The milliseconds at these widths (arrays that broadcast), interpolated between the measured widths.

        The widths must lie between the narrowest and the widest measured width (`LatencyTable.missing`).
        """
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
    """A measured table. ``header`` says on which device and how it was measured (see `HEADER`)."""

    header: Mapping[str, Any]
    units: Mapping[str, Unit]

    def missing(self, space: Space, sites: Sequence[Site]) -> list[str]:
        """The units and widths that these sites need and the table lacks, as one line for each unit."""
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
    """The table of these rows, with the times that units take inside a whole network.

    ``scale`` and ``ms_per_mparam`` of the header convert the rows. Raises UserError as `units_of` does.
    """
    return LatencyTable(header, units_of(rows, header["scale"], header["ms_per_mparam"]))


def units_of(rows: Sequence[Mapping[str, Any]], scale: float = 1.0, ms_per_mparam: float = 0.0) -> dict[str, Unit]:
    """The rows as units: name -> full grid. A row counts ``scale * ms + ms_per_mparam * params / 1e6`` milliseconds.

    Raises UserError if the rows of a unit have different slots, if two rows are at the same widths, or if a row of a
    grid is missing.
    """
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
    """Raise UserError unless every row has widths in known slots, and 0 < p10 <= ms <= p90."""
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
    """The table in a file, whoever wrote the file. Raises UserError with one line if anything is wrong with it."""
    try:
        content = read_json(path, MAX_BYTES)
        check("the table", content, TABLE)
        space = content["space"]
        check("space", space, {key: SPACE.get(key, type(None)) for key in space})
        if content["check"]:
            check("check", content["check"], CHECK)
        check_rows(content["rows"])
        for key, low, high in (("scale", *SCALES), ("ms_per_mparam", 0, 1e6), ("pace_us", 0, 1e6)):
            if not low <= content[key] <= high:
                fail(key, content[key], f"from {low} to {high:g}")
        return table_of({key: content[key] for key in HEADER}, content["rows"])
    except UserError as error:
        raise UserError(f"latency table {path}: {error}") from None


def table_text(header: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """The text of a table's file: strict JSON, with one line for each row."""
    entries = [f" {json.dumps(key)}: {json.dumps(header[key], allow_nan=False)}" for key in HEADER]
    lines = ",\n".join(f"  {json.dumps(row, allow_nan=False)}" for row in rows)
    return "{\n" + ",\n".join(entries) + f',\n "rows": [\n{lines}\n ]\n}}\n'


def check_use(table: LatencyTable, asked: Mapping[str, Any], anyway: bool = False) -> None:
    """Raise UserError if ``table`` was measured with another ``device``, ``dtype``, ``batch``, ... than ``asked``.

    ``asked`` maps names of `USES` to values. Another name is an error. With ``anyway`` it is the only error.
    """
    for key, value in asked.items():
        if key not in USES:
            raise UserError(f"--latency-for {key}={value!r}: {', '.join(USES)} are allowed")
        if table.header[key] != value and not anyway:
            raise UserError(
                f"the latency table is of {key} {table.header[key]!r}, where {value!r} is asked for: "
                "profile that, or insist with --latency-anyway"
            )
