"""What an export writes: files that read back, work without dnas, are verified, and appear whole or not at all."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from documents import (
    CLASSES,
    IMG,
    NET,
    closed_form,
    document,
    layers,
)
from torch import nn

from dnas.export import arch_schema, model_file, native, verify
from dnas.spec.checks import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An export with weights, and a batch norm that has seen data."""
    folder = tmp_path_factory.mktemp("run") / "new"
    macs, params = closed_form(NET)
    budget = [{"metric": "macs", "limit": 1.02 * macs, "reached": macs}, {"metric": "ms", "limit": 2, "reached": 1.5}]
    model_file.write_export(folder, document(budget=budget))
    model = model_file.build_net(NET, num_classes=CLASSES)
    model(torch.randn(8, 3, IMG, IMG))
    model_file.save_weights(model, folder)
    x = torch.linspace(-2, 2, 2 * 3 * IMG * IMG).view(2, 3, IMG, IMG)
    with torch.no_grad():
        safetensors.torch.save_file({"x": x, "logits": model.eval()(x)}, folder / "expected.safetensors")
    return folder


def test_arch_json_reads_as_it_was_written(folder):
    written = model_file.read_arch(folder / "arch.json")
    assert tuple(written) == tuple(arch_schema.ARCH)
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


def test_a_file_from_before_the_share_of_the_crop_was_written(folder, tmp_path):
    old = {key: value for key, value in model_file.read_arch(folder / "arch.json").items() if key != "crop_pct"}
    (tmp_path / "arch.json").write_text(json.dumps(old))
    assert model_file.read_arch(tmp_path / "arch.json") == old
    model_file.write_export(tmp_path / "again", old)
    assert '"crop_pct": 1.0' in (tmp_path / "again/model.py").read_text()


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
    figures = verify.verify_export(folder)
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
        verify.verify_export(tmp_path)


def test_writing_is_whole_or_not_at_all(folder, tmp_path, monkeypatch):
    wrong = {**document(), "macs": 1}
    with pytest.raises(UserError, match="macs"):
        model_file.write_export(tmp_path / "never", wrong)
    assert not (tmp_path / "never").exists()

    model_file.write_export(tmp_path, document())
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full_disk(descriptor):
        raise OSError("no space left")

    monkeypatch.setattr("os.fsync", full_disk)
    for write in (
        lambda: model_file.write_export(tmp_path, document(supernet="other")),
        lambda: model_file.save_weights(nn.Linear(2, 2), tmp_path),
    ):
        with pytest.raises(OSError, match="no space left"):
            write()
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_counting_an_arch_leaves_the_random_numbers_alone():
    state = torch.get_rng_state()
    document()
    assert torch.equal(torch.get_rng_state(), state)
