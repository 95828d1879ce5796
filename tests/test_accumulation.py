"""``--grad-accum-steps``: a step of several batches is a step of one large batch, and everything counts steps."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from dnas.methods.gates import GATES
from dnas.methods.loop import begin, run, steps_of
from dnas.methods.method import Task
from dnas.methods.settings import GatesConfig
from dnas.nets.layer_supernet import MacroSupernet
from dnas.report.metrics import search_figures
from dnas.spec.budget import Budget
from dnas.spec.cost import CostTable
from dnas.spec.recipe import Recipe
from dnas.training.data import load_data
from dnas.training.from_scratch import train_from_scratch
from dnas.training.loop import make_learner, steps_per_epoch, train
from supernets import SUPERNETS

CONSTANT = {"opt": "sgd", "lr": 0.05, "min_lr": 0.05, "warmup_epochs": 0, "weight_decay": 0.0}  # one rate throughout


def net_of():
    """Without a batch norm, in double precision."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10)).double()


def trained(recipe, data, steps=math.inf):
    """(the loss, the gradients and the weights after each step; the learning rates)."""
    model, seen, rates = net_of(), [], []
    batches = data.train_batches(recipe.batch_size, seed=0)
    learner = make_learner(model, model.parameters(), recipe, steps_per_epoch(batches, recipe))
    rates.append(learner.optimizer.param_groups[0]["lr"])
    for loss in train(lambda x, y: nn.functional.cross_entropy(model(x.double()), y), learner, batches, recipe):
        seen.append(
            (loss, [p.grad.clone() for p in model.parameters()], [p.detach().clone() for p in model.parameters()])
        )
        rates.append(learner.optimizer.param_groups[0]["lr"])
        if len(seen) == steps:
            break
    return seen, rates


def close(some, others):
    return all(torch.allclose(a, b, rtol=1e-10, atol=1e-13) for a, b in zip(some, others, strict=True))


@pytest.mark.parametrize("clip_grad", [0.0, 0.5])
def test_four_batches_of_16_are_one_of_64(clip_grad):
    """The same loss, gradients, weights and learning rate at every step of two epochs."""
    data, given = load_data(img_size=8).take(256), {"epochs": 2, "opt": "sgd", "lr": 0.1, "clip_grad": clip_grad}
    images = data.num_train // 64 * 64  # of an epoch; both drop the same rest
    data = data.part(torch.arange(images))
    small, rates = trained(Recipe(batch_size=16, grad_accum_steps=4, **given), data)
    large, others = trained(Recipe(batch_size=64, **given), data)
    assert len(small) == len(large) == 2 * images // 64 and rates == others
    for (loss, grads, weights), (other, other_grads, other_weights) in zip(small, large, strict=True):
        assert abs(loss - other) < 1e-12 and close(grads, other_grads) and close(weights, other_weights)


def test_the_last_step_of_an_epoch_is_the_mean_over_what_is_left():
    """Eleven batches in steps of 4, 4 and 3, compared with torch's own SGD on the mean loss of these batches."""
    data = load_data(img_size=8).take(256)
    data = data.part(torch.arange(11 * 16))
    seen, _ = trained(Recipe(epochs=2, batch_size=16, grad_accum_steps=4, **CONSTANT), data)
    model, batches = net_of(), data.train_batches(16, seed=0)
    plain = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    expected = []
    for epoch in range(2):
        batches.set_epoch(epoch)
        images = list(batches)
        for group in (images[:4], images[4:8], images[8:]):
            loss = torch.stack([nn.functional.cross_entropy(model(x.double()), y) for x, y in group]).mean()
            plain.zero_grad()
            loss.backward()
            plain.step()
            expected.append((loss.item(), [p.detach().clone() for p in model.parameters()]))
    assert len(seen) == len(expected) == 6
    for (loss, _, weights), (other, other_weights) in zip(seen, expected, strict=True):
        assert abs(loss - other) < 1e-12 and close(weights, other_weights)


def test_more_batches_than_an_epoch_has_are_one_step_an_epoch():
    data = load_data(img_size=8).take(64)
    assert len(trained(Recipe(epochs=3, batch_size=16, grad_accum_steps=1000, **CONSTANT), data)[0]) == 3


@pytest.mark.parametrize("first", [0, 3])
def test_a_training_has_as_many_steps_as_groups_of_batches(first):
    """15 batches in groups of 4 are 4 steps; those that are done count, too."""
    data = load_data(img_size=8).take(256)
    data, calls = data.part(torch.arange(15 * 16)), []
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
    recipe = Recipe(epochs=2, batch_size=16, grad_accum_steps=4, channels_last=False)
    train_from_scratch(model, data, recipe, seed=0, on_step=lambda state: calls.append(state()), first=first)
    assert len(calls) == 2 * 4 - first and calls[-1]["learner"]["update"] == 8
    assert len(calls[-1]["losses"]) == 4  # those of the last epoch


def test_a_search_counts_steps_and_images():
    """Rows are weight steps. Weights and gates see as many images as they are said to."""
    torch.manual_seed(0)
    net = MacroSupernet(SUPERNETS["toy"](num_classes=10, img_size=8))
    tables = {"macs": CostTable.build(net.space, "macs")}
    budgets = (Budget("macs", 0.4 * tables["macs"].of(tables["macs"].extremes()[1])),)
    recipe = Recipe(epochs=3, batch_size=16, grad_accum_steps=3)
    task = Task(tables, budgets, load_data(img_size=8).take(250), recipe, GatesConfig())
    state, rows, images = begin(GATES, net, task), [], []
    real = GATES.loss

    def loss(search, task, x, y, progress):
        images.append(len(x))
        return real(search, task, x, y, progress)

    method = replace(GATES, loss=loss)
    run(method, state, task, on_row=rows.append, until=0.5)
    run(method, state, task, on_row=rows.append)
    batches = len(task.weight_batches(0.3))
    assert batches % 3  # an epoch ends with a smaller step
    assert [row["step"] for row in rows] == [*range(steps_of(method, task))]
    assert len(rows) == 3 * math.ceil(batches / 3) and sum(row["batches"] for row in rows) == 3 * batches == len(images)
    taught = [row["images"] for row in rows if "images" in row]
    assert set(taught[1:]) == {3 * 16} and len(taught) == state.own.taught  # the first one only checks the gates
    figures = search_figures(rows, recipe, 1.0, 1.0, torch.device("cpu"))
    assert figures["images"] == sum(images) + sum(taught) and figures["steps"] == len(rows)
    assert figures["relative_cost"] == pytest.approx((1e3 / figures["images"]) / (1.0 / 16))
