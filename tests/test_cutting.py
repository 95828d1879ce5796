"""How scores cut: by a threshold, in several steps, with weights that rewind or are kept."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scoring import INNER, SCORES, batches, begun
from spaces import Brute, assert_in_band
from test_methods import METHODS

from dnas.export.model_file import build_net
from dnas.methods.loop import run
from dnas.methods.rank_and_cut import above_threshold, dense_arch
from dnas.nets.shrink import plain_state
from dnas.spec.budget import Budget


def test_a_threshold_keeps_the_best_channels_of_all_layers():
    """By brute force over thresholds: everything that the lowest feasible one keeps is kept, in the band."""
    brute, rng = Brute("widths"), np.random.default_rng(2)
    space, left = brute.space, dense_arch(brute.space)
    for _ in range(5):
        scores = {d.name: torch.from_numpy(rng.exponential(size=d.options[-1])) for d in space.decisions}
        limit = float(rng.choice(brute.costs["macs"]))
        budgets = (Budget("macs", limit),)
        if not brute.band(budgets).any():
            continue
        arch = above_threshold(space, brute.tables, budgets, scores, left)
        assert_in_band(brute.tables, budgets, arch)

        def kept(threshold, scores=scores):
            widths = {}
            for d in space.decisions:
                best = scores[d.name].sort(descending=True).values
                steps = zip(d.options, d.options[1:], strict=False)
                means = [(b, float(best[a:b].mean())) for a, b in steps]
                widths[d.name] = max([d.options[0], *(b for b, mean in means if mean >= threshold)])
            return space.complete(widths)

        thresholds = sorted({float(s) for score in scores.values() for s in score} | {0.0})
        feasible = [kept(t) for t in thresholds if brute.tables["macs"].of(kept(t)) <= limit]
        assert all(arch[name] >= width for name, width in feasible[0].items())


@pytest.mark.parametrize("cut", ["knapsack", "threshold"])
@pytest.mark.parametrize("name", ["l1", "slimming"])
def test_kept_weights_are_those_of_the_best_channels(name, cut):
    """The exported network computes what the dense one does with the factors of all other channels at zero."""
    search, task = begun(name, cut=cut)
    net, x = search.net.eval(), torch.randn(4, 3, 8, 8)
    scores = SCORES[name](search, task)
    with torch.no_grad():
        before = {n: s.clone() for n, s in scores.items()}
        arch = METHODS[name].choose(search, task)
        plain = build_net(net.net_of(arch), num_classes=10, in_chans=3).eval()
        plain.load_state_dict(plain_state(net, arch))
        torch.testing.assert_close(plain(x), net(x, arch), rtol=1e-4, atol=1e-5)
        after = SCORES[name](search, task)
    for decision, width in arch.items():
        units = int(width) * len(before[decision]) // int(search.own.arch[decision])
        torch.testing.assert_close(after[decision][:units], before[decision].sort(descending=True).values[:units])


def test_several_cuts_lower_the_cost_by_the_same_factor():
    search, task = begun("dropnet", cuts=3)
    start = {name: p.detach().clone() for name, p in search.net.named_parameters()}
    dense, costs, live = search.own.arch, [], []
    run(
        METHODS["dropnet"],
        search,
        task,
        on_row=lambda row: (costs.append(task.tables["macs"].of(search.own.arch)), live.append(row["live_macs"])),
    )
    reached = [*dict.fromkeys(costs)]
    total, limit = task.tables["macs"].of(dense), task.limits["macs"]
    for k, cost in enumerate(reached):
        assert 0.98 <= cost / (total ** (1 - k / 3) * limit ** (k / 3)) <= 1
    assert len(reached) == 3 and live == costs
    assert METHODS["dropnet"].choose(search, task).keys() == dense.keys()
    fc = search.net.model.fc.bias
    assert not torch.equal(fc, start["model.fc.bias"])


@pytest.mark.parametrize("cut", ["knapsack", "threshold"])
def test_many_cuts_never_need_what_is_cut_off(cut):
    """On a coarse grid some costs on the way have no network: such a cut is left out, and the search goes on."""
    search, task = begun("l1", cuts=10, cut=cut)
    task = replace(task, budgets=(Budget("macs", 0.2 * task.tables["macs"].of(search.own.arch)),))
    live = []
    run(METHODS["l1"], search, task, on_row=lambda row: live.append(row["live_macs"]))
    assert live == sorted(live, reverse=True) and len(set(live)) > 3
    assert_in_band(task.tables, task.budgets, METHODS["l1"].choose(search, task))


def test_weights_rewind_to_those_of_the_start():
    """Right after a cut every scale of a norm is one of the start, and the learning rate is that of a start."""
    search, task = begun("dropnet", cuts=2)
    start = {name: set(p.tolist()) for name, p in search.net.model.named_parameters() if p.ndim == 1}
    rates, after = [], []

    def on_row(row):
        rates.append(search.learner.optimizer.param_groups[0]["lr"])
        if row.get("events"):
            after.append({name: p.tolist() for name, p in search.net.model.named_parameters() if p.ndim == 1})

    run(METHODS["dropnet"], search, task, on_row=on_row)
    (found,) = after
    assert all(set(values) <= start[name] for name, values in found.items())
    assert sum(map(len, found.values())) < sum(map(len, start.values()))
    half = len(rates) // 2
    np.testing.assert_allclose(rates[:half], rates[half : 2 * half], rtol=0.15, atol=2e-4)


def test_buffers_of_the_optimizer_go_with_their_channels():
    search, task = begun("l1")
    x, y = batches(task, 1)[0]
    METHODS["l1"].loss(search, task, x, y, 0.0).backward()
    search.learner.optimizer.step()
    conv = search.net.model.layer2[0].conv1
    before = search.learner.optimizer.state[conv.weight]["exp_avg"].clone()
    weight, order = conv.weight.detach().clone(), torch.arange(len(conv.weight)).flip(0)
    search.net.reorder({INNER: order}, [search.learner.optimizer])
    state = search.learner.optimizer.state[conv.weight]["exp_avg"]
    assert torch.equal(conv.weight.detach(), weight[order]) and torch.equal(state, before[order])
