"""What moves gates, as benchmarks/last_stream.py measures it."""

import sys
from pathlib import Path

import pytest
import torch
from scipy.optimize import minimize_scalar
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import last_stream  # noqa: E402
from iso_setups import Setup, open_lab  # noqa: E402

from dnas.spec.recipe import Recipe  # noqa: E402

SHORT = Recipe(epochs=4, batch_size=32)
NARROW = {"layers": [1, 1, 1, 1], "channels": [8, 16, 16, 24]}
SETUP = Setup("resnet18", 1, 2, "50%", "digits", 300, 8, SHORT, SHORT, 1, kwargs=NARROW)


@pytest.fixture(scope="module")
def lab():
    return open_lab(SETUP, "", "cpu")


@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
def test_the_best_scale_of_logits_is_the_minimum(scale):
    draws = torch.Generator().manual_seed(0)
    y = torch.randint(5, (200,), generator=draws)
    logits = scale * (torch.randn(200, 5, generator=draws) + F.one_hot(y, 5))
    best = minimize_scalar(lambda s: float(F.cross_entropy(s * logits, y)), bounds=(0, 100), options={"xatol": 1e-9})
    assert float(last_stream.best_scale(logits, y)) == pytest.approx(best.x, rel=1e-2)


@pytest.mark.parametrize("change", ["default", "gates by SGD"])
def test_a_row_says_what_every_gate_is_asked_for(change, lab):
    row = last_stream.look(lab, change, 0)
    assert lab.net.space.check(row["arch"]) and set(row["expected"]) == set(lab.net.space.by_name)
    for point in last_stream.POINTS:
        assert all(set(asked) == set(last_stream.KINDS) for asked in row["forces"][f"{point}"].values())
        pulls = [asked["budget"] for asked in row["forces"][f"{point}"].values()]
        assert len(pulls) > 3 and (max(pulls) <= 0 or min(pulls) >= 0)  # one budget: it pulls all widths one way


def test_a_force_is_the_slope_of_the_loss_over_that_of_the_log_width(lab):
    """Central differences: all logits of one gate shifted by h and -h."""
    torch.manual_seed(0)
    net = lab.supernet().double()
    config = last_stream.GatesConfig(scale_in_gradient=True)
    task = last_stream.Task(lab.tables, lab.budgets, lab.data, SHORT, config, 0)
    search = last_stream.begin(last_stream.GATES, net, task)
    x, y = next(iter(lab.data.train_batches(64, seed=0)))
    x = x.double()
    net.eval()
    name = "layer4.0.conv1"
    gate = net.gates()[name]

    def at(h):
        with torch.no_grad():
            gate.alpha += h
            loss = F.cross_entropy(net(x, net.soft(None, with_scale=True)), y)
            width = last_stream.log_widths(net.space, net.probabilities_on_host())
            gate.alpha -= h
        return float(loss), float(width)

    (up, wide), (down, narrow) = at(1e-4), at(-1e-4)
    found = last_stream.forces(search, task, 0.5, {"held out": (x, y)})
    assert found[name]["held out"] == pytest.approx(-(up - down) / (wide - narrow), rel=1e-2, abs=1e-7)
