"""The pair of inner widths: where it starts, what its moves promise, where it ends."""

import math
import random

import pytest
import torch

from dnas.nets.bipath_block import PairGate


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8, 31, 32])
def test_a_pair_starts_at_the_top_and_at_a_quarter(count):
    widths = [8 * (k + 1) for k in range(count)]
    pair = PairGate(widths)
    assert pair.large == widths[-1] and pair.small == max(8, 8 * (count // 4))
    p = pair.probabilities().detach()
    assert p.shape == (count,)
    if count == 1:
        assert p.tolist() == [1.0] and pair.settled and pair.widest() == pair.draw() == pair.best() == 8
        assert pair.update(1.0, 0.0) is None and not list(pair.logits)
    else:
        assert p[[pair.low, pair.high]].tolist() == [0.5, 0.5] and int((p > 0).sum()) == 2


def p_large_of(pair):
    return float(torch.softmax(pair.logits.detach(), 0)[1])


@pytest.mark.parametrize("seed", range(20))
def test_moves_of_a_pair_keep_their_promises(seed):
    rng = random.Random(seed)
    count = rng.choice([2, 3, 4, 7, 16, 32])
    pair = PairGate([8 * (k + 1) for k in range(count)])
    moves = 0
    for _ in range(300):
        pair.logits.data = torch.tensor([rng.gauss(0, 3), rng.gauss(0, 3)])
        threshold, decay = rng.uniform(0.6, 0.95), rng.choice([0.0, 0.5, 0.8])
        average, low, high = pair.average, pair.low, pair.high
        likely = p_large_of(pair)
        moved = pair.update(likely, threshold, decay)
        p_large = decay * average + (1 - decay) * likely
        assert pair.average == pytest.approx(p_large, abs=1e-5)
        assert (pair.low, pair.high) == (low, high)  # update only proposes
        gap, up, down = high - low, p_large > threshold, 1 - p_large > threshold
        if moved is None:
            assert not (up or down) or (gap == 1 and (high == count - 1 if up else low == 0))
            continue
        moves += 1
        assert up or down
        new_low, new_high = moved
        assert 0 <= new_low < new_high < count and new_high - new_low == max(1, gap // 2)
        if gap > 1:  # the winner stays where it is
            assert new_high == high if up else new_low == low
        else:
            assert moved == ((low + 1, high + 1) if up else (low - 1, high - 1))
        pair.move(*moved)
        assert pair.logits.tolist() == [0, 0] and pair.average == 0.5
    assert moves or count == 2


def ending(target, seed, top=256, step=8, steps=800):
    """The inner width that a pair ends with under the loss ((d - target) / top)^2, with noise, by Adam on its logits.

    The gradient of the expected loss on the logits is exact; the threshold falls from 0.9 to 0.7.
    """
    rng = random.Random(seed)
    pair = PairGate(list(range(step, top + 1, step)))
    start = (pair.low, pair.high)
    mean = square = 0.0  # Adam's state, of the difference of the logits
    since = 0
    for k in range(steps):
        q = float(torch.softmax(pair.logits.detach(), 0)[1])
        small, large = (((d - target) / top) ** 2 + rng.gauss(0, 1e-4) for d in (pair.small, pair.large))
        gradient = q * (1 - q) * (large - small)  # of the larger one's logit; the other's is its negative
        since += 1
        mean, square = 0.5 * mean + 0.5 * gradient, 0.99 * square + 0.01 * gradient**2
        step_size = 0.1 * (mean / (1 - 0.5**since)) / (math.sqrt(square / (1 - 0.99**since)) + 1e-8)
        pair.logits.data += torch.tensor([step_size, -step_size])
        moved = pair.update(p_large_of(pair), 0.9 - 0.2 * k / steps)
        if moved:
            pair.move(*moved)
            mean, square, since = 0.0, 0.0, 0
    assert (pair.low, pair.high) != start and pair.high - pair.low == 1
    return pair.best()


@pytest.mark.parametrize("target", [8, 40, 100, 128, 200, 256])
def test_a_pair_ends_within_two_steps_of_the_best_width(target):
    assert all(abs(ending(target, seed) - target) <= 2 * 8 for seed in range(4))


def test_a_pair_of_one_width_is_certain_of_it():
    """As `extract` leaves it: both probabilities fall on the same option."""
    gate = PairGate([8, 16, 24])
    gate.move(1, 1)
    assert gate.probabilities().tolist() == [0, 1, 0]
