"""Gates: DMCP's formulas against their definition, autograd and draws; limits, half precision."""

import math

import pytest
import torch
from draws import assert_frequencies, chain_distribution, frequencies, generator
from torch.nn import functional as F

from dnas.nets.bipath_block import PairGate
from dnas.nets.gate import gumbel_softmax
from dnas.nets.layer_choice import ChoiceGate, SkipGate
from dnas.nets.markov_gate import MarkovGate, marginals
from dnas.spec.space import DROP, KEEP

HALF = (torch.float16, torch.bfloat16)


def dmcp_grid(channels, least=0.1, most=1.0, step=0.1):
    """DMCP's own widths: groups of int(step * C / most) below the top, down to about ``least`` of it."""
    size, groups = int(step * channels / most), int((most - least) / step + 1e-4)
    return [channels - size * k for k in range(groups, -1, -1)]


def chain_gate(widths, alpha):
    """A gate with these logits, in double precision."""
    gate = MarkovGate(widths).double()
    gate.alpha.data = torch.as_tensor(alpha, dtype=torch.float64).expand(len(widths) - 1).clone()
    return gate


def expected_width(gate):
    widths = torch.tensor(gate.widths, dtype=torch.float64)
    return chain_distribution(gate.keep()) @ widths


# The Markov chain


@pytest.mark.parametrize("temperature", [1.0, 0.3, 2.5])
def test_marginals_are_the_products_of_the_definition(temperature):
    logits = torch.randn(12, generator=generator(), dtype=torch.float64) * 2
    keep, product = [1.0], 1.0
    for alpha in logits.tolist():
        product *= 1 / (1 + math.exp(-alpha / temperature))
        keep.append(product)
    assert marginals(logits, temperature).tolist() == pytest.approx(keep, rel=1e-12)
    stops = [keep[k] * (1 - keep[k + 1] / keep[k]) for k in range(12)] + [keep[12]]
    assert chain_distribution(marginals(logits, temperature)).tolist() == pytest.approx(stops, rel=1e-9)


def test_a_chain_without_groups_is_certain():
    assert marginals(torch.zeros(0)).tolist() == [1.0] == chain_distribution(torch.ones(1)).tolist()
    gate = MarkovGate([24])
    assert gate.probabilities().tolist() == [1.0] and gate.draw(generator()) == gate.best() == 24
    assert gate.soft().tolist() == [1.0] * 24


def test_chain_distribution_is_where_a_walk_stops():
    """Direct sampling, word by word: go on while the next group is kept, stop at the first that is not."""
    logits = torch.tensor([1.5, -0.5, 0.0, 2.0, 0.7], dtype=torch.float64)
    kept = torch.rand(200_000, 5, generator=generator(), dtype=torch.float64) < torch.sigmoid(logits)
    stops = kept.long().cumprod(1).sum(1).bincount(minlength=6).tolist()
    p = chain_distribution(marginals(logits))
    assert float(p.sum()) == pytest.approx(1, abs=1e-12) and bool((p >= 0).all())
    assert_frequencies(stops, p.tolist())


@pytest.mark.parametrize("channels, expected", [(64, 15.988), (256, 55.951)])
def test_dmcps_own_grid_at_alpha_zero(channels, expected):
    grid = dmcp_grid(channels)
    assert len(grid) == 10 and grid[0] == {64: 10, 256: 31}[channels]
    assert float(expected_width(chain_gate(grid, 0.0)).detach()) == pytest.approx(expected, abs=5e-4)


@pytest.mark.parametrize("channels, group, first", [(64, 6, 10), (128, 12, 20), (512, 51, 53), (2048, 204, 212)])
def test_expected_width_and_its_gradient_are_dmcps(channels, group, first):
    """``E = first + group * sum P(s_k)`` and ``dE / d alpha_k = group * (1 - p_k) * sum_{j >= k} P(s_j)``."""
    grid = dmcp_grid(channels)
    assert grid[0] == first and {b - a for a, b in zip(grid, grid[1:], strict=False)} == {group}
    gate = chain_gate(grid, torch.randn(9, generator=generator(channels), dtype=torch.float64))
    expected, keep = expected_width(gate), gate.keep().detach()
    assert float(expected.detach()) == pytest.approx(first + group * float(keep[1:].sum()), rel=1e-12)
    (gradient,) = torch.autograd.grad(expected, gate.alpha)
    p = torch.sigmoid(gate.alpha.detach())
    closed = [group * float((1 - p[k]) * keep[k + 1 :].sum()) for k in range(9)]
    assert gradient.tolist() == pytest.approx(closed, rel=1e-10)


def test_mean_of_drawn_widths_is_the_expected_width():
    gate = chain_gate(dmcp_grid(64), torch.randn(9, generator=generator(5), dtype=torch.float64) + 0.5)
    g = generator(6)
    widths = torch.tensor([gate.draw(g) for _ in range(4000)], dtype=torch.float64)
    error = float(widths.std()) / math.sqrt(len(widths))
    assert abs(float(widths.mean()) - float(expected_width(gate).detach())) < 4 * error


def test_soft_is_the_marginal_of_each_channels_group():
    gate = chain_gate([3, 5, 10, 11], torch.tensor([1.0, -0.3, 0.4]))
    soft, widths = gate.soft(0.7), torch.arange(11)
    # A channel is there if the width is above its index: the probability of that, from the distribution of widths.
    p = chain_distribution(gate.keep(0.7)).detach()
    there = (torch.tensor(gate.widths)[None] > widths[:, None]).double() @ p
    assert soft.shape == (11,) and torch.allclose(soft.detach(), there, atol=1e-12)
    assert soft[:3].tolist() == [1.0] * 3
    assert float(soft.sum().detach()) == pytest.approx(float(p @ torch.tensor(gate.widths, dtype=p.dtype)), rel=1e-12)


def test_cut_options_have_no_probability_and_no_channels():
    gate = chain_gate([8, 16, 24, 32], torch.tensor([0.5, 0.2, -0.1]))
    gate.widths = gate.widths[:2]  # as surgery does it
    gate.alpha.data = gate.alpha.data[:1].clone()
    p = gate.probabilities()
    assert p.shape == (4,) and p[2:].tolist() == [0, 0] and float(p.sum().detach()) == pytest.approx(1)
    assert gate.soft().shape == (16,) and gate.best() == 16
    assert_frequencies(frequencies(gate, [8, 16], count=1000), p[:2].tolist())


@pytest.mark.parametrize("groups", [1, 9, 31])
@pytest.mark.parametrize("survival", [0.5, 0.9])
def test_the_last_group_starts_with_the_given_marginal(groups, survival):
    gate = MarkovGate(list(range(8, 8 * (groups + 2), 8)), survival)
    assert len(gate.alpha) == groups and len(set(gate.alpha.tolist())) == 1
    assert float(gate.keep()[-1].detach()) == pytest.approx(survival, rel=1e-5)
    if groups == 9 and survival == 0.9:
        assert gate.alpha.tolist() == pytest.approx([4.44] * 9, abs=0.01)


@pytest.mark.parametrize("temperature", [1.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF])
def test_limits_are_exact_and_finite_in_every_precision(dtype, temperature):
    """+100: the widest net bit for bit. -100: the first group alone. And no NaN on the way back."""
    for sign, keep, best in ((1, [1.0] * 33, 264), (-1, [1.0] + [0.0] * 32, 8)):
        gate = MarkovGate(list(range(8, 265, 8))).to(dtype)
        gate.alpha.data.fill_(100.0 * sign)
        assert gate.keep(temperature).dtype == dtype
        assert gate.keep(temperature).tolist() == pytest.approx(keep, abs=1e-40)
        assert gate.best() == best and gate.draw(generator(), temperature=temperature) == best
        soft = gate.soft(temperature)
        assert soft.tolist()[: len(soft) if sign > 0 else 8] == [1.0] * (264 if sign > 0 else 8)
        p = gate.probabilities(temperature)
        assert bool(p.isfinite().all()) and float(p.sum().detach()) == 1
        (soft.sum() + (p * torch.arange(33, dtype=dtype)).sum()).backward()
        assert bool(gate.alpha.grad.isfinite().all())
    infinite = torch.tensor([math.inf, math.inf, -math.inf], dtype=dtype)
    assert marginals(infinite).tolist() == [1, 1, 1, 0]


@pytest.mark.parametrize("dtype", HALF)
def test_mixed_logits_stay_finite_in_half_precision(dtype):
    logits = (torch.rand(40, generator=generator()) * 200 - 100).to(dtype).requires_grad_()
    keep = marginals(logits, 0.3)
    chain = chain_distribution(keep)
    assert bool(keep.isfinite().all()) and bool((keep[1:] <= keep[:-1]).all()) and bool((chain >= 0).all())
    chain.float().square().sum().backward()
    assert bool(logits.grad.isfinite().all())
    # Forty factors of 0.6: a running product in half precision loses its digits, the sum of logarithms does not.
    many = marginals(torch.full((40,), math.log(1.5)).to(torch.float16)).double()
    assert many[20].item() == pytest.approx(0.6**20, rel=0.03)


# Gradients at the start: no gate may be dead from the beginning


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("seed", range(5))
def test_every_logit_has_a_gradient_at_the_start(seed, temperature):
    g = generator(seed)
    markov, choice = MarkovGate(list(range(8, 265, 8))), ChoiceGate(["a", "b", "c", "d"])
    pair, skip = PairGate(list(range(8, 265, 8))), SkipGate()
    skip.is_open = True
    through = {
        "soft": lambda: (
            (markov.soft(temperature) * torch.randn(264, generator=g)).sum()
            + sum(w * k for k, w in enumerate(choice.soft(temperature, g).values()))
            + 3 * pair.soft(temperature, g)[1]
            + 5 * skip.coefficient(temperature)
        ),
        "cost": lambda: sum((p := gate.probabilities(temperature)) @ torch.arange(len(p)).float() for gate in gates),
    }
    gates = (markov, choice, pair, skip)
    for loss in through.values():
        for gate in gates:
            gate.zero_grad()
        loss().backward()
        for gate in gates:
            for p in gate.parameters():
                assert bool((p.grad != 0).all()) and bool(p.grad.isfinite().all()), type(gate).__name__


# The relaxed one-hot sample


def test_argmax_of_a_gumbel_sample_is_distributed_as_the_softmax():
    logits, g = torch.tensor([1.0, 0.0, -1.0, 2.0]), generator()
    for temperature in (0.1, 1.0, 10.0):  # the temperature does not change which is largest
        counts = [0] * 4
        for _ in range(5000):
            sample = gumbel_softmax(logits, temperature, g)
            counts[int(sample.argmax())] += 1
        assert float(sample.sum()) == pytest.approx(1, abs=1e-6)
        assert_frequencies(counts, torch.softmax(logits.double(), 0).tolist())


def test_gumbel_softmax_at_both_ends_of_the_temperature():
    logits = torch.tensor([0.5, -0.2, 0.1])
    for seed in range(50):
        cold = gumbel_softmax(logits, 1e-6, generator(seed))
        hot = gumbel_softmax(logits, 1e6, generator(seed))
        assert sorted(cold.tolist()) == pytest.approx([0, 0, 1], abs=1e-6)
        assert hot.tolist() == pytest.approx([1 / 3] * 3, abs=1e-4)
        assert int(cold.argmax()) == int(hot.argmax())


def test_gumbel_softmax_is_torchs():
    """The mean and the variance of many samples agree with torch's own function."""
    logits, g = torch.tensor([1.0, -1.0, 0.3]), generator()
    ours = torch.stack([gumbel_softmax(logits, 0.7, g) for _ in range(8000)])
    with torch.random.fork_rng():
        torch.manual_seed(1)
        theirs = F.gumbel_softmax(logits.expand(100_000, 3), tau=0.7)
    error = ours.std(0) / math.sqrt(len(ours)) + theirs.std(0) / math.sqrt(len(theirs))
    assert bool(((ours.mean(0) - theirs.mean(0)).abs() < 4 * error).all())
    assert torch.allclose(ours.std(0), theirs.std(0), rtol=0.04)


@pytest.mark.parametrize("dtype", HALF)
def test_gumbel_softmax_is_finite_in_half_precision(dtype):
    for logits in ([100.0, -100.0, 0.0], [-100.0, -100.0, -100.0]):
        for temperature in (0.1, 1.0):
            x = torch.tensor(logits, dtype=dtype, requires_grad=True)
            sample = gumbel_softmax(x, temperature, generator())
            assert sample.dtype == dtype and bool(sample.isfinite().all())
            sample[0].backward()
            assert bool(x.grad.isfinite().all())


def all_gates():
    markov, pair, choice, skip = MarkovGate([8, 16, 24]), PairGate([8, 16, 24, 32]), ChoiceGate(["a", "b"]), SkipGate()
    skip.is_open = True
    skip.kappa.data.zero_()
    markov.alpha.data.zero_()
    return markov, pair, choice, skip


def test_a_generator_repeats_everything_and_leaves_the_global_one_alone():
    def sequence(seed):
        g, found = generator(seed), []
        for _ in range(10):
            found.append(gumbel_softmax(torch.zeros(3), 1.0, g).tolist())
            for gate in all_gates():
                found += [gate.draw(g), gate.draw(g, uniform=True)]
            _, pair, choice, _ = all_gates()
            found += [pair.soft(1.0, g).tolist(), {n: float(w.detach()) for n, w in choice.soft(1.0, g, 2).items()}]
        return found

    state = torch.get_rng_state()
    first = sequence(3)
    assert sequence(3) == first and sequence(4) != first
    assert torch.equal(torch.get_rng_state(), state)


# Draws follow the probabilities


def test_draws_follow_the_probabilities_of_every_gate():
    markov, pair, choice, skip = all_gates()
    markov.alpha.data = torch.tensor([0.8, -0.4])
    pair.logits.data = torch.tensor([0.3, -0.5])
    choice = ChoiceGate(["a", "b", "c"])
    choice.logits.data = torch.tensor([0.2, -1.0, 0.5])
    skip.kappa.data.fill_(-0.2)
    cases = [(markov, markov.widths), (pair, pair.widths), (choice, choice.options), (skip, [DROP, KEEP])]
    for temperature in (1.0, 0.5):
        for gate, options in cases:
            p = gate.probabilities(temperature).detach()
            assert p.shape == (len(options),) and float(p.sum()) == pytest.approx(1, abs=1e-6)
            assert_frequencies(frequencies(gate, options, 2000, temperature=temperature), p.tolist())
            assert gate.best() == options[int(p.argmax())]


def test_uniform_draws_are_even_over_what_is_alive():
    markov, pair, choice, skip = all_gates()
    markov.alpha.data.fill_(4.0)
    pair.logits.data = torch.tensor([5.0, 0.0])
    choice.logits.data = torch.tensor([0.0, 5.0])
    skip.kappa.data.fill_(7.0)
    assert_frequencies(frequencies(markov, markov.widths, uniform=True), [1 / 3] * 3)
    assert_frequencies(frequencies(pair, [pair.small, pair.large], uniform=True), [0.5] * 2)
    assert_frequencies(frequencies(choice, choice.options, uniform=True), [0.5] * 2)
    assert_frequencies(frequencies(skip, [DROP, KEEP], uniform=True), [0.5] * 2)


# The common scale


def test_a_factor_asks_for_no_common_scale_unless_told_to():
    gate = chain_gate([4, 7, 12], 0.5)
    gate.soft().square().sum().backward()
    assert gate.alpha.grad.abs().max() < 1e-12
    gate.soft(with_scale=True).square().sum().backward()
    assert (gate.alpha.grad > 0.5).all()
    worth = torch.randn(12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def loss(alpha):  # what a reader with a norm would see: direction only, at today's loudness
        first, then = torch.sigmoid(alpha).tolist()
        factor = torch.tensor([1.0] * 4 + [first] * 3 + [first * then] * 5, dtype=torch.float64)
        return float((worth * factor).sum() / factor.norm())

    loudness = float(gate.soft().detach().norm())
    gate.alpha.grad = None
    (worth * gate.soft()).sum().backward()
    alpha, step = gate.alpha.detach(), 1e-4
    for k in range(2):
        e = torch.zeros(2, dtype=torch.float64)
        e[k] = step
        slope = loudness * (loss(alpha + e) - loss(alpha - e)) / (2 * step)
        assert float(gate.alpha.grad[k]) == pytest.approx(slope, rel=1e-5)
