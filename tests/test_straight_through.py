"""The gates' hard answers: drawn networks in value, the relaxation in gradient."""

import pytest
import torch
from draws import assert_frequencies, generator
from settled_nets import MACROS, close, images, settled

from dnas.gates import MarkovGate, chain_distribution, gumbel_softmax
from dnas.macro import MacroSupernet
from dnas.prunode import PairGate
from dnas.stochastic import ChoiceGate, SkipGate


def markov_gate(seed=3):
    gate = MarkovGate([3, 5, 10, 11])
    gate.alpha.data = torch.randn(3, generator=generator(seed)) + 0.5
    gate.temperature = 0.7
    return gate


def gradient(answer, upstream, of):
    """d (answer . upstream) / d of."""
    return torch.autograd.grad((answer * upstream).sum(), of)[0]


def test_a_hard_chain_is_a_prefix_whose_length_is_drawn_from_the_chain():
    gate, g = markov_gate(), generator()
    counts = dict.fromkeys(gate.widths, 0)
    for _ in range(3000):
        factor = gate.soft(g, hard=True).detach()
        width = int(factor.sum())
        assert factor.tolist() == [1.0] * width + [0.0] * (11 - width)
        counts[width] += 1
    assert_frequencies(list(counts.values()), chain_distribution(gate.keep()).tolist())


def test_where_the_loss_is_linear_the_gradient_of_every_draw_is_that_of_the_expected_loss():
    """Expected loss by enumeration: sum over widths of P(width) * loss(its prefix)."""
    gate, upstream = markov_gate(), torch.randn(11, generator=generator(1))
    losses = torch.stack([upstream[:width].sum() for width in gate.widths])
    exact = torch.autograd.grad(chain_distribution(gate.keep()) @ losses, gate.alpha)[0]
    for seed in range(5):
        assert torch.allclose(gradient(gate.soft(generator(seed), hard=True), upstream, gate.alpha), exact, atol=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_a_hard_gumbel_sample_is_the_argmax_with_the_gradient_of_the_soft_one(seed):
    logits, upstream = torch.randn(5, generator=generator(seed), requires_grad=True), torch.arange(5.0)
    hard = gumbel_softmax(logits, 0.6, generator(seed), hard=True)
    soft = gumbel_softmax(logits, 0.6, generator(seed))
    assert hard.tolist() == [float(k == int(soft.argmax())) for k in range(5)]
    assert torch.equal(gradient(hard, upstream, logits), gradient(soft, upstream, logits))


@pytest.mark.parametrize("paths", [0, 2])
def test_a_hard_choice_takes_one_block_and_hears_of_the_others(paths):
    gate, upstream = ChoiceGate(list("abcd")), dict(zip("abcd", torch.randn(4, generator=generator(2)), strict=True))
    gate.logits.data = torch.tensor([0.3, -0.2, 0.5, 0.0])
    for seed in range(20):
        soft = gate.soft(generator(seed), paths)
        hard = gate.soft(generator(seed), paths, hard=True)
        assert list(hard) == list(soft)  # the same paths, each still there to be heard
        best = max(soft, key=lambda b: float(soft[b].detach()))
        assert {b: float(w.detach()) for b, w in hard.items()} == {b: float(b == best) for b in soft}
        one, other = (
            torch.autograd.grad(sum(w * upstream[b] for b, w in s.items()), gate.logits) for s in (hard, soft)
        )
        assert torch.allclose(one[0], other[0], atol=1e-7) and bool(one[0].any())


def as_hard(net, answers):
    """The options that hard answers stand for."""
    gates = net.gates()

    def option(name, answer):
        if isinstance(answer, dict):
            return max(answer, key=lambda b: float(answer[b].detach()))
        if isinstance(answer, torch.Tensor) and isinstance(gates[name], PairGate):
            return (gates[name].small, gates[name].large)[int(answer.detach().argmax())]
        return int(answer.detach().sum()) if isinstance(answer, torch.Tensor) else answer

    return {name: option(name, answer) for name, answer in answers.items()}


@torch.no_grad()
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["mobilenet_v2", "mixed-bipath", "mixed-markov"])
def test_a_net_with_hard_answers_is_the_drawn_net(name, training):
    macro = MACROS[name]()
    net = settled(macro).train(training)
    seen = set()
    for seed in range(6):
        answers = net.soft(generator(seed), 2, hard=True)
        drawn = as_hard(net, answers)
        seen.add(tuple(drawn.values()))
        x = images(macro, seed)
        close(net(x, answers), net(x, drawn))
    assert len(seen) == 6


@pytest.mark.parametrize("name", ["mobilenet_v2", "mixed-bipath"])
def test_every_gate_hears_of_the_loss_sooner_or_later(name):
    """A block that was not drawn is multiplied by zero: the gate of its inner width waits for its turn."""
    macro = MACROS[name]()
    net = MacroSupernet(macro)
    learns = [p for g in net.gates().values() if not isinstance(g, SkipGate) for p in g.parameters() if p.numel()]
    heard = [torch.zeros_like(p, dtype=torch.bool) for p in learns]
    for seed in range(30):
        net.zero_grad()
        net(images(macro, seed), net.soft(generator(seed), hard=True)).square().sum().backward()
        for p, h in zip(learns, heard, strict=True):
            h |= p.grad != 0
    assert len(learns) > 5 and all(bool(h.all()) for h in heard)
