"""Random networks at equal cost: in the band, repeatable, and even over all answers that fit."""

import math
from collections import Counter

import numpy as np
import pytest
import scipy.stats
from spaces import Brute, assert_in_band, large, widest_cost

from dnas.methods.derive import BAND
from dnas.methods.rules import random_arch
from dnas.spec.budget import Budget


@pytest.mark.parametrize("name, width_mult", [("mobilenet_v2", 0.5), ("prunet", 0.5)])
def test_random_nets_depend_on_the_seed_and_on_nothing_else(name, width_mult):
    space, tables = large(name, width_mult)
    budgets = (Budget("macs", 0.5 * widest_cost(tables["macs"])),)
    state = np.random.get_state()[1].tolist()
    archs = [random_arch(space, tables, budgets, seed) for seed in range(6)]
    assert archs == [random_arch(space, tables, budgets, seed) for seed in range(6)]
    assert len(set(archs)) == 6
    assert np.random.get_state()[1].tolist() == state
    for arch in archs:
        assert_in_band(tables, budgets, arch)


def test_random_nets_use_the_whole_space():
    space, tables = large("prunet", 0.5)
    budgets = (Budget("macs", 0.3 * widest_cost(tables["macs"])),)
    archs = [random_arch(space, tables, budgets, seed) for seed in range(16)]
    for options in {d.options for d in space.decisions if not d.is_width}:
        alike = [d.name for d in space.decisions if d.options == options]
        assert {arch[name] for arch in archs for name in alike if name in arch} == set(options)
    for name in ("stem", "head", "stage2/width"):
        seen = [space.by_name[name].index(arch[name]) for arch in archs]
        assert max(seen) - min(seen) >= len(space.by_name[name].options) / 2


@pytest.mark.parametrize("name", ["widths", "depth"])
def test_random_nets_are_even_over_the_answers_that_fit(name):
    """Against enumeration, by chi-squared: a net counts once for each answer to the decisions that it leaves out."""
    brute = Brute(name)
    costs = brute.costs["macs"]
    in_reach = [limit for limit in np.quantile(costs, np.linspace(0.05, 0.95, 37)) if fitting(costs, limit).sum() >= 6]
    limit = min(in_reach, key=lambda limit: fitting(costs, limit).sum())
    fits = [arch for arch, fit in zip(brute.archs, fitting(costs, limit), strict=True) if fit]
    unanswered = [math.prod(len(d.options) for d in brute.space.decisions if d.name not in arch) for arch in fits]
    draws = 12 * len(fits)
    seen = Counter(
        random_arch(brute.space, brute.tables, (Budget("macs", limit),), seed).digest for seed in range(draws)
    )
    expected = draws * np.array(unanswered) / sum(unanswered)
    assert scipy.stats.chisquare([seen[arch.digest] for arch in fits], expected).pvalue > 1e-3


def fitting(costs, limit):
    return (costs >= BAND * limit) & (costs <= limit)
