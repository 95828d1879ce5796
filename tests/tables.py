"""Latency tables that nobody measured, for the tests: a function of the widths says what each unit takes."""

import math
from itertools import product

from dnas.latency.measured_parts import parts_of
from dnas.spec.cost import CostTable
from dnas.spec.latency_table import table_of

HEADER = {
    **{"schema": 2, "device": "a device", "driver": "none", "runtime": "eager", "dtype": "float32", "batch": 1},
    **{"threads": 1, "channels_last": False, "torch": "2.6", "date": "2026-01-01", "space": {}, "protocol": {}},
    **{"pace_us": 0.0, "scale": 1.0, "ms_per_mparam": 0.0, "check": {}},
}


def row(unit, ms, **widths):
    return {"unit": unit, "widths": widths, "params": 1000, "ms": ms, "p10": ms, "p90": ms}


def rows_of(net, ms):
    """Rows of all units of a supernet at all widths: ``ms(unit, widths by slot)``."""
    axes = {}
    for part in parts_of(net):  # equal layers may have different widths: a unit has all of them
        own = axes.setdefault(part.site.op, {})
        for slot, options in part.options(net.space).items():
            own[slot] = sorted({*own.get(slot, ()), *options})
    points = [(unit, dict(zip(own, at, strict=True))) for unit, own in axes.items() for at in product(*own.values())]
    return [row(unit, ms(unit, widths), **widths) for unit, widths in points]


def costs_of(net, ms):
    """The milliseconds of a supernet's networks where a unit takes ``ms(unit, widths by slot)``."""
    return CostTable.measured(net.space, [part.site for part in parts_of(net)], table_of(HEADER, rows_of(net, ms)))


def stairs(unit, widths):
    """Steps of 32 channels, as a GPU has them; what a run and the classifier take does not depend on widths."""
    return 0.01 if unit in ("run", "classifier") else 0.1 * math.prod(math.ceil(w / 32) for w in widths.values())
