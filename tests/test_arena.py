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
    public = [told | {"budget": b, "method": m, "percentile": sum(p) / len(p), "percentiles": p} for m, b, p in (
        ("l1", "10%", [59.0, 61.0]), ("l1", "25%", [78.0, 82.0]), ("taylor", "10%", [90.0]), ("taylor", "25%", [95.0]),
        ("hrank", "10%", [99.0]),
    )]  # fmt: skip
    rows = arena.rows_of(public)
    assert [(row["method"], row["nats, cifar10"], row["searches"]) for row in rows] == [
        ("taylor", 92.5, 3),
        ("l1", 70.0, 3),
    ]
    lines = arena.arena_table(rows).splitlines()
    assert lines[2].startswith("| taylor | 3 | 92.50 | - | - | - | - |") and len(lines) == 4
    half = 12.7062 * 3 / 2  # means of the two searches: 68.5 and 71.5; Student's t of one degree of freedom
    assert lines[3].startswith(f"| l1 | 3 | 70.00 [{70 - half:.1f}, {70 + half:.1f}] |")


def test_published_claims_are_counted_by_cells():
    """Where both methods have a network: better at 10 %, equal at 25 %; 50 % has but one of them."""
    told = {"space": "nats", "dataset": "cifar10", "searches": 2}
    public = [told | {"budget": b, "method": m, "minus_balanced": [gap, None, None]} for m, b, gap in (
        ("lasso", "10%", 0.5), ("l1", "10%", -0.5), ("lasso", "25%", -1.0), ("l1", "25%", -1.0), ("l1", "50%", 3.0),
    )]  # fmt: skip
    (line,) = arena.claims_table(public).splitlines()[2:]
    assert line.startswith("| lasso | l1 |") and line.endswith("| 2 | 1 / 1 / 0 | +0.50 [+0.00, +1.00] |")
