"""How often a step waits for a GPU: copies to the CPU, and numbers read out of tensors one by one."""

from contextlib import contextmanager

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

import dnas.methods.gates
import dnas.nets.supernet
import dnas.training.loop
from dnas.methods.catalog import METHODS
from dnas.methods.loop import begin, run
from dnas.methods.method import Task
from dnas.nets.layer_supernet import MacroSupernet
from dnas.runtime.distributed import to_host
from dnas.spec.budget import parse_budget
from dnas.spec.cost import CostTable, resolve_budgets
from dnas.spec.recipe import Recipe
from dnas.training.data import load_data
from supernets import SUPERNETS


class Reads(TorchDispatchMode):
    """Counts numbers that are read out of tensors, and copies from a GPU to the CPU.

    Not those inside an optimizer on a CPU: torch keeps the number of its steps there, on every device.
    """

    def __init__(self):
        super().__init__()
        self.count, self.in_optimizer = 0, False

    def __enter__(self):
        def inside(value):
            def hook(*_):
                self.in_optimizer = value

            return hook

        self.hooks = [register_optimizer_step_pre_hook(inside(True)), register_optimizer_step_post_hook(inside(False))]
        return super().__enter__()

    def __exit__(self, *args):
        for hook in self.hooks:
            hook.remove()
        super().__exit__(*args)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name == "_local_scalar_dense":
            self.count += not (self.in_optimizer and args[0].device.type == "cpu")
        elif name in ("_to_copy", "copy_") and out.device.type == "cpu":
            self.count += any(isinstance(a, torch.Tensor) and a.device.type == "cuda" for a in args)
        return out


@contextmanager
def counted(monkeypatch, device):
    """All reads within. On a CPU a copy to the host copies nothing, so there the function itself is counted."""
    reads = Reads()

    def count(tensor):
        reads.count += device == "cpu"
        return to_host(tensor)

    with monkeypatch.context() as patch:
        for module in (dnas.methods.gates, dnas.nets.supernet, dnas.training.loop):
            patch.setattr(module, "to_host", count)
        with reads:
            yield reads


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["gates", "l1"])
def test_host_reads_of_a_step(name, device, monkeypatch):
    """At most 2 a weight step and 4 more a gate step, however many gates there are."""
    torch.manual_seed(0)
    data = load_data(img_size=8, device=device).take(150)
    net = MacroSupernet(SUPERNETS["prunet"](num_classes=10, img_size=8, width_mult=0.1)).to(device)
    assert len(net.gates()) > 90
    tables = {metric: CostTable.build(net.space, metric) for metric in ("macs", "params")}
    budgets = resolve_budgets(tables, parse_budget("40%"))
    task = Task(tables, budgets, data, Recipe(epochs=4, batch_size=16), METHODS[name].config())
    state, counts = begin(METHODS[name], net, task), {True: [], False: []}
    with counted(monkeypatch, device) as reads:

        def on_row(row):
            counts["gate_ms" in row].append(reads.count)
            reads.count = 0

        run(METHODS[name], state, task, on_row=on_row)
    print(f"{name}: at most {max(counts[False])} a weight step, {max(counts[True][1:], default=0)} with a gate step")
    assert len(counts[False]) > 8 and max(counts[False]) <= 2
    if name == "gates":
        assert len(counts[True]) > 5
        assert max(counts[True][1:]) <= 2 + 4  # the first one looks at every gradient


def test_the_count_sees_what_it_should():
    with Reads() as reads:
        float(torch.ones(()))
        torch.ones(3).sum().item()
        bool(torch.ones(()) > 0)
    assert reads.count == 3
