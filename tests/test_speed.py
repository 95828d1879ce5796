"""What benchmarks/speed.py makes of its timings, against planted ones; that what it times is what it says."""

import argparse
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import speed  # noqa: E402

SMALL = argparse.Namespace(device="cpu", batch_size=8, img_size=16, steps=20, repeats=3, amp=False, threads=1)


def test_what_gates_cost_is_a_ratio_of_steps_in_turn(monkeypatch):
    """Planted times, the first round being the warm-up; the steps themselves are taken and must be what they say."""
    losses = []

    def planted(step, device):
        losses.append(step())
        turn, kind = divmod(len(losses) - 1, 4)
        return turn * (1, 1, 1.5, 2)[kind] if turn else 100

    monkeypatch.setattr(speed, "milliseconds", planted)
    row = speed.gates_cost("test_resnet", SMALL)
    assert (row["plain_ms"], row["open"], row["drawn"], row["soft"]) == (2, [1] * 3, [1.5] * 3, [2] * 3)
    rounds = [losses[k : k + 4] for k in range(0, 16, 4)]
    assert all(plain == whole and plain not in (drawn, soft) for plain, whole, drawn, soft in rounds)
    assert len({drawn for *_, drawn, _ in rounds}) == 4


def test_the_cost_of_a_search_is_that_of_its_images(monkeypatch):
    """Weight steps of twice, gate steps of three times a plain step; both halve after the tenth of twenty steps."""
    rows = []
    for k in range(20):
        pace = 1 if k < 10 else 0.5
        rows.append({"weight_ms": 20.0 * pace, "live_macs": 100 * pace})
        if k % 2 == 0:
            rows[-1] |= {"gate_ms": 30.0 * pace, "images": 8}
        if k == 12:
            rows[-1] |= {"gate_ms": 30.0 * pace + 50, "shrink_ms": 50.0}
    monkeypatch.setattr(speed, "searched", lambda name, args, pair: (rows, [10.0] * 20, [0.5] * 10, [0.4, 0.2, 0.3]))
    row = speed.search_cost("toy", SMALL)
    # Ten steps: 200 ms for weights and 150 for gates, over 15 batches; later half of it, and once 50 ms for shrinking.
    # The first ten after the first gate step: eight and two of each kind of weight step, four gate steps and one.
    assert row["relative_cost_first"] == pytest.approx((160 + 20 + 120 + 15) / 150, abs=1e-4)
    assert row["relative_cost_last"] == pytest.approx((100 + 75 + 50) / 150, abs=1e-4)
    assert row["relative_cost_mean"] == pytest.approx((350 + 225) / 300, abs=1e-4)
    assert row["shrink_in_steps"] == [2.0, 2.0, 2.0] and row["shrinks"] == 1 and row["macs_left"] == 0.5
    assert row["plain_step_of_last_net"] == [0.3, 0.2, 0.4]
    assert row["expected_cost_share"] == [0.015, 0.01, 0.02]
    assert row["expected_cost_of_search"] == pytest.approx(10 * 0.5 / 575, abs=1e-4)


def test_a_search_that_is_timed_is_a_search():
    rows, plain, expected, ends = speed.searched("mobilenet_v2", SMALL, pair=True)
    assert len(ends) == 11 and min(ends) > 0
    assert len(plain) == len(rows) > 100 and min(plain) > 0  # an epoch of 1006 images is the least
    assert len(expected) == sum("gate_ms" in row for row in rows) > 20
    assert rows[-1]["live_macs"] < rows[0]["live_macs"]
    assert all(0 < row["shrink_ms"] < row["gate_ms"] for row in rows if row.get("events"))


@pytest.mark.parametrize("what, count", [("pairs", 4), ("pairs", 64), ("chains", 2), ("chains", 64), ("blocks", 8)])
def test_spaces_of_many_widths_and_blocks(what, count):
    net = speed.scaled(what, count)
    mids = [len(d.options) for d in net.space.decisions if d.name.endswith("/mid")]
    blocks = [len(d.options) for d in net.space.decisions if d.name.endswith("/block")]
    if what == "blocks":
        assert blocks == [count] * 3
    else:
        assert not blocks and len(mids) == 3 and 0.9 * count <= mids[0] <= count
    speed.both_steps(net, SMALL)()


def test_memory_is_that_of_the_work():
    """In a process whose work takes 200 MiB and gives them back, started by one that holds more than that."""
    ballast = torch.ones(300 * 2**18)
    code = f"""
import argparse, sys
sys.path.insert(0, {str(Path(speed.__file__).parent)!r})
import speed, torch
speed.searched = lambda name, args, pair: torch.ones(200 * 2**18).sum()
print(speed.peak_of("search", "", argparse.Namespace(device="cpu", threads=1)))
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert 195 < float(done.stdout) < 240
    assert ballast.numel()
