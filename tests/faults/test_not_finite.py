"""A step whose gradients are not finite is skipped and counted; many in a row end the run in a line."""

import math

import pytest
import torch
from torch import nn

from dnas.methods.gates import GATES
from dnas.methods.loop import search
from dnas.methods.method import Task
from dnas.methods.settings import GatesConfig
from dnas.nets.layer_supernet import MacroSupernet
from dnas.spec.budget import Budget
from dnas.spec.checks import UserError
from dnas.spec.cost import CostTable
from dnas.spec.recipe import Recipe
from dnas.training.data import load_data
from dnas.training.loop import MAX_SKIPPED, make_learner, train
from supernets import SUPERNETS


def net_of():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))


def run(bad, recipe, steps=12):
    """Train with the loss times ``bad(step)``; (model, learner, losses)."""
    model, data, step = net_of(), load_data(img_size=8), 0

    def forward(x):
        nonlocal step
        step += 1
        return model(x * bad(step - 1)) if bad(step - 1) is math.inf else model(x) * bad(step - 1)

    learner = make_learner(model, model.parameters(), recipe, len(data.train_batches(recipe.batch_size, seed=0)))
    losses = []
    criterion = nn.CrossEntropyLoss(label_smoothing=recipe.smoothing)
    for loss in train(
        lambda x, y: criterion(forward(x), y), learner, data.train_batches(recipe.batch_size, seed=0), recipe
    ):
        losses.append(loss)
        if len(losses) == steps:
            break
    return model, learner, losses


@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_batch_costs_its_step_and_no_more(bad, clip):
    """Steps 3 and 4 are bad: the weights stay as they were, the statistics of the norm are mended, learning goes on."""
    recipe = Recipe(batch_size=32, epochs=2, clip_grad=clip)
    model, learner, losses = run(lambda k: bad if k in (3, 4) else 1.0, recipe, steps=5)
    before = run(lambda k: 1.0, recipe, steps=3)[0]
    assert learner.skipped == 2 and learner.skipped_now == 2 and not math.isfinite(losses[3])
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters(), strict=True))
    model, learner, losses = run(lambda k: bad if k in (3, 4) else 1.0, recipe)
    assert learner.skipped == 2 and learner.skipped_now == 0 and all(map(math.isfinite, losses[5:]))
    assert all(t.isfinite().all() for t in model.state_dict().values())


def test_bad_steps_without_end_are_one_line():
    with pytest.raises(UserError, match=f"loss is nan at step {MAX_SKIPPED + 1}, and {MAX_SKIPPED} steps in a row"):
        run(lambda k: math.nan if k > 1 else 1.0, Recipe(batch_size=16, epochs=2), steps=99)


def test_a_search_skips_bad_steps_of_weights_and_gates():
    torch.manual_seed(0)
    net = MacroSupernet(SUPERNETS["prunet"](num_classes=10, img_size=8, width_mult=0.25))
    tables, rows = {m: CostTable.build(net.space, m) for m in ("macs", "params")}, []
    calls, plain = 0, net.forward

    def forward(x, answers):
        nonlocal calls
        calls += 1
        return plain(x, answers) * (math.nan if calls % 17 == 0 else 1.0)

    net.forward = forward
    limit = 0.5 * tables["macs"].of(tables["macs"].extremes()[1])
    recipe = Recipe(epochs=4, batch_size=64, smoothing=0.0)
    data, budgets = load_data(img_size=8), [Budget("macs", limit)]
    search(GATES, net, Task(tables, budgets, data, recipe, GatesConfig(), 0), on_row=rows.append)
    assert sum("skipped" in row for row in rows) > 1 and sum("gates_skipped" in row for row in rows) > 1
    assert all(p.isfinite().all() for p in net.parameters())
    assert [row["step"] for row in rows] == [*range(len(rows))]
