"""Exported networks against their rows, against closed forms, against timm's own, and in a process without dnas."""

import copy
import math
import pickle
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from documents import (
    CLASSES,
    IMG,
    IN_CHANS,
    NET,
    document,
)
from torch import nn

from dnas import export, native
from dnas.units import UserError


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Such small convolutions gain nothing from two threads, and on a busy machine lose a factor of fifty by them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random_net(seed):
    """Rows of all kinds, kernels, strides and odd widths; 1 to 6 stages."""
    rng = random.Random(seed)

    def width():
        return rng.choice([rng.randint(1, 40), 8 * rng.randint(1, 5)])

    net = {"act": rng.choice(list(native.ACTS)), "stem": {"width": width(), "stride": rng.choice([1, 2])}}
    net |= {"stages": [], "head": rng.randint(1, 90)}
    before = net["stem"]["width"]
    for _ in range(1 + seed % 6):
        stage = []
        for j in range(rng.randint(1, 3)):
            kind, stride = rng.choice(["ds", "ir", "er"]), 2 if j == 0 and (seed > 27 or rng.random() < 0.5) else 1
            out = before if rng.random() < 0.5 else width()
            row = {"kind": kind, "kernel": rng.choice([1, 3, 5, 7]), "stride": stride}
            row["mid"] = before if kind == "ds" else rng.choice([rng.randint(1, 100), 8 * rng.randint(1, 12)])
            row |= {"out": out, "se": rng.choice([0, 0, rng.randint(1, 20)])}
            row["skip"] = stride == 1 and out == before and rng.random() < 0.6
            stage.append(row)
            before = out
        net["stages"].append(stage)
    return net


def layers(net, classes=CLASSES):
    """(name, in, out, kernel, stride, groups, bias, maps) of every convolution and linear layer, read off the rows.

    ``maps`` is "map" where the layer sees the feature map and "one" where it sees one pixel.
    """
    width = net["stem"]["width"]
    yield "conv_stem", IN_CHANS, width, 3, net["stem"]["stride"], 1, False, "map"
    for i, rows in enumerate(net["stages"]):
        for j, row in enumerate(rows):
            at, mid, out, k, s = f"blocks.{i}.{j}", row["mid"], row["out"], row["kernel"], row["stride"]
            if row["kind"] == "ir":
                yield f"{at}.conv_pw", width, mid, 1, 1, 1, False, "map"
            if row["kind"] == "er":
                yield f"{at}.conv_exp", width, mid, k, s, 1, False, "map"
            else:
                yield f"{at}.conv_dw", mid, mid, k, s, mid, False, "map"
            if row["se"]:
                yield f"{at}.se.conv_reduce", mid, row["se"], 1, 1, 1, True, "one"
                yield f"{at}.se.conv_expand", row["se"], mid, 1, 1, 1, True, "one"
            yield f"{at}.conv_pw{'l' * (row['kind'] != 'ds')}", mid, out, 1, 1, 1, False, "map"
            width = out
    yield "conv_head", width, net["head"], 1, 1, 1, False, "map"
    yield "classifier", net["head"], classes, 1, 1, 1, True, "one"


def closed_form(net, img_size=IMG, classes=CLASSES):
    """(MACs, parameters): every convolution without bias has a batch norm, two numbers a channel, behind it."""
    macs = params = 0
    for _, n_in, n_out, kernel, stride, groups, bias, where in layers(net, classes):
        if where == "map":
            img_size = math.ceil(img_size / stride)
        weights = n_out * (n_in // groups) * kernel**2
        macs += weights * (img_size**2 if where == "map" else 1)
        params += weights + (n_out if bias else 2 * n_out)
    return macs, params


NETS = [random_net(seed) for seed in range(30)]


def test_the_random_nets_have_everything():
    rows = [row for net in NETS for stage in net["stages"] for row in stage]
    assert {row["kind"] for row in rows} == {"ds", "ir", "er"}
    assert {row["kernel"] for row in rows} == {1, 3, 5, 7}
    assert {(row["kind"], row["mid"] % 8 > 0, row["se"] > 0, row["skip"]) for row in rows} >= {
        (kind, odd, se, skip)
        for kind in ("ir", "er")
        for odd in (True, False)
        for se in (True, False)
        for skip in (0, 1)
    }
    assert {net["act"] for net in NETS} == set(native.ACTS)
    assert {len(net["stages"]) for net in NETS} == {1, 2, 3, 4, 5, 6}
    assert {(net["stem"]["stride"], net["stages"][0][0]["stride"]) for net in NETS} == {(1, 1), (1, 2), (2, 1), (2, 2)}
    halvings = [(net["stem"]["stride"] == 2) + sum(s[0]["stride"] == 2 for s in net["stages"]) for net in NETS]
    assert max(halvings) >= 6  # timm's builder left alone would turn the sixth stride into dilation
    assert any(  # a shortcut which timm would add, and must not
        not row["skip"] and row["stride"] == 1 and row["out"] == before["out"]
        for net in NETS
        for stage in net["stages"]
        for before, row in zip(stage, stage[1:], strict=False)
    )


@pytest.mark.parametrize("net", NETS)
def test_the_built_net_is_the_rows(net):
    export.check_net(net)
    model = export.build_net(net, num_classes=CLASSES)
    assert type(model) is timm.models.EfficientNet
    found = {
        name: (
            m.in_channels,
            m.out_channels,
            *m.kernel_size,
            *m.stride,
            *m.padding,
            *m.dilation,
            m.groups,
            m.bias is not None,
        )
        for name, m in model.named_modules()
        if isinstance(m, nn.Conv2d)
    }
    expected = {
        name: (n_in, n_out, k, k, s, s, k // 2, k // 2, 1, 1, groups, bias)
        for name, n_in, n_out, k, s, groups, bias, _ in layers(net)
    }
    del expected["classifier"]
    assert found == expected
    for tensor in model.parameters():
        assert tensor.requires_grad and tensor.is_leaf and tensor.isfinite().all()
    for rows, blocks in zip(net["stages"], model.blocks, strict=True):
        assert [block.has_skip for block in blocks] == [row["skip"] for row in rows]

    macs, params = closed_form(net)
    model.blocks[0].eval()
    modes = [m.training for m in model.modules()]
    assert export.count_macs(model, IN_CHANS, IMG) == macs
    assert export.count_macs_torch(model, IN_CHANS, IMG) == macs
    assert [m.training for m in model.modules()] == modes and model.training and not model.blocks[0].training
    assert export.count_params(model) == sum(p.numel() for p in model.parameters()) == params
    model.eval()
    x = torch.randn(2, IN_CHANS, IMG, IMG)
    assert model(x).shape == (2, CLASSES)

    features = native.build(net, "dnas", features_only=True, drop_path_rate=0.1).eval()
    maps = features(x)
    assert [m.shape[1] for m in maps] == features.feature_info.channels()
    assert [m.shape[2] for m in maps] == [math.ceil(IMG / r) for r in features.feature_info.reduction()]
    total = net["stem"]["stride"] * math.prod(stage[0]["stride"] for stage in net["stages"])
    assert features.feature_info.reduction()[-1] == total and len(set(features.feature_info.reduction())) == len(maps)


@pytest.mark.parametrize("net", NETS[4:7])
def test_the_built_net_is_a_good_citizen(net):
    model = export.build_net(net, num_classes=CLASSES).eval()
    x = torch.randn(2, IN_CHANS, IMG, IMG)
    with torch.no_grad():
        expected = model(x)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.fx.symbolic_trace(model)):
            assert torch.equal(twin(x), expected)
        torch.testing.assert_close(torch.jit.script(model)(x), expected)
        for kind in ("getter", "list", "hook", "fx"):
            maps = native.build(net, "dnas", features_only=True, feature_cls=kind)(x)
            assert len(maps) == 1 + sum(stage[0]["stride"] == 2 for stage in net["stages"])


@pytest.mark.parametrize("kind", ["ir", "er"])
def test_a_narrowed_block_has_the_variance_of_a_fresh_one(kind):
    row = {"kind": kind, "kernel": 3, "stride": 1, "mid": 9, "out": 512, "se": 500, "skip": True}
    net = {"act": "relu", "stem": {"width": 512, "stride": 2}, "stages": [[row]], "head": 8}
    block = export.build_net(net, num_classes=2).blocks[0][0]
    convs = [m for m in block.modules() if isinstance(m, nn.Conv2d)]
    assert len(convs) == (5 if kind == "ir" else 4)
    for conv in convs:
        if conv.weight.numel() > 4000:  # not the depthwise one: too few numbers for a variance
            fan_out = conv.kernel_size[0] ** 2 * conv.out_channels
            assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.06)


def rows_of(stem, act, *stages, head=1280):
    """Published tables: (kind, kernel, expansion, SE over input width, out, repeats, first stride, shortcuts)."""
    net, width = {"act": act, "stem": {"width": stem, "stride": 2}, "stages": [], "head": head}, stem
    for kind, kernel, expand, se, out, repeats, stride, *skip in stages:
        net["stages"].append([])
        for i in range(repeats):
            s = stride if i == 0 else 1
            row = {
                "kind": kind,
                "kernel": kernel,
                "stride": s,
                "mid": expand * width,
                "out": out,
                "se": int(se * width),
            }
            net["stages"][-1].append({**row, "skip": s == 1 and out == width and skip != [False]})
            width = out
    return net


PUBLISHED = {
    "mobilenetv2_100": rows_of(
        32,
        "relu6",
        ("ds", 3, 1, 0, 16, 1, 1),
        *[
            ("ir", 3, 6, 0, c, n, s)
            for c, n, s in [(24, 2, 2), (32, 3, 2), (64, 4, 2), (96, 3, 1), (160, 3, 2), (320, 1, 1)]
        ],
    ),
    "efficientnet_b0": rows_of(
        32,
        "silu",
        ("ds", 3, 1, 0.25, 16, 1, 1),
        *[
            ("ir", k, 6, 0.25, c, n, s)
            for k, c, n, s in [
                (3, 24, 2, 2),
                (5, 40, 2, 2),
                (3, 80, 3, 2),
                (5, 112, 3, 1),
                (5, 192, 4, 2),
                (3, 320, 1, 1),
            ]
        ],
    ),
    "efficientnet_es": rows_of(
        32,
        "relu",
        ("er", 3, 3, 0, 24, 1, 1, False),  # timm: hidden 4 x 24 at an input of 32
        ("er", 3, 8, 0, 32, 2, 2),
        ("er", 3, 8, 0, 48, 4, 2),
        ("ir", 5, 8, 0, 96, 5, 2),
        ("ir", 5, 8, 0, 144, 4, 1),
        ("ir", 5, 8, 0, 192, 2, 2),
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_nets_written_as_rows_are_timms_bit_for_bit(name):
    theirs, ours = timm.create_model(name).eval(), export.build_net(PUBLISHED[name], num_classes=1000).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))
    assert closed_form(PUBLISHED[name], 224, 1000)[1] == export.count_params(ours)
    if name == "mobilenetv2_100":
        assert export.count_params(ours) == 3_504_872
        macs = {count(m, 3, 224) for m in (ours, theirs) for count in (export.count_macs, export.count_macs_torch)}
        assert macs == {closed_form(PUBLISHED[name], 224, 1000)[0]}
        assert round(macs.pop() / 1e6, 2) == 300.77


# The exported files.


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An export with weights, and a batch norm that has seen data."""
    folder = tmp_path_factory.mktemp("run") / "new"
    macs, params = closed_form(NET)
    budget = [{"metric": "macs", "limit": 1.02 * macs, "reached": macs}, {"metric": "ms", "limit": 2, "reached": 1.5}]
    export.write_export(folder, document(budget=budget))
    model = export.build_net(NET, num_classes=CLASSES)
    model(torch.randn(8, 3, IMG, IMG))
    export.save_weights(model, folder)
    x = torch.linspace(-2, 2, 2 * 3 * IMG * IMG).view(2, 3, IMG, IMG)
    with torch.no_grad():
        safetensors.torch.save_file({"x": x, "logits": model.eval()(x)}, folder / "expected.safetensors")
    return folder


def test_arch_json_reads_as_it_was_written(folder):
    written = export.read_arch(folder / "arch.json")
    assert tuple(written) == tuple(export.ARCH)
    assert (written["macs"], written["params"]) == closed_form(NET)
    assert written["net"] == NET
    assert written["widths"] == {name: [n_in, n_out] for name, n_in, n_out, *_ in layers(NET)}
    assert written == document(budget=written["budget"])
    text = (folder / "arch.json").read_text()
    assert all(len(line) < 250 for line in text.splitlines())
    assert sum('"kind"' in line for line in text.splitlines()) == 5  # one row a block
    assert sorted(p.name for p in folder.iterdir()) == [
        "arch.json",
        "expected.safetensors",
        "model.py",
        "model.safetensors",
    ]


def test_model_py_is_native_py_and_data(folder):
    source = (folder / "model.py").read_text()
    body = Path(native.__file__).read_text().split('"""\n', 2)[1].strip()
    assert body in source and "import dnas" not in source and "from dnas" not in source
    assert all(len(line) <= 120 for line in source.splitlines())


CHECKS = """
import os, pathlib, sys, importlib.util, warnings
warnings.simplefilter("error")
warnings.filterwarnings("ignore", message="Overwriting dnas_test_net")

class WithoutDnas:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("dnas", "supernets", "fvcore"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, WithoutDnas())
import safetensors.torch, timm, timm.optim, torch
torch.set_num_threads(1)

def load(path):
    spec = importlib.util.spec_from_file_location("model", path)
    sys.modules["model"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

name = "dnas_test_net"
load("bare/model.py")
assert not timm.models.is_model_pretrained(name)
try:
    timm.create_model(name, pretrained=True)
except RuntimeError as error:
    assert name in str(error) and "No pretrained weights" in str(error), error
else:
    raise AssertionError("weights out of nothing")

load("whole/model.py")
assert timm.models.is_model_pretrained(name) and name in timm.list_models(module="model")
expected = safetensors.torch.load_file("whole/expected.safetensors")
x = expected["x"]
with torch.no_grad():
    model = timm.create_model(name, pretrained=True).eval()
    assert torch.equal(model(x), expected["logits"])
    other = timm.create_model(name, pretrained=True, num_classes=7, in_chans=1).eval()
    assert other(x[:, :1]).shape == (2, 7)
    ours, theirs = model.state_dict(), other.state_dict()
    same = {key for key in ours if ours[key].shape == theirs[key].shape and torch.equal(ours[key], theirs[key])}
    assert set(ours) - same == {"conv_stem.weight", "classifier.weight", "classifier.bias"}
    torch.testing.assert_close(theirs["conv_stem.weight"], ours["conv_stem.weight"].sum(1, keepdim=True))

    for kwargs in ({}, {"pretrained": True}, {"out_indices": (0, 2)}):
        features = timm.create_model(name, features_only=True, **kwargs).eval()
        maps, index = features(x), kwargs.get("out_indices", (0, 1, 2))
        assert [tuple(m.shape) for m in maps] == [[(2, 13, 32, 32), (2, 24, 16, 16), (2, 31, 8, 8)][i] for i in index]
        assert features.feature_info.channels() == [[13, 24, 31][i] for i in index]
        assert features.feature_info.reduction() == [[1, 2, 4][i] for i in index]
    final, maps = model.forward_intermediates(x)
    assert final.shape == (2, 50, 8, 8) and [m.shape[1] for m in maps] == [13, 24, 31]

    data = timm.data.resolve_model_data_config(model)
    assert data["input_size"] == (3, 32, 32) and data["mean"] == (0.5, 0.4, 0.25) and data["std"] == (0.25, 0.2, 1.0)
    cfg = model.pretrained_cfg
    assert cfg["pool_size"] == (8, 8) == tuple(model.forward_features(x).shape[2:]) and cfg["num_classes"] == 10
    assert model.get_submodule(cfg["classifier"]) is model.get_classifier() and cfg["first_conv"] == "conv_stem"
    model.reset_classifier(5)
    assert model(x).shape == (2, 5)
    model.reset_classifier(0)
    assert model(x).shape == (2, 50)
    model.reset_classifier(0, "")
    assert model(x).shape == (2, 50, 8, 8)

train = dict(drop_rate=0.1, drop_path_rate=0.2, global_pool="avgmax", bn_momentum=0.01)
model = timm.create_model(name, num_classes=4, **train)
assert model.bn1.momentum == 0.01 and type(model.blocks[1][1].drop_path).__name__ == "DropPath"
optimizer = timm.optim.create_optimizer_v2(model, "sgd", lr=0.1)
before = [p.detach().clone() for p in model.parameters()]
torch.nn.functional.cross_entropy(model(torch.randn(16, 3, 32, 32)), torch.arange(16) % 4).backward()
for key, p in model.named_parameters():
    assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0, key
optimizer.step()
assert all(not torch.equal(p, b) for p, b in zip(model.parameters(), before))

warnings.filterwarnings("ignore", message=".*torch.jit.script. is deprecated")
torch.jit.script(timm.create_model(name))
assert timm.create_model(name, features_only=True, feature_cls="fx", out_indices=(1,))(x)[0].shape == (2, 24, 16, 16)
assert not {"dnas", "fvcore"} & {key.partition(".")[0] for key in sys.modules}
try:
    import dnas
except ModuleNotFoundError:
    print("all done")
"""


def test_model_py_works_where_there_is_only_torch_and_timm(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "whole")
    (tmp_path / "bare").mkdir()
    shutil.copy(folder / "model.py", tmp_path / "bare")
    command = [sys.executable, "-I", "-B", "-c", CHECKS]
    child = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert child.returncode == 0, child.stderr
    assert child.stdout.strip() == "all done"


def test_verify_export(folder):
    figures = export.verify_export(folder)
    macs, params = closed_form(NET)
    assert (figures["macs"], figures["params"], figures["counted_by"]) == (macs, params, "fvcore")
    assert figures["outputs"] == [1, CLASSES] and figures["weights"] and figures["packages"] == ["timm", "torch"]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [('"mid": 96', '"mid": 88', "has macs"), ("import math\n", "import math, dnas\n", "does not work without dnas")],
)
def test_verify_export_finds_another_net_and_a_need_of_dnas(folder, tmp_path, old, new, said):
    shutil.copy(folder / "arch.json", tmp_path)
    source = (folder / "model.py").read_text()
    assert old in source
    (tmp_path / "model.py").write_text(source.replace(old, new))
    with pytest.raises(RuntimeError, match=said):
        export.verify_export(tmp_path)


def test_writing_is_whole_or_not_at_all(folder, tmp_path, monkeypatch):
    wrong = {**document(), "macs": 1}
    with pytest.raises(UserError, match="macs"):
        export.write_export(tmp_path / "never", wrong)
    assert not (tmp_path / "never").exists()

    export.write_export(tmp_path, document())
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full_disk(descriptor):
        raise OSError("no space left")

    monkeypatch.setattr("os.fsync", full_disk)
    for write in (
        lambda: export.write_export(tmp_path, document(supernet="other")),
        lambda: export.save_weights(nn.Linear(2, 2), tmp_path),
    ):
        with pytest.raises(OSError, match="no space left"):
            write()
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_counting_an_arch_leaves_the_random_numbers_alone():
    state = torch.get_rng_state()
    document()
    assert torch.equal(torch.get_rng_state(), state)
