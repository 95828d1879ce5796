"""A search or a training that was stopped goes on as if it had not been: to the last bit, from what was on disk."""

import hashlib
import io
import warnings
from dataclasses import replace
from functools import partial

import pytest
import torch
from stopped import in_parts, part_of_search
from timm.utils import random_seed

from dnas.export.model_file import build_net
from dnas.methods.method import Task
from dnas.methods.settings import GatesConfig
from dnas.nets.bipath_block import PairGate
from dnas.nets.layer_supernet import MacroSupernet
from dnas.nets.markov_gate import MarkovGate
from dnas.nets.timm_space import TimmBase
from dnas.nets.timm_supernet import TimmSupernet
from dnas.runtime.checkpoint import (
    BEFORE,
    FORMAT,
    LAST,
    load_module,
    load_optimizer,
    module_data,
    optimizer_data,
    read_checkpoint,
    write_checkpoint,
)
from dnas.spec.budget import parse_budget
from dnas.spec.checks import UserError
from dnas.spec.cost import CostTable, resolve_budgets
from dnas.spec.recipe import Recipe
from dnas.training.data import load_data
from dnas.training.from_scratch import train_from_scratch
from supernets import SUPERNETS


def prunet():
    """The default space with up to two layers a stage."""
    macro = SUPERNETS["prunet"](num_classes=10, img_size=8, width_mult=0.2)
    return MacroSupernet(replace(macro, stages=tuple(replace(s, depth=min(s.depth, 2)) for s in macro.stages)))


def markov():
    return MacroSupernet(replace(prunet().outline, bipath=False))


def resnet():
    kwargs = {"layers": [1, 1, 1, 1], "channels": [8, 16, 16, 16]}
    return TimmSupernet(TimmBase("resnet18", 10, 3, 8, divisor=2, kwargs=kwargs))


@pytest.mark.parametrize("make, recipe", [
    (prunet, Recipe(epochs=8, batch_size=16, smoothing=0.0)),
    (markov, Recipe(epochs=8, batch_size=16, opt="sgd", lr=0.05, clip_grad=1.0)),
    (resnet, Recipe(epochs=6, batch_size=16, opt="lamb")),
    (resnet, Recipe(epochs=6, batch_size=8, grad_accum_steps=2)),
])  # fmt: skip
def test_a_search_goes_on_to_the_bit(make, recipe, tmp_path):
    """Stopped in the warm-up, between and after cuts, each time with a net that is built anew."""
    data, config = load_data(img_size=8).take(360), GatesConfig(headroom=0.0)  # cuts that come one by one

    def start():
        torch.manual_seed(0)
        net = make().to(memory_format=torch.channels_last)
        tables = {metric: CostTable.build(net.space, metric) for metric in ("macs", "params")}
        budgets = resolve_budgets(tables, parse_budget("40%"))
        task = Task(tables, budgets, data, recipe, config)
        return net, task

    net, rows = in_parts(tmp_path / "new", (), part_of_search(start))
    other, seen = in_parts(tmp_path, (5, 40, 23, 15), part_of_search(start))
    assert [row["step"] for row in seen] == [*range(len(rows))] and len(rows) >= 90
    assert sum(len(row.get("events", ())) for row in rows) > 5
    assert seen == rows
    assert all(torch.equal(a, b) for a, b in zip(net.tensors(), other.tensors(), strict=True))
    assert other.best() == net.best()


@pytest.mark.parametrize("recipe", [
    Recipe(epochs=3, batch_size=64),
    Recipe(epochs=7, batch_size=64, grad_accum_steps=3, drop=0.3, mixup=0.2),
    Recipe(epochs=3, batch_size=64, opt="sgd", lr=0.05, model_ema_decay=0.9, drop=0.3, drop_path=0.2, mixup=0.2),
])  # fmt: skip
def test_a_training_goes_on_to_the_bit(recipe, tmp_path):
    """Dropout and mixup take global random numbers: those, too, go on."""
    data, net = load_data(img_size=8), prunet()
    smallest = net.net_of(CostTable.build(net.space, "macs").extremes()[0])

    def part(journal):
        random_seed(1)
        rates = {"drop_rate": recipe.drop, "drop_path_rate": recipe.drop_path}
        model = build_net(smallest, num_classes=10, in_chans=3, **rates)
        on_step, saved = partial(journal.step, "training"), journal.under_way("training")
        return train_from_scratch(model, data, recipe, seed=3, on_step=on_step, saved=saved)

    model, figures = in_parts(tmp_path / "new", (), part)
    other, seen = in_parts(tmp_path, (5, 17, 29), part)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    assert seen.pop("seconds") > 0 and figures.pop("seconds") > 0 and seen == figures


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path):
    """One byte anywhere: either it does not matter, or the file is not taken."""
    assert read_checkpoint(tmp_path) is None
    for k in range(3):
        write_checkpoint(tmp_path, {"k": k, "tensor": torch.arange(1000.0)})
    whole, damaged = (tmp_path / LAST).read_bytes(), 0
    assert read_checkpoint(tmp_path)["k"] == 2
    places = torch.randint(len(whole), (100,), generator=torch.Generator().manual_seed(0)).tolist()
    for place in places:
        (tmp_path / LAST).write_bytes(whole[:place] + bytes([whole[place] ^ 1 + place % 255]) + whole[place + 1 :])
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            found = read_checkpoint(tmp_path)
        assert torch.equal(found["tensor"], torch.arange(1000.0))
        assert found["k"] == (1 if any("the one before is taken" in str(w.message) for w in told) else 2)
        damaged += found["k"] == 1
    assert damaged > 60
    for cut in (0, 10, len(whole) // 2, len(whole) - 1):
        (tmp_path / LAST).write_bytes(whole[:cut])
        with pytest.warns(UserWarning, match="the one before is taken"):
            assert read_checkpoint(tmp_path)["k"] == 1
    (tmp_path / BEFORE).write_bytes(b"nothing")
    with pytest.warns(UserWarning), pytest.raises(UserError, match="checkpoint.before.pt"):
        read_checkpoint(tmp_path)
    (tmp_path / LAST).unlink()
    (tmp_path / BEFORE).write_bytes(whole)  # killed between two renames
    assert read_checkpoint(tmp_path)["k"] == 2


class Evil:
    def __reduce__(self):
        return print, ("executed",)


def test_nothing_in_a_checkpoint_is_executed(tmp_path, capsys):
    """Neither in the file nor in the content that it holds."""
    inner = io.BytesIO()
    torch.save({"done": Evil()}, inner)
    content = torch.frombuffer(inner.getbuffer(), dtype=torch.uint8)
    digest = hashlib.sha256(inner.getvalue()).hexdigest()
    for outer in (Evil(), {"format": FORMAT, "sha256": digest, "content": content}):
        torch.save(outer, tmp_path / LAST)
        with pytest.raises(UserError, match="no checkpoint"):
            read_checkpoint(tmp_path)
    assert "executed" not in capsys.readouterr().out


def test_what_was_saved_is_read_on_the_cpu_and_put_where_each_parameter_is(tmp_path):
    """Memory layout included. ``meta`` stands for another device; torch keeps the steps of Adam on the CPU."""
    layers = [torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 4, 1)]
    net = torch.nn.Sequential(*layers).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.randn(2, 3, 8, 8)).square().sum().backward()
    optimizer.step()
    write_checkpoint(tmp_path, {"net": module_data(net), "optimizer": optimizer_data(optimizer, net)})
    found = read_checkpoint(tmp_path)
    for device in ("cpu", "meta"):
        other = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 4, 1)).to(device)
        theirs = torch.optim.AdamW(other.parameters())
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "for .*: copying from a non-meta parameter")
            load_module(other, found["net"])
        load_optimizer(theirs, other, found["optimizer"])
        for p, q in zip(net.parameters(), other.parameters(), strict=True):
            state = theirs.state[q]
            assert q.device.type == device and q.stride() == p.stride()
            assert state["exp_avg"].device.type == device and state["step"].device.type == "cpu"
            assert state["exp_avg"].stride() == optimizer.state[p]["exp_avg"].stride()
            if device == "cpu":
                assert torch.equal(p, q) and torch.equal(state["exp_avg_sq"], optimizer.state[p]["exp_avg_sq"])
                assert q.data_ptr() != found["net"][next(iter(found["net"]))].data_ptr()  # not the file's own tensors


def test_a_checkpoint_that_was_read_can_be_used_twice(tmp_path):
    """What a search does to its tensors leaves what was read as it was."""
    layer = torch.nn.Linear(3, 2)
    write_checkpoint(tmp_path, {"net": module_data(layer)})
    found = read_checkpoint(tmp_path)
    load_module(layer, found["net"])
    layer.weight.data.zero_()
    assert found["net"]["weight"].abs().sum() > 0


@pytest.mark.parametrize("make", [prunet, markov, resnet])
def test_a_state_dict_restores_a_supernet_that_was_cut(make):
    """Structure, open skips, and what gates remember: all of it is in ``state_dict``."""
    net = make()
    for layer in net.layers:
        if layer.skip:
            layer.skip.open(0.7)
    left = net.structure()
    for name, gate in net.gates().items():
        if isinstance(gate, MarkovGate) and len(gate.widths) > 2:
            left[name] = left[name][:-1]
        elif isinstance(gate, PairGate) and len(gate.widths) > 2:
            left[name] = [0, 1]
    for k, layer in enumerate(net.layers):
        if layer.choice:
            left[f"{layer.name}/block"] = [k % len(layer.choice.options)]
        if layer.skip and k % 3 == 0:
            left[f"{layer.name}/keep"] = [0]
    net.cut_to(left)
    for gate in net.gates().values():
        if isinstance(gate, MarkovGate):
            gate.idle = list(range(len(gate.idle)))
        elif isinstance(gate, PairGate):
            gate.average = 0.25
    other = make()
    other.load_state_dict(net.state_dict())
    assert other.structure() == net.structure() and list(other.gates()) == list(net.gates())
    assert all(map(torch.equal, net.tensors(), other.tensors()))
    for name, gate in net.gates().items():
        twin = other.gates()[name]
        assert gate.live() == twin.live() and gate.reachable() == twin.reachable()
        assert getattr(gate, "idle", None) == getattr(twin, "idle", None)
        assert getattr(gate, "average", None) == getattr(twin, "average", None)
    x, draws = torch.randn(2, 3, 8, 8), [torch.Generator().manual_seed(0) for _ in range(2)]
    with torch.no_grad():
        assert torch.equal(net(x, net.widest(draws[0])), other(x, other.widest(draws[1])))
