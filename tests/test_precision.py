"""A search in mixed precision: small gradients of gates do not vanish in float16."""

import pytest
import torch

from dnas.methods.gates import GATES, image_loss
from dnas.methods.loop import begin, load_search, run, search_data
from dnas.methods.method import Task
from dnas.methods.settings import GatesConfig
from dnas.nets.layer_supernet import MacroSupernet
from dnas.spec.budget import Budget
from dnas.spec.cost import CostTable
from dnas.spec.recipe import Recipe
from dnas.training.data import load_data
from dnas.training.optimizer import to_channels_last
from supernets import SUPERNETS

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def task_of(net, device, amp_dtype):
    tables = {"macs": CostTable.build(net.space, "macs")}
    budgets = (Budget("macs", 0.4 * tables["macs"].of(tables["macs"].extremes()[1])),)
    recipe = Recipe(epochs=3, batch_size=32, amp=True, amp_dtype=amp_dtype)
    return Task(tables, budgets, load_data(img_size=8, device=device).take(200), recipe, GatesConfig())


def toy(device):
    torch.manual_seed(0)
    return MacroSupernet(SUPERNETS["toy"](num_classes=10, img_size=8)).to(device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("amp_dtype", ["float16", "bfloat16"])
def test_a_search_in_mixed_precision(amp_dtype, device):
    """Every gate gets gradients from the first step on (the search checks that), and it goes to its end."""
    net, rows = toy(device), []
    task = task_of(net, device, amp_dtype)
    state = begin(GATES, net, task)
    assert state.own.scaler.is_enabled() == (amp_dtype == "float16")
    run(GATES, state, task, on_row=rows.append)
    assert [row for row in rows if "gate_loss" in row]
    assert sum("gates_skipped" in row or "skipped" in row for row in rows) < len(rows) / 2
    assert all(bool(p.isfinite().all()) for p in net.parameters())
    assert 0.98 * task.budgets[0].limit <= task.tables["macs"].of(GATES.choose(state, task)) <= task.budgets[0].limit


def test_the_scaler_keeps_gradients_that_float16_would_lose():
    """The classifier made tiny, so that what reaches the gates in float16 is too small for it, but for the scale."""
    lost = []
    for scaled in (True, False):
        net = toy("cpu")
        net.classifier.weight.data *= 3e-5
        task = task_of(net, "cpu", "float16")
        state = begin(GATES, net, task)
        if not scaled:
            state.own.scaler = torch.amp.GradScaler("cpu", enabled=False)
        x, y = next(task.held_out_batches(0.3).starting_at(0))
        image_loss(state, task, 2, x, y, 1, 1, net.seen())
        grads = [p.grad for p in net.gate_parameters() if p.grad is not None]
        assert len(grads) > 5
        lost.append(sum(int((g == 0).sum()) for g in grads) / sum(g.numel() for g in grads))
    assert lost[0] < 0.5 * lost[1]


def test_a_stopped_search_keeps_its_scale():
    net = toy("cpu")
    task = task_of(net, "cpu", "float16")
    state = begin(GATES, net, task)
    run(GATES, state, task, until=0.6)
    state.own.scaler.update(1234.0)
    other = begin(GATES, toy("cpu"), task)
    load_search(GATES, other, search_data(GATES, state))
    assert other.own.scaler.get_scale() == 1234.0


def test_channels_last_leaves_weights_of_other_dimensions_as_they_are():
    """Networks of timm's with 3-D convolutions (lambda layers) have weights of five dimensions."""
    module = torch.nn.ModuleList([torch.nn.Conv2d(4, 6, 3), torch.nn.Conv3d(1, 2, (1, 3, 3)), torch.nn.Linear(2, 3)])
    before = [p.detach().clone() for p in module.parameters()]
    assert to_channels_last(module) is module
    assert all(map(torch.equal, before, module.parameters()))
    assert module[0].weight.is_contiguous(memory_format=torch.channels_last) and module[1].weight.is_contiguous()
