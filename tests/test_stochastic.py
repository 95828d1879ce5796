"""The choice among blocks and the skip: samples, removal, thresholds, coefficients."""

import itertools
import random

import pytest
import torch
from draws import assert_frequencies, frequencies, generator

from dnas.nets.gate import gumbel_softmax
from dnas.nets.layer_choice import ChoiceGate, SkipGate
from dnas.spec.space import DROP, KEEP

# The choice among blocks


@pytest.mark.parametrize("paths", [0, 1, 2, 3, 5, 9])
def test_a_soft_choice_takes_the_largest_of_one_sample(paths):
    options = ["a", "b", "c", "d", "e"]
    choice = ChoiceGate(options)
    choice.logits.data = torch.tensor([0.1, -0.3, 0.7, 0.0, 0.2])
    for seed in range(30):
        picks = choice.soft(0.8, generator(seed), paths)
        sample = gumbel_softmax(choice.logits, 0.8, generator(seed)).detach()
        taken = sample.topk(min(paths or 5, 5)).indices.sort().values.tolist()
        assert list(picks) == [options[k] for k in taken]
        weights = [float(w.detach()) for w in picks.values()]
        assert sum(weights) == pytest.approx(1, abs=1e-6)
        assert weights == pytest.approx((sample[taken] / sample[taken].sum()).tolist(), abs=1e-6)


def seen(gate, temperature=1.0):
    return gate.probabilities(temperature).detach().double().numpy()


def removed(choice, name):
    """What surgery does to the gate when it removes a block."""
    gone = choice.alive.index(choice.options.index(name))
    keep = [k for k in range(len(choice.alive)) if k != gone]
    choice.alive, choice.logits.data = [choice.alive[k] for k in keep], choice.logits.data[keep].clone()


def test_removed_blocks_are_gone_from_every_answer():
    choice = ChoiceGate(["a", "b", "c", "d"])
    choice.logits.data = torch.tensor([3.0, 0.2, 2.0, 0.1])
    removed(choice, "a")
    removed(choice, "c")
    p = choice.probabilities().detach()
    assert p[[0, 2]].tolist() == [0, 0] and p[[1, 3]].tolist() == pytest.approx(
        torch.softmax(torch.tensor([0.2, 0.1]), 0).tolist()
    )
    assert_frequencies(frequencies(choice, ["b", "d"], count=1000), p[[1, 3]].tolist())
    assert choice.best() == "b" and set(choice.soft(1.0, generator())) == {"b", "d"}
    removed(choice, "b")
    assert choice.settled and choice.widest() == choice.best() == choice.draw(generator()) == "d"
    assert choice.probabilities().tolist() == [0, 0, 0, 1] and choice.below(1.1, seen(choice)) == []


def test_below_names_the_least_likely_first_and_never_the_best():
    rng = random.Random(0)
    for _ in range(200):
        options = [f"block{k}" for k in range(rng.randint(1, 8))]
        choice = ChoiceGate(options)
        choice.logits.data = torch.tensor([rng.gauss(0, 2) for _ in options])
        temperature = rng.choice([1.0, 0.3])
        softmax = torch.softmax(choice.logits.detach() / temperature, 0)
        p = dict(zip(options, softmax.tolist(), strict=True))
        threshold = rng.random() * 1.2
        names = choice.below(threshold, seen(choice, temperature))
        assert choice.best() not in names
        assert names == sorted(names, key=p.get)
        assert set(names) == {n for n in options if p[n] < threshold} - {choice.best()}
    choice = ChoiceGate(["a", "b", "c"])
    assert choice.below(0.0, seen(choice)) == []
    assert len(choice.below(1.0, seen(choice))) == 2  # a tie: all but one


@pytest.mark.parametrize("seed", range(6))
def test_a_threshold_that_rises_to_one_half_leaves_the_best_block(seed):
    """Eight blocks of fixed quality, gradient descent on the expected loss, blocks under the threshold removed."""
    g = generator(seed)
    loss = torch.rand(8, generator=g)
    choice = ChoiceGate([str(k) for k in range(8)])
    for step in range(300):
        choice.logits.grad = None
        (choice.probabilities() @ loss).backward()
        gradient = choice.logits.grad + 0.003 * torch.randn(choice.logits.shape, generator=g)
        choice.logits.data -= 2.0 * gradient
        for name in choice.below(0.5 * step / 299, seen(choice)):
            removed(choice, name)
    assert choice.live() == [int(loss.argmin())]


# The skip


def test_a_skip_is_closed_then_open_then_removed():
    skip, g = SkipGate(), generator()
    for temperature in (1.0, 0.3):
        assert skip.probabilities(temperature).tolist() == [0.0, 1.0]
        assert skip.settled and skip.widest() == skip.best() == KEEP
        assert all(skip.draw(g, uniform, temperature) == KEEP for uniform in (False, True) for _ in range(50))
    for temperature, start in itertools.product((1.0, 0.7, 0.3), (0.6, 0.9, 0.999)):
        skip.open(start, temperature)
        s = skip.coefficient(temperature)
        assert s.shape == () and s.requires_grad and float(s.detach()) == pytest.approx(start, abs=1e-6)
        assert skip.probabilities(temperature).tolist() == pytest.approx([1 - start, start], abs=1e-6)
        assert skip.best() == KEEP and not skip.settled and skip.live() == [0, 1]
        assert float(skip.coefficient(temperature / 2).detach()) > start  # cooler is sharper
    for kappa in (2.0, 0.01, -0.01, -2.0):
        skip.kappa.data.fill_(kappa)
        s = float(skip.coefficient().detach())
        assert (s > 0.5) == (kappa > 0) and skip.best() == (KEEP if s > 0.5 else DROP)
        skip.kappa.data.fill_(-kappa)
        assert float(skip.coefficient().detach()) == pytest.approx(1 - s, abs=1e-6)
    skip.kappa.data.fill_(5.0)
    skip.is_removed = True
    assert skip.probabilities().tolist() == [1.0, 0.0] and skip.settled and skip.widest() == skip.best() == DROP
    assert all(skip.draw(g, uniform) == DROP for uniform in (False, True) for _ in range(20))
