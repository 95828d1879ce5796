"""Benchmarks/arena.py: which methods are shown, and what their means are."""

import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import arena  # noqa: E402


def test_the_arena_counts_a_table_where_all_its_budgets_have_a_network(monkeypatch):
    """Means and order by hand; methods without a row are left out."""
    monkeypatch.setattr(arena, "Table", lambda name: SimpleNamespace(nets=dict, rows=[]))
    monkeypatch.setattr(arena, "judge_method", lambda table, method: {})
    told = {"space": "nats", "dataset": "cifar10", "searches": 3}
    public = [told | {"budget": b, "method": m, "percentile": p} for m, b, p in (
        ("l1", "10%", 60.0), ("l1", "25%", 80.0), ("taylor", "10%", 90.0), ("taylor", "25%", 95.0),
        ("hrank", "10%", 99.0),
    )]  # fmt: skip
    rows = arena.rows_of(public)
    assert [(row["method"], row["nats, cifar10"], row["searches"]) for row in rows] == [
        ("taylor", 92.5, 3),
        ("l1", 70.0, 3),
    ]
    lines = arena.arena_table(rows).splitlines()
    assert lines[2].startswith("| taylor | 3 | 92.50 | - | - | - | - |") and len(lines) == 4
