"""Benchmarks/converged.py: which nets are compared, and the table of planted rows."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import converged  # noqa: E402
import iso_flops  # noqa: E402


def test_the_nets_of_a_set_up_keep_its_budget():
    setup = replace(converged.CONVERGED["prunet_25"], data="digits", num_train=100, img_size=8)
    lab = converged.open_lab(setup, "", "cpu")
    limit = lab.budgets[0].limit
    rows = {way: converged.choose(lab, way) for way in ("uniform", "balanced", "widest")}
    assert all(row["kind"] == "net" and row["net"] == way for way, row in rows.items())
    assert all(0.98 * limit <= rows[rule]["macs"] <= limit for rule in ("uniform", "balanced"))
    assert limit == pytest.approx(rows["widest"]["macs"] / 4, abs=1)


def test_a_table_of_planted_rows(tmp_path, monkeypatch):
    """Differences of 1 and 2 points to balanced: 1.5, a standard error of 0.5, Student's t of 12.71 with two seeds."""
    monkeypatch.setattr(iso_flops, "RESULTS", tmp_path)
    table = iso_flops.Table("converged_resnet_50")
    for way, tops in {"balanced": (90.0, 91.0), "default": (91.0, 93.0), "widest": (94.0,)}.items():
        table.append({"kind": "net", "net": way, "macs": 2_500_000})
        for seed, top1 in enumerate(tops):
            table.append({"kind": "training", "net": way, "seed": seed, "top1": top1})
    text = converged.report()
    assert text.startswith("resnet_50:\n\n") and "resnet_25" not in text
    assert "| balanced | 2.50 | 2 | 90.50 | - | - |" in text
    assert "| default | 2.50 | 2 | 92.00 | - | +1.50 [-4.85, +7.85] |" in text
    assert "| widest | 2.50 | 1 | 94.00 | - | +4.00 " in text
