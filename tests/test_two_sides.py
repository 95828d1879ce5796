"""Images whose height is not their width, from the flag to the exported network and the latency table."""

import ast

import pytest
import torch
from commands import call, profile_tool, search_tool

from dnas.cli.parsers import read
from dnas.export.model_file import build_net, count_macs, read_arch
from dnas.export.verify import verify_export
from dnas.latency.measured_parts import parts_of
from dnas.methods.rules import uniform_arch
from dnas.nets.layer_supernet import MacroSupernet
from dnas.nets.timm_space import TimmBase
from dnas.nets.timm_supernet import TimmSupernet
from dnas.spec.budget import Budget
from dnas.spec.checks import UserError
from dnas.spec.cost import CostTable, resolve_budgets
from dnas.spec.image_size import as_size, check_size, sides, size_text, strided
from dnas.spec.latency_table import read_table
from supernets import SUPERNETS

SMALL = {"layers": [1, 1, 1, 1], "channels": [8, 16, 16, 24]}


@pytest.mark.parametrize("size", [(24, 96), (33, 17), (8, 40)])
@pytest.mark.parametrize("name", [*SUPERNETS, "resnet18"])
def test_costs_are_those_that_counters_find(name, size):
    if name in SUPERNETS:
        net = MacroSupernet(SUPERNETS[name](num_classes=7, img_size=size, width_mult=0.5))
    else:
        net = TimmSupernet(TimmBase(name, 7, 3, size, 2, SMALL))
    for metric in ("macs", "params"):
        table = CostTable.build(net.space, metric)
        budget = resolve_budgets({metric: table}, (Budget(metric, 60.0, percent=True),))
        arch = uniform_arch(net.space, {metric: table}, budget)
        model = build_net(net.net_of(arch), num_classes=7)
        counted = count_macs(model, 3, size) if metric == "macs" else sum(p.numel() for p in model.parameters())
        assert table.of(arch) == counted
        assert model(torch.zeros(2, 3, *size)).shape == (2, 7)


@pytest.mark.parametrize("size", [(24, 96), (33, 17)])
def test_parts_of_a_latency_table_run_at_their_sizes(size):
    net = MacroSupernet(SUPERNETS["toy"](num_classes=7, img_size=size))
    for part in parts_of(net):
        widths = {slot: options[-1] for slot, options in part.options(net.space).items()}
        module, inputs = part.build(widths, 2)
        module(*inputs)
        if "stem" in part.site.op:
            assert inputs[0].shape[2:] == size and f"{size[0]}x{size[1]}px" in part.site.op


@pytest.mark.parametrize(
    ("words", "size"),
    [
        (["--img-size", "24", "96"], (24, 96)),
        (["--img-size", "32"], 32),
        (["--img-size=24,96"], (24, 96)),
        (["--img-size", "32", "32"], 32),
        ([], None),
    ],
)
def test_the_flag(words, size):
    assert read("search", ["--budget", "50%", *words])[0].img_size == size
    args, argv = read("search", ["--budget", "50%", *words, "--seed", "1"])
    assert (args.img_size, args.seed) == (size, 1)
    assert read("search", argv)[0].img_size == size  # as --resume reads them
    assert read("retrain", [*words, "runs/x", "--output", "y"])[0].run == "runs/x"


@pytest.mark.parametrize(
    "words", [["--img-size", "x"], ["--img-size", "8", "x"], ["--img-size", "8", "9", "10"], ["--img-size", "0"]]
)
def test_a_flag_that_is_no_size(words):
    with pytest.raises(UserError):
        read("search", ["--budget", "50%", *words])


def test_sizes():
    assert sides(8) == (8, 8) and sides([8, 12]) == (8, 12) and as_size((8, 8)) == 8 and as_size([8, 12]) == (8, 12)
    assert size_text((8, 12)) == "8x12" and size_text(8) == "8"
    assert strided((9, 12), 2) == (5, 6) and strided(9, 2) == 5 and strided((7, 8), 2) == 4
    for wrong in (0, True, 8.0, "8", None, (8, 9, 10), [], (8, 0), 9000):
        with pytest.raises(UserError):
            check_size(wrong)


def test_a_whole_run(tmp_path, trusted, monkeypatch, capsys):
    out = tmp_path / "run"
    flags = (
        "--supernet",
        "toy",
        "--img-size",
        8,
        20,
        "--budget",
        "50%",
        "--search-epochs",
        2,
        "--epochs",
        1,
        "-b",
        256,
    )
    assert call(search_tool, monkeypatch, *flags, "--output", out) == 0
    document = read_arch(out / "arch.json")
    assert document["img_size"] == [8, 20] and 0.98 <= document["macs"] / document["budget"][0]["limit"] <= 1
    cfg = (out / "model.py").read_text().partition("CFG = ")[2].partition("\ndefault_cfgs")[0]
    assert ast.literal_eval(cfg)["input_size"] == (3, 8, 20)
    assert "images of 8x20 px" in capsys.readouterr().out
    figures = verify_export(out)
    assert figures["macs"] == document["macs"] and figures["outputs"] == [1, 10]


def test_a_latency_table(tmp_path, monkeypatch):
    out = tmp_path / "toy.json"
    quick = (
        "--rounds",
        3,
        "--block-ms",
        0.2,
        "--scale-nets",
        0,
        "--threads",
        1,
        "--device",
        "cpu",
        "--num-classes",
        10,
    )
    assert call(profile_tool, monkeypatch, "--supernet", "toy", "--img-size", 8, 20, *quick, "--out", out) == 0
    header = read_table(out).header
    assert header["space"]["img_size"] == [8, 20] and header["ms_per_mparam"] == 0  # no whole network was measured
    assert call(profile_tool, monkeypatch, "--check", out, "--check-nets", 3, "--device", "cpu") == 0
