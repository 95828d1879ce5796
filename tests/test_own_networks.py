"""Networks of the user's own: traced, cut, exported, from a file and from a program."""

import copy
import importlib.util
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import call, check_refused
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import own_nets  # noqa: E402

import dnas
from dnas.export.model_file import (
    arch_document,
    build_net,
    count_macs,
    count_macs_torch,
    count_params,
    read_arch,
    write_export,
)
from dnas.export.own_file import write_program
from dnas.export.verify import verify_export
from dnas.nets.own_base import Own, OwnBase, given, made_by, read_function
from dnas.nets.own_supernet import OwnSupernet
from dnas.nets.shrink import extract, plain_state
from dnas.nets.traced_supernet import TracedSupernet, safe_channels
from dnas.nets.tracing import leaves
from dnas.spec.checks import UserError
from dnas.spec.cost import CostTable
from tools import export as export_tool
from tools import retrain as retrain_tool
from tools import search as search_tool

FILE = Path(own_nets.__file__)
NAMES = [
    *("build", "UNet", "Recurrent", "Several", "signals", "volumes", "rows", "resnet18", "mobilenet_v3_small"),
    *("efficientnet_b0", "regnet_y_400mf", "deeplabv3", "fasterrcnn_backbone", "r3d_18"),
]
PRIVATE = """
from my_layers import Linear
from torch import nn

class Private(nn.Module):
    def __init__(self):
        super().__init__()
        self._width, self.first, self.head = 40, Linear(8, 40), Linear(40, 10)

    def forward(self, x):
        return self.head(self.first(x.mean(1)).mean(1, keepdim=True).reshape(-1, self._width).relu())

def build():
    return Private()
"""
BROKEN = """
def fails():
    raise ValueError("no such layer")

def nothing():
    return 3
"""


def traced(name, **more):
    """(a supernet of one of `own_nets.NETS`, what makes the network, the shape of an input)."""
    create, channels, sides = own_nets.NETS[name]
    net = TracedSupernet(OwnBase(name, 10, channels, sides, divisor=2, **more), lively(create())).eval()
    return net, create, (channels, *((sides, sides) if isinstance(sides, int) else sides))


def lively(model):
    """No norm hides a channel."""
    draws = torch.Generator().manual_seed(0)
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        if t.ndim == 1 and t.is_floating_point():
            t.data.copy_(torch.rand(t.shape, generator=draws) + (-0.5 if name.endswith(("bias", "mean")) else 0.5))
    return model


@pytest.mark.parametrize("name", NAMES)
def test_masked_and_cut_are_one_network_with_the_counted_costs(name):
    torch.manual_seed(0)
    net, create, shape = traced(name)
    check_networks(net, create, shape, 5 if create.__module__ == "own_nets" else 2)


def check_networks(net, create, shape, seeds):
    """Of random networks of a space: masked and cut give the same, and all counts are those of the table."""
    tables = {metric: CostTable.build(net.space, metric) for metric in ("macs", "params")}
    widest, x, sides = tables["macs"].extremes()[1], torch.randn(2, *shape), shape[1:]
    assert tables["macs"].of(widest) == count_macs(create(), shape[0], sides)
    assert tables["params"].of(widest) == count_params(create())
    for seed in range(seeds):
        rng = random.Random(seed)
        arch = net.space.check({d.name: rng.choice(d.options) for d in net.space.decisions})
        own = extract(net, arch)
        with torch.no_grad():
            pairs = [*zip(leaves(net(x, arch)), leaves(own.model(x)), strict=True)]
        for masked, cut in pairs:
            assert masked.shape == cut.shape and (masked - cut).abs().max() < 1e-5 * masked.abs().max()
        counted = count_macs(own.model, shape[0], sides), count_macs_torch(own.model, shape[0], sides)
        assert counted == (tables["macs"].of(arch),) * 2
        assert count_params(own.model) == tables["params"].of(arch)


def test_a_unet_of_half_the_widths_is_the_unet_that_its_author_would_write():
    net = TracedSupernet(OwnBase("unet", 3, 3, 32, divisor=1), own_nets.UNet(16))
    half = net.space.check({d.name: d.options[-1] // 2 for d in net.space.decisions})
    cut, plain = extract(net, half).model, own_nets.UNet(8)
    assert {n: t.shape for n, t in cut.state_dict().items()} == {n: t.shape for n, t in plain.state_dict().items()}
    plain.load_state_dict(cut.state_dict())
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(plain.eval()(x), cut.eval()(x))


def test_modules_that_share_a_weight_share_it_after_a_cut():
    net, _, _ = traced("Recurrent")
    own = extract(net, net.space.check({d.name: d.options[0] for d in net.space.decisions})).model
    assert own.one.weight is own.other.weight and own.one.weight.shape[0] < 32


def test_protected_modules_keep_their_channels():
    free = TracedSupernet(OwnBase("unet", 3, 3, 32), own_nets.UNet())
    kept = TracedSupernet(OwnBase("unet", 3, 3, 32, keep=("down2.*", "head")), own_nets.UNet())
    names = {d.name for d in free.space.decisions}
    assert {"down2.0", "down2.3"} < names  # each writes a group of its own
    assert {d.name for d in kept.space.decisions} == names - {"down2.0", "down2.3"}
    assert any(line == "down2.0: --keep" for line in kept.channels.fixed)
    narrowest = CostTable.build(kept.space, "macs").extremes()[0]
    cut = extract(kept, narrowest).model
    assert [cut.down2[k].out_channels for k in (0, 3)] == [32, 32] and cut.down1[0].out_channels < 16
    with pytest.raises(UserError, match="keep 'dwn2' matches no module; near: down2"):
        TracedSupernet(OwnBase("unet", 3, 3, 32, keep=("dwn2",)), own_nets.UNet())


class Shaped(nn.Module):
    """Reads its channels as a view of a fixed number: only the proof sees that they cannot be cut."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 1), nn.Linear(16, 4)

    def forward(self, x):
        return self.c(self.b(self.a(x)).mean((2, 3)).view(-1, 16))


def test_channels_that_code_counts_stay():
    channels = safe_channels(Shaped(), (3, 8, 8))
    assert [g.name for g in channels.groups] == ["a"] and channels.fixed[0].startswith("b: ")


SHORT = ["--img-size", 8, "--divisor", 2, "--budget", "50%", "--search-epochs", 1, "--epochs", 1, "-b", 256]
L1 = ["--method", "l1"]


@pytest.fixture(scope="module")
def run_of_a_file(tmp_path_factory):
    """(a run with ``--model-file``, the file that it had)."""
    folder = tmp_path_factory.mktemp("own")
    file = folder / "own_nets.py"
    shutil.copy(FILE, file)
    patch = pytest.MonkeyPatch()
    with patch.context():
        out = folder / "run"
        assert call(search_tool, patch, "--model-file", f"{file}:build", *SHORT, *L1, "--output", out) == 0
    return out, file


def test_a_file_is_exported_and_needs_no_dnas(run_of_a_file, tmp_path):
    out, _ = run_of_a_file
    for name in ("model.py", "model.safetensors", "own_nets.py"):
        shutil.copy(out / name, tmp_path)
    code = (
        "import sys; sys.modules.update(dnas=None); sys.path.insert(0, '.'); import model, torch, json;"
        "net = model.create(pretrained=True); fresh = model.create();"
        "print(json.dumps([net.a.out_channels, net.b.out_channels, sum(p.numel() for p in net.parameters()),"
        "bool(torch.equal(net.fc.weight, fresh.fc.weight))]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    document = read_arch(out / "arch.json")
    answers, found = document["answers"], json.loads(done.stdout)
    assert found == [answers["a"], answers["b"], document["params"], False]
    metrics = json.loads((out / "metrics.json").read_text())
    assert 0.98 * metrics["budget"][0]["limit"] <= metrics["found"]["macs"] <= metrics["budget"][0]["limit"]


def test_another_command_needs_the_code_of_the_network(run_of_a_file, tmp_path, monkeypatch, capsys):
    out, file = run_of_a_file
    new = ("--output", tmp_path / "new")
    check_refused(call(export_tool, monkeypatch, out, *new), capsys, "--model-file own_nets.py:build is needed")
    check_refused(call(retrain_tool, monkeypatch, out, *new), capsys, "--model-file own_nets.py:build is needed")
    assert call(export_tool, monkeypatch, out, *new, "--model-file", f"{file}:build", "--name", "other") == 0
    assert (tmp_path / "new" / "own_nets.py").read_text() == FILE.read_text()
    changed = tmp_path / "own_nets.py"
    changed.write_text(FILE.read_text() + "\n# changed\n")
    code = call(export_tool, monkeypatch, out, "--output", tmp_path / "never", "--model-file", f"{changed}:build")
    check_refused(code, capsys, "is another file than the one that made this network")
    again = ("--output", tmp_path / "again", "--model-file", f"{file}:build", "--epochs", 1, "-b", 256)
    assert call(retrain_tool, monkeypatch, out, *again) == 0
    assert {"model.py", "own_nets.py", "model.safetensors"} <= {p.name for p in (tmp_path / "again").iterdir()}


def test_a_run_goes_on_only_with_its_code(run_of_a_file, tmp_path, monkeypatch, capsys):
    """A config.json names a file, but a run folder alone executes nothing."""
    out, file = run_of_a_file
    check_refused(call(search_tool, monkeypatch, "--resume", out), capsys, "is needed again")
    moved, changed = tmp_path / "moved.py", tmp_path / "changed.py"
    shutil.copy(file, moved)
    changed.write_text(FILE.read_text() + "\n# changed\n")
    code = call(search_tool, monkeypatch, "--resume", out, "--model-file", f"{changed}:build")
    check_refused(code, capsys, "its SHA-256 differs")
    assert call(search_tool, monkeypatch, "--resume", out, "--model-file", f"{moved}:build") == 0


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("missing.py:build", "FILE.py:FUNCTION is expected"),
        ("{file}", "FILE.py:FUNCTION is expected"),
        ("{file}:bild", "has no function 'bild'"),
        ("{file}:fails", "makes no network: ValueError: no such layer"),
        ("{file}:nothing", "makes a int: an nn.Module with parameters is expected"),
        ("{file}:rows", "cannot be run on an image of 3 x 8 x 8"),
        ("{file}:UNet", r"gives [1, 3, 8, 8] for one image; the data has classes for [1, 10]"),
    ],
)
def test_a_wrong_file_or_function(given, said, tmp_path, monkeypatch, capsys):
    file = tmp_path / "own_nets.py"
    file.write_text(FILE.read_text() + BROKEN)
    text = given.format(file=file)
    code = call(search_tool, monkeypatch, "--model-file", text, *SHORT, *L1, "--output", tmp_path / "run")
    check_refused(code, capsys, said)
    assert not (tmp_path / "run").exists()


def test_a_file_that_cannot_be_run(tmp_path, monkeypatch, capsys):
    (tmp_path / "broken.py").write_text("import torch\nx = 1 / 0\n")
    code = call(search_tool, monkeypatch, "--model-file", f"{tmp_path / 'broken.py'}:build", *SHORT)
    check_refused(code, capsys, "cannot be run: ZeroDivisionError: division by zero")


def test_a_file_that_changes_meanwhile(tmp_path):
    """The export has the text that was run."""
    file = tmp_path / "own_nets.py"
    shutil.copy(FILE, file)
    own, about = read_function(f"{file}:build")
    file.write_text("raise SystemExit")
    net = OwnSupernet(OwnBase(**{"num_classes": 10, "img_size": 16, **about}), own)
    arch = net.space.check({d.name: d.options[0] for d in net.space.decisions})
    data = {"num_classes": 10, "in_chans": 3, "img_size": 16, "mean": [0.5] * 3, "std": [0.5] * 3}
    document = arch_document("dnas_net", net.net_of(arch), data, supernet="build", answers=arch, own=own)
    write_export(tmp_path / "run", document, own)
    assert (tmp_path / "run" / "own_nets.py").read_bytes() == FILE.read_bytes()


def test_an_export_that_needs_a_package_of_the_search_path_and_a_private_number(tmp_path, monkeypatch):
    """The process that checks an export finds packages where this one does; dnas is not among them."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/my_layers.py").write_text("from torch.nn import Linear\n")
    monkeypatch.syspath_prepend(str(tmp_path / "elsewhere"))
    (tmp_path / "private.py").write_text(PRIVATE)
    own, about = read_function(f"{tmp_path / 'private.py'}:build")
    net = OwnSupernet(OwnBase(**{"num_classes": 10, "img_size": 8, **about}), own)
    arch = net.space.check({d.name: d.options[0] for d in net.space.decisions})
    data = {"num_classes": 10, "in_chans": 3, "img_size": 8, "mean": [0.5] * 3, "std": [0.5] * 3}
    document = arch_document("dnas_net", net.net_of(arch), data, supernet="build", answers=arch, own=own)
    assert document["net"]["modules"][""] == {"_width": arch["first"]}
    write_export(tmp_path / "run", document, own)
    assert verify_export(tmp_path / "run")["macs"] == document["macs"]


@pytest.mark.parametrize("name", ["model.py", "my-net.py", "3d.py"])
def test_files_of_any_name(name, tmp_path):
    """The export's own file is model.py, and names in it are plain."""
    shutil.copy(FILE, tmp_path / name)
    own, about = read_function(f"{tmp_path / name}:build")
    net = OwnSupernet(OwnBase(**{"num_classes": 10, "img_size": 16, **about}), own)
    arch = net.space.check({d.name: d.options[0] for d in net.space.decisions})
    data = {"num_classes": 10, "in_chans": 3, "img_size": 16, "mean": [0.5] * 3, "std": [0.5] * 3}
    document = arch_document("dnas_net", net.net_of(arch), data, supernet="build", answers=arch, own=own)
    write_export(tmp_path / "run", document, own)
    spec = importlib.util.spec_from_file_location("exported", tmp_path / "run" / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert count_params(module.create()) == document["params"]


def test_a_network_that_is_made_once_is_refused():
    """A supernet cuts its network: the next one has to be whole."""
    one = own_nets.Plain()
    create = made_by(lambda: one, "net")
    assert create() is one
    with pytest.raises(UserError, match="the same network twice"):
        create()
    again = made_by(own_nets.Plain, "net")
    assert again() is not again()


class Drawn(nn.Module):
    """Draws its weights by rules of its own, after those of its parts."""

    def __init__(self):
        super().__init__()
        self.attention, self.fc = nn.MultiheadAttention(8, 2), nn.Linear(8, 3)

    def reset_parameters(self):
        nn.init.zeros_(self.fc.weight)


def test_fresh_weights_are_those_of_the_networks_own_rules():
    net = Drawn()
    for p in net.parameters():
        nn.init.constant_(p, 7.0)
    fresh = given(net).create()
    assert not fresh.fc.weight.any() and not (fresh.attention.in_proj_weight == 7).any()
    assert (net.fc.weight == 7).all()


class Breaks(nn.Module):
    """The second result is no number once channels are gone."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 4, 1)

    def forward(self, x):
        x = self.a(x)
        return self.b(x), self.b(x) * (1.0 if x.shape[1] == 16 else float("nan"))


def test_all_results_are_proved():
    channels = safe_channels(Breaks(), (3, 8, 8))
    assert not channels.groups and "differ by nan" in channels.fixed[0]


class NoBias(nn.Module):
    """A group norm without a bias."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 16, 1), nn.GroupNorm(4, 16), nn.Conv2d(16, 4, 1)
        self.norm.bias = None

    def forward(self, x):
        return self.b(self.norm(self.a(x)))


def test_a_group_norm_without_bias():
    assert [(g.name, g.size, g.step) for g in safe_channels(NoBias(), (3, 8, 8)).groups] == [("a", 4, 4)]


def test_flags_that_do_not_go_together(monkeypatch, capsys):
    for flags in (["--model", "resnet18"], ["--supernet", "toy"], ["--pretrained"]):
        code = call(search_tool, monkeypatch, "--model-file", f"{FILE}:build", *SHORT, *flags)
        check_refused(code, capsys, f"{flags[0]} does not go with --model-file")


def test_a_network_of_a_program_is_pruned_and_exported(tmp_path):
    torch.manual_seed(3)
    net = own_nets.Plain()
    before = copy.deepcopy(net.state_dict())
    short = {"img_size": 8, "divisor": 2, "search_epochs": 1, "epochs": 1, "batch_size": 256}
    done = dnas.prune(net, budget="50%", method="l1", output=tmp_path / "run", **short)
    assert all(torch.equal(before[name], t) for name, t in net.state_dict().items())
    model, x = done.model().eval(), torch.randn(3, 3, 8, 8)
    assert count_macs(model, 3, 8) == done.costs["macs"] and isinstance(model, own_nets.Plain)
    program = torch.export.load(done.export(tmp_path / "export") / "model.pt2").module()
    with torch.no_grad():
        assert (program(x) - model(x)).abs().max() < 1e-5
    with pytest.raises(UserError, match="only the program that gave Plain can make it again"):
        build_net(read_arch(done.folder / "arch.json")["net"], num_classes=10)


def test_a_program_whose_modules_share_a_weight(tmp_path):
    """A loaded program has a parameter for each name of a shared weight: it counts once."""
    own = given(own_nets.Recurrent())
    net = OwnSupernet(OwnBase("Recurrent", 10, 3, 16, divisor=2), own)
    arch = net.space.check({d.name: d.options[0] for d in net.space.decisions})
    data = {"num_classes": 10, "in_chans": 3, "img_size": 16, "mean": [0.5] * 3, "std": [0.5] * 3}
    document = arch_document("dnas_net", net.net_of(arch), data, supernet="Recurrent", answers=arch, own=own)
    write_export(tmp_path, document, own)
    write_program(build_net(document["net"], num_classes=10, own=own), (3, 16, 16), tmp_path)
    assert verify_export(tmp_path)["params"] == document["params"]


def test_kept_weights_are_those_of_the_masked_network():
    torch.manual_seed(0)
    given = own_nets.Plain()
    net = OwnSupernet(OwnBase("net", 10, 3, 16, divisor=2), Own(own_nets.Plain), lively(given)).eval()
    arch, x = net.space.check({d.name: d.options[-1] // 2 for d in net.space.decisions}), torch.randn(2, 3, 16, 16)
    model = build_net(net.net_of(arch), num_classes=10, own=net.own).eval()
    model.load_state_dict(plain_state(net, arch))
    with torch.no_grad():
        assert (model(x) - net(x, arch)).abs().max() < 1e-5
    assert not torch.equal(build_net(net.net_of(arch), num_classes=10, own=net.own).a.weight, model.a.weight)


def test_what_is_no_network_is_refused():
    with pytest.raises(UserError, match="net is a int: a name, a torch network"):
        dnas.search(3, budget="50%")
    with pytest.raises(UserError, match="pretrained is no argument beside a network of your own"):
        dnas.search(own_nets.build, budget="50%", pretrained=True)


def test_signals_are_no_images_for_other_networks():
    batch = [(torch.zeros(8, 2, 16), torch.arange(8) % 2)]
    for name in ("toy", "resnet18"):
        with pytest.raises(UserError, match=r"inputs of \[2, 16\]: only a network of your own"):
            dnas.search(name, budget="50%", data=(batch, batch))
