"""The budget term of the gates' loss: an annealed target, a penalty on the log ratios."""

import itertools
import math

import numpy as np
import pytest
import torch

from dnas.methods.budget_loss import budget_penalty, ramp, target
from dnas.methods.gates import log_widths
from dnas.nets.layer_supernet import MacroSupernet
from supernets import SUPERNETS


def test_ramp_is_linear_between_two_flat_ends():
    assert [ramp(t, 0.2, 0.7) for t in (0, 0.2, 0.325, 0.45, 0.7, 1)] == pytest.approx([0, 0, 0.25, 0.5, 1, 1])
    assert ramp(0.4, 0.5, 0.5) == 0 and ramp(0.6, 0.5, 0.5) == 1


def test_target_goes_geometrically_from_the_start_to_the_limit():
    steps = [target(800.0, 100.0, k / 3) for k in range(4)]
    assert steps == pytest.approx([800, 400, 200, 100])
    assert target(50.0, 200.0, 0.5) == pytest.approx(100)


def penalty(**ratios):
    """(value, gradient with respect to the logarithm of each ratio)."""
    logs = {m: torch.tensor(math.log(r), dtype=torch.float64, requires_grad=True) for m, r in ratios.items()}
    value = budget_penalty({m: 7e6 * x.exp() for m, x in logs.items()}, dict.fromkeys(ratios, 7e6))
    value.backward()
    return float(value.detach()), [float(x.grad) for x in logs.values()]


@pytest.mark.parametrize("ratio", [0.3, 0.9, 1.1, 4.0])
def test_one_budget_is_pulled_from_both_sides_alike(ratio):
    value, (gradient,) = penalty(macs=ratio)
    assert value == pytest.approx(math.log(ratio) ** 2)
    assert gradient == pytest.approx(2 * math.log(ratio))
    assert penalty(macs=1 / ratio)[0] == pytest.approx(value)


def test_at_the_budget_there_is_no_penalty_and_no_pull():
    assert penalty(macs=1.0) == (0.0, [0.0])
    assert penalty(macs=1.0, params=0.4) == (0.0, [0.0, 0.0])


def test_of_two_budgets_only_the_one_that_binds_pulls_up():
    for macs, params in itertools.product((0.5, 0.8, 1.2, 2.0), repeat=2):
        value, gradients = penalty(macs=macs, params=params)
        logs = np.log([macs, params])
        if logs.max() > 0:  # over a limit: only what is over counts
            assert value == pytest.approx((np.maximum(logs, 0) ** 2).sum())
            assert gradients == pytest.approx((2 * np.maximum(logs, 0)).tolist())
        else:
            assert value == pytest.approx(logs.max() ** 2)
            assert sum(gradients) == pytest.approx(2 * logs.max())
            if macs != params:
                assert gradients[int(logs.argmin())] == 0


def test_log_widths_is_the_mean_over_draws_and_does_not_move_blocks_and_layers():
    """Monte Carlo: networks drawn by the gates, the logarithms of the widths that matter in each summed."""
    torch.manual_seed(0)
    net = MacroSupernet(SUPERNETS["prunet"](num_classes=4, img_size=16, width_mult=0.25))
    for gate in net.gates().values():
        for p in gate.parameters():
            p.data += 0.5 * torch.randn_like(p)
    for layer in net.layers:
        if layer.skip is not None:
            layer.skip.open(0.7, 1.0)
    value = log_widths(net.space, net.probabilities_on_host())
    value.backward()
    widths = {d.name for d in net.space.decisions if d.is_width}
    for name, gate in net.gates().items():
        for p in gate.parameters() if not gate.settled else ():
            moved = p.grad is not None and bool((p.grad != 0).any())
            assert moved == (name in widths), name
    draws, sums = torch.Generator().manual_seed(0), []
    for _ in range(500):
        arch = net.space.complete(net.draw(draws))
        sums.append(sum(math.log(width) for name, width in arch.items() if name in widths))
    error = np.std(sums) / math.sqrt(len(sums))
    assert float(value.detach()) == pytest.approx(np.mean(sums), abs=4 * error)
