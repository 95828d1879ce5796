"""Benchmarks/peers.py: nets of other tools as architectures of the same space; the report, from planted rows."""

import json
import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import iso_flops  # noqa: E402
import peers  # noqa: E402
import torch_pruned  # noqa: E402

from dnas.export.model_file import build_net, count_macs  # noqa: E402
from dnas.spec.checks import UserError  # noqa: E402


@pytest.fixture(scope="module")
def lab():
    like = iso_flops.SETUPS["timm_resnet_50"]
    recipe = replace(like.search, epochs=1)
    return iso_flops.open_lab(replace(like, data="digits", num_train=300, img_size=16, search=recipe), "", "cpu")


def narrower(lab, widths):
    """The widest network with the first ``widths[name]`` output channels of some of its convolutions."""
    model = lab.net.outline.create()
    for name, width in widths.items():
        conv = model.get_submodule(name)
        conv.out_channels, conv.weight = width, torch.nn.Parameter(conv.weight[:width])
    return model


def read_off(lab, model):
    return torch_pruned.arch_of(lab, model, torch_pruned.layers_of(lab))


@pytest.mark.parametrize("name", ["digits", "mobilenet_v2"])
def test_widths_are_read_off_a_plain_net_of_layers(name):
    """Of any widths in the base network, built anew: no layer is known by name, and none is mistaken for another."""
    setup = iso_flops.SETUPS[name]
    lab = iso_flops.open_lab(replace(setup, data="digits", num_train=300), "", "cpu")
    space, draws = lab.net.space, random.Random(0)
    base = torch_pruned.widest_base(lab)
    arch = space.complete(
        {n: draws.choice(space.by_name[n].options) if space.by_name[n].is_width else v for n, v in base.items()}
    )
    assert read_off(lab, torch_pruned.plain_net(lab, arch)) == arch


def test_widths_are_read_off_a_cut_network(lab):
    widths = {d.name: int(d.options[k % len(d.options)]) for k, d in enumerate(lab.net.space.decisions)}
    assert dict(read_off(lab, narrower(lab, widths))) == widths
    odd = {name: width - 1 for name, width in widths.items()}  # off the grid, which is one of even numbers
    found = read_off(lab, narrower(lab, odd))
    assert all(found[name] in lab.net.space.by_name[name].options for name in odd)
    assert all(abs(found[name] - odd[name]) == 1 for name in odd)


class Halving:
    """A pruner whose every step leaves each width a quarter less, and which counts them."""

    def __init__(self, model, names):
        self.model, self.names, self.steps = model, names, 0

    def step(self):
        self.steps += 1
        for name in self.names:
            conv = self.model.get_submodule(name)
            conv.out_channels = max(2, conv.out_channels * 3 // 4)


def test_cutting_ends_with_the_first_net_in_the_budget(lab):
    model, names = lab.net.outline.create(), [d.name for d in lab.net.space.decisions]
    pruner = Halving(model, names)
    arch, limit = torch_pruned.cut(lab, model, pruner), lab.budgets[0].limit
    plain = build_net(lab.net.net_of(arch), num_classes=10, in_chans=3)
    assert count_macs(plain, 3, 16) <= limit
    again = lab.net.outline.create()
    before = Halving(again, names)
    for _ in range(pruner.steps - 1):
        before.step()
    assert lab.tables["macs"].of(read_off(lab, again)) > limit
    pruner.names = []
    with pytest.raises(UserError, match="400 steps did not reach"):
        torch_pruned.cut(lab, lab.net.outline.create(), pruner)


@pytest.mark.parametrize("method", peers.PEERS)
def test_a_peer_keeps_the_budget(lab, method):
    # Meant: peers are an extra of their own, pip install -e '.[peers]'; no other test needs them.
    pytest.importorskip(peers.PEERS[method][0].split(".")[0])
    row = peers.searched(lab, method, 0)
    assert row["kind"] == "net", row
    low = lab.tables["macs"].of(lab.tables["macs"].extremes()[0])  # FastNAS promises an upper limit only
    assert low <= row["macs"] <= lab.budgets[0].limit == row["limit"]
    assert row["search_images"] >= 192  # three batches of 64 of the 210 images that are not held out
    assert lab.net.space.check(row["arch"])


def test_a_peer_that_is_not_there_is_a_row(lab, monkeypatch):
    monkeypatch.setitem(peers.PEERS, "absent", ("no_such_package", lambda lab, seed: None))
    row = peers.searched(lab, "absent", 3)
    said = "ModuleNotFoundError: No module named 'no_such_package'"
    assert row == {"kind": "failed", "net": "absent/3", "error": said}


def test_the_report_is_paired_by_seed(tmp_path, monkeypatch, capsys):
    """Planted: one peer is 1.0 and 1.4 points worse, in half of the time and twice the memory; another does not run."""
    monkeypatch.setattr(iso_flops, "RESULTS", tmp_path)
    rows = [{"kind": "failed", "net": "fastnas/0", "error": "RuntimeError: no"}]
    for k, gain in enumerate((1.0, 1.4)):
        for method, top1, seconds, mb in (("default", 60, 80.0, 100.0), ("torch-pruning", 60 - gain, 40.0, 200.0)):
            name = f"{method}/{k}"
            rows.append(
                {"kind": "net", "net": name, "macs": 90, "limit": 100, "search_seconds": seconds, "search_mb": mb}
            )
            seeds = iso_flops.own_seeds(name)
            rows += [{"kind": "training", "net": name, "seed": s, "top1": top1 + s % 3} for s in seeds]
    (tmp_path / "peers_timm_resnet_50.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    peers.report(iso_flops.Table("peers_timm_resnet_50"))
    head, line, *table = [row.strip(" |").split(" | ") for row in capsys.readouterr().out.splitlines()]
    assert len(head) == len(line) == 9
    assert table[0] == ["default", "2", "61.00", "-", "0.900 [0.900, 0.900]", "80", "-", "100", "-"]
    assert table[1][3] == "-1.20 [-3.74, +1.34]"  # two differences: a standard error of 0.2, Student's t of 12.71
    assert table[1][5:] == ["40", "0.500 [0.500, 0.500]", "200", "2.000 [2.000, 2.000]"]
    assert table[2][:3] == ["fastnas", "-", "does not run: RuntimeError: no"]
