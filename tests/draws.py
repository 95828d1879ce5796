"""Draws of gates for the tests: a seeded generator, counts, and whether they fit the probabilities."""

import math

import torch


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def assert_frequencies(counts, probabilities, sigmas=4.5):
    """Counts of draws agree with the probabilities, each within its binomial standard error."""
    total = sum(counts)
    for count, p in zip(counts, probabilities, strict=True):
        error = math.sqrt(max(p * (1 - p), 0) / total)
        assert abs(count / total - p) <= sigmas * error + 1e-12, (counts, probabilities)


def frequencies(gate, options, count=4000, seed=0, **how):
    draws, g = [], generator(seed)
    for _ in range(count):
        draws.append(gate.draw(g, **how))
    assert set(draws) <= set(options)
    return [draws.count(option) for option in options]


def chain_distribution(keep):
    """Where a chain stops, ``P(width = k) = P(s_k) - P(s_{k+1})``, from its marginals, [G + 1] each."""
    return keep - torch.cat([keep[1:], keep.new_zeros(1)])
