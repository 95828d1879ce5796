"""Latency tables that nobody measured, for the tests: a function of the widths says what each unit takes."""

import math
from itertools import product

from dnas.cost import CostTable
from dnas.deployed import parts_of
from dnas.latency import table_of

HEADER = {
    **{"schema": 1, "device": "a device", "driver": "none", "runtime": "eager", "dtype": "float32", "batch": 1},
    **{"threads": 1, "channels_last": False, "torch": "2.6", "date": "2026-01-01", "space": {}, "protocol": {}},
    **{"scale": 1.0, "check": {}},
}


def row(unit, ms, **widths):
    return {"unit": unit, "widths": widths, "ms": ms, "p10": ms, "p90": ms}


def rows_of(net, ms):
    """Rows of all units of a supernet at all widths: ``ms(unit, widths by slot)``."""
    found = {}
    for part in parts_of(net):
        options = part.options(net.space)
        for at in product(*options.values()):
            widths = dict(zip(options, at, strict=True))
            found[part.site.op, at] = row(part.site.op, ms(part.site.op, widths), **widths)
    return list(found.values())


def costs_of(net, ms):
    """The milliseconds of a supernet's networks where a unit takes ``ms(unit, widths by slot)``."""
    return CostTable.measured(net.space, [part.site for part in parts_of(net)], table_of(HEADER, rows_of(net, ms)))


def stairs(unit, widths):
    """Steps of 32 channels, as a GPU has them; what a run and the classifier take does not depend on widths."""
    return 0.01 if unit in ("run", "classifier") else 0.1 * math.prod(math.ceil(w / 32) for w in widths.values())
