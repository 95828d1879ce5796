"""A part of a run that is stopped by signals, and goes on from what is on disk."""

import pytest
import torch

from dnas.methods.gates import GATES
from dnas.methods.loop import begin, load_search, run, search_data
from dnas.runtime.checkpoint import Journal, Stopped

CPU = torch.device("cpu")


class Asked:
    """A signal, once so many steps have been taken."""

    def __init__(self, after):
        self.left = after

    def __call__(self):
        self.left -= 1
        return 15 * (self.left < 0)


def in_parts(folder, afters, part):
    """``part(journal)``, stopped by a signal after so many steps of each of ``afters``, and begun again; its result."""
    for after in afters:
        journal = Journal(folder, CPU, 1e9, Asked(after))
        with pytest.raises(Stopped) as stop:
            part(journal)
        assert stop.value.signal == 15
    return part(Journal(folder, CPU, 1e9, int))


def part_of_search(start):
    """The part that is a search by gates: ``start()`` gives a fresh (net, task). Its result: the net, and all rows."""

    def part(journal):
        (net, task), rows = start(), []
        state = begin(GATES, net, task)
        if saved := journal.under_way("search"):
            load_search(GATES, state, saved["search"])
            rows += saved["rows"]

        def on_row(row):
            rows.append({key: value for key, value in row.items() if not key.endswith("_ms")})
            journal.step("search", lambda: {"search": search_data(GATES, state), "rows": rows})

        run(GATES, state, task, on_row=on_row)
        return net, rows

    return part
