"""dnas.search and dnas.prune: what the command does, from names, objects and loaders."""

import json
import signal
import subprocess
import sys

import pytest
import safetensors.torch
import timm
import torch
from commands import call, check_refused, search_tool, trust
from torch.utils.data import DataLoader, TensorDataset

import dnas
from dnas.export.model_file import count_macs
from dnas.nets.layer_supernet import MacroSupernet
from dnas.spec.checks import UserError
from dnas.training.data import load_data
from dnas.training.given_data import data_of_loaders
from supernets.toy import toy

SHORT = {"img_size": 8, "search_epochs": 2, "epochs": 1, "batch_size": 128}
NARROW = {"layers": [1, 1, 1, 1], "channels": [8, 16, 16, 24]}


SMALL_VIT = {"depth": 1, "embed_dim": 12}


def small_vit():
    """It is built for images of 224 pixels, which only the shapes of its weights show."""
    return timm.create_model("vit_tiny_patch16_224", num_classes=10, **SMALL_VIT)


def narrow_resnet():
    torch.manual_seed(0)
    return timm.create_model("resnet18", num_classes=10, **NARROW)


@pytest.fixture(scope="module")
def toy_result(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        trust(patch)
        return dnas.search("toy", budget="40%", seed=1, output=tmp_path_factory.mktemp("api") / "run", **SHORT)


def test_it_is_what_the_command_does(toy_result, tmp_path, trusted, monkeypatch):
    flags = [w for key, value in SHORT.items() for w in (f"--{key.replace('_', '-')}", value)]
    out = tmp_path / "run"
    words = ("--supernet", "toy", "--budget", "40%", "--seed", 1, *flags, "--output", out)
    assert call(search_tool, monkeypatch, *words) == 0
    assert dnas.Result(out).arch == toy_result.arch
    there, here = ((folder / "history.jsonl").read_text().splitlines() for folder in (out, toy_result.folder))
    assert [json.loads(row)["loss"] for row in there] == [json.loads(row)["loss"] for row in here]
    there, here = (json.loads((folder / "config.json").read_text())["args"] for folder in (out, toy_result.folder))
    assert there == here | {"output": str(out)}


def test_what_a_result_has(toy_result, tmp_path):
    limit = toy_result.metrics["budget"][0]["limit"]
    x = torch.randn(2, 3, 8, 8)
    model = toy_result.model().eval()
    assert 0.98 <= toy_result.costs["macs"] / limit <= 1 and count_macs(model, 3, 8) == toy_result.costs["macs"]
    saved = safetensors.torch.load_file(toy_result.folder / "model.safetensors")
    assert all(torch.equal(saved[name], t) for name, t in model.state_dict().items())
    fresh = toy_result.model(weights=None).eval()
    assert not torch.equal(fresh(x), model(x)) and fresh(x).shape == (2, 10)
    with pytest.raises(UserError, match="weights 'best': this run has 'trained'"):
        toy_result.model(weights="best")
    copied = toy_result.export(tmp_path / "exported")
    assert {path.name for path in copied.iterdir()} == {"model.py", "model.safetensors", "arch.json"}
    assert toy_result.report(tmp_path / "page.html").read_text().startswith("<!doctype html>")


def loaders(kind, count=256):
    data = load_data(img_size=8)
    x, y = next(iter(data.val_batches(360)))
    pairs = (x[:count], y[:count]), (x[count:], y[count:])
    if kind == "iterables":
        return tuple(list(zip(a.split(50), b.split(50), strict=True)) for a, b in pairs)
    return tuple(DataLoader(TensorDataset(a, b), batch_size=32, shuffle=True) for a, b in pairs)


@pytest.mark.parametrize("kind", ["iterables", "loaders"])
def test_loaders_are_data(kind):
    data = data_of_loaders(*loaders(kind))
    (x, y), *_ = data_of_loaders(*loaders("iterables")).val_batches(104)
    assert (data.num_train, data.num_val, data.num_classes, data.in_chans, data.img_size) == (256, 104, 10, 3, 8)
    got_x, got_y = next(iter(data.val_batches(104)))
    assert torch.equal(got_x, x) and torch.equal(got_y, y)
    of = {tuple(image.flatten().tolist()): int(label) for batch in data_of_loaders(*loaders("iterables")).train_batches(
        256, seed=0) for image, label in zip(*batch, strict=True)}  # fmt: skip
    for batch in data.train_batches(64, seed=1):
        assert all(of[tuple(image.flatten().tolist())] == int(label) for image, label in zip(*batch, strict=True))
    rest, taken = data.split(0.25, seed=0)
    seen = [labels for _, labels in data.train_batches(64, seed=0, indices=taken)]
    assert len(torch.cat(seen)) == len(taken) // 64 * 64 and len({*rest.tolist()} | {*taken.tolist()}) == 256


@pytest.mark.parametrize("batches, said", [
    ([], "no training batch"), ([torch.zeros(2)], "a training batch is Tensor"),
    ([(torch.zeros(2), torch.zeros(2))], r"float32 \[2\]"),
    ([(torch.zeros(2, 3, 8, 8), torch.zeros(2))], "at least 2 classes"),
    ([(torch.zeros(2, 3, 8, 8), torch.arange(2)), (torch.zeros(1, 3, 9, 9), torch.zeros(1))], "one shape"),
])  # fmt: skip
def test_batches_that_are_no_data(batches, said):
    with pytest.raises(UserError, match=said):
        data_of_loaders(batches, [(torch.zeros(2, 3, 8, 8), torch.zeros(2))])


def test_batches_of_two_sides():
    batches = [(torch.zeros(4, 3, 8, 12), torch.arange(4))]
    data = data_of_loaders(batches, batches)
    assert data.img_size == (8, 12) and data.summary["classes"] == 4


class Digits(torch.utils.data.Dataset):
    """Its images are float64, and ``targets`` are not the labels that it returns."""

    def __init__(self, shift):
        self.targets, self.shift = [0, 1, 2, 3] * 4, shift

    def __len__(self):
        return 16

    def __getitem__(self, k):
        return torch.full((3, 8, 8), float(k), dtype=torch.double), self.targets[k] + self.shift


def test_labels_are_those_that_are_returned():
    loader = DataLoader(Digits(1), batch_size=4)
    data = data_of_loaders(loader, DataLoader(Digits(0), batch_size=4))
    assert data.num_classes == 5 and data._labels.tolist() == [1, 2, 3, 4] * 4
    (x, y), *_ = data.train_batches(16, seed=0)
    assert x.dtype == torch.float32 and torch.equal(y, x[:, 0, 0, 0].long() % 4 + 1)


def test_a_sampler_that_leaves_images_out_is_refused():
    some = DataLoader(Digits(0), sampler=torch.utils.data.SubsetRandomSampler(range(4)))
    with pytest.raises(UserError, match="^the training loader has a SubsetRandomSampler: .*Subset says"):
        data_of_loaders(some, some)


def test_flags_of_the_recipe_are_arguments(tmp_path, trusted):
    """A whole run with class weights, a teacher and steps of two batches."""
    torch.manual_seed(0)
    teacher, file = timm.create_model("test_resnet", num_classes=10), tmp_path / "teacher.safetensors"
    safetensors.torch.save_file(teacher.state_dict(), file)
    given = {"class_weights": [1] * 9 + [2.5], "grad_accum_steps": 2, "kd_model_name": "test_resnet"}
    given |= {"kd_checkpoint": str(file), "task_loss_weight": 0.8}
    result = dnas.search("toy", budget="50%", output=tmp_path / "run", **SHORT, **given)
    args = json.loads((result.folder / "config.json").read_text())["args"]
    assert {name: args[name] for name in given} == given | {"class_weights": "1,1,1,1,1,1,1,1,1,2.5"}
    rows = [json.loads(row) for row in (result.folder / "history.jsonl").read_text().splitlines()]
    assert [row["batches"] for row in rows] == 2 * [2, 2, 2, 1]  # of 1006 images in batches of 128


def test_a_supernet_of_ones_own_is_not_changed(tmp_path, trusted):
    net = MacroSupernet(toy(num_classes=10, img_size=8, width_mult=2.0))
    before = {name: t.clone() for name, t in net.state_dict().items() if isinstance(t, torch.Tensor)}
    data = load_data(img_size=8)
    found = [dnas.search(net, budget="50%", data=data, output=tmp_path / str(k), **SHORT).arch for k in range(2)]
    assert found[0] == found[1] and all(torch.equal(net.state_dict()[name], t) for name, t in before.items())


def test_a_run_of_another_space_is_not_resumed(tmp_path, trusted, monkeypatch, capsys):
    space, out = toy(num_classes=10, img_size=8, width_mult=2.0), tmp_path / "run"
    monkeypatch.setattr("dnas.cli.search.find", lambda *_: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        dnas.search(space, budget="50%", output=out, **SHORT)
    out.mkdir(exist_ok=True)
    config = {"argv": ["--budget=50%", "--img-size=8"], "args": {}, "space": {"name": "toy"}}
    (out / "config.json").write_text(json.dumps(config))
    check_refused(call(search_tool, monkeypatch, "--resume", out), capsys, "is of a space that its flags do not make")


def test_a_network_with_weights_is_pruned_and_fine_tuned(tmp_path, trusted):
    model = narrow_resnet()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    result = dnas.prune(
        model, budget="60%", method="l1", data=loaders("loaders"), model_kwargs=NARROW, divisor=2, search_epochs=1,
        epochs=1, lr=1e-8, min_lr=0.0, warmup_epochs=0, batch_size=64, output=tmp_path / "run",
    )  # fmt: skip
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    started = safetensors.torch.load_file(tmp_path / "run" / "initial.safetensors")
    assert all(torch.equal(started[name], t) for name, t in before.items())
    argv = json.loads((tmp_path / "run" / "config.json").read_text())["argv"]
    assert (
        f"--initial-checkpoint={tmp_path / 'run' / 'initial.safetensors'}" in argv
    )  # so that the command can resume it
    # At a learning rate of nearly 0 the best filters of the stem are still those of the model.
    norms = before["conv1.weight"].abs().sum((1, 2, 3))
    for weights in ("search", "trained"):
        kept = result.model(weights).conv1.weight
        rows = [int(((kept[k] - before["conv1.weight"]).abs().amax((1, 2, 3))).argmin()) for k in range(len(kept))]
        assert torch.allclose(kept, before["conv1.weight"][rows], atol=1e-4) and len({*rows}) == len(rows) < len(norms)
    assert result.metrics["found"]["inherited"] and result.metrics["balanced"]["inherited"]


def test_a_space_of_ones_own(tmp_path, trusted):
    space = toy(num_classes=10, img_size=8, width_mult=2.0)
    for k, net in enumerate((space, MacroSupernet(space))):
        result = dnas.search(net, budget="50%", method="balanced", output=tmp_path / str(k), **SHORT)
        assert 0.98 <= result.costs["macs"] / result.metrics["budget"][0]["limit"] <= 1
    assert json.loads((tmp_path / "1" / "arch.json").read_text())["supernet"] == "toy"


@pytest.mark.parametrize("given, said", [
    ({}, "^a budget is needed"), ({"budget": "-3MFLOPs"}, "-3MFLOPs"),
    ({"budget": "50%", "epohcs": 3}, "^unknown argument 'epohcs': did you mean epochs\\?$"),
    ({"budget": "50%", "epochs": 0}, "^epochs 0 is not between"),
    ({"budget": "50%", "epochs": "many"}, "^argument epochs: invalid int value: 'many'$"),
    ({"budget": "50%", "class_weights": [1, 2.5]}, "^class_weights '1,2.5': 10 numbers are expected"),
    ({"budget": ["9Params", "50%"]}, "9Params"),  # both are limits
    ({"budget": "50%", "arms": ["finetune", "scratch-x"]}, "arms 'finetune,scratch-x'"),
    ({"budget": "50%", "lr": [1, 2]}, "^argument lr: invalid float value: '1,2'$"),
    ({"budget": "50%", "method": "l2"}, "^argument method: invalid choice: 'l2'"),
    ({"budget": "50%", "data": "no/where"}, "^data folder 'no/where' does not exist"),
    ({"budget": "5", "data": "no/where"}, "'5'"),  # the budget is read before the data is
    ({"budget": "50%", "sweep": "1M"}, "^sweep is no argument here"),
    ({"budget": "50%", "net": "resnet19"}, "^model 'resnet19' is no model of timm's; near: resnet"),
    ({"budget": "50%", "net": torch.nn.Linear(2, 2)}, "^Linear cannot be run on an image of 3 x 32 x 32"),
    ({"resume": "no/run"}, "^resume 'no/run': expected a run folder"),
    ({"resume": "no/run", "epochs": 3}, "^with resume, only net and data are arguments"),
    ({"budget": "50%", "data": [1, 2, 3]}, "^data is a list: "), ({"budget": "50%", "dry_run": True}, "^dry_run is no"),
    ({"budget": "50%", "net": toy(num_classes=10), "divisor": 2}, "^divisor is no argument beside a space"),
    ({"budget": "50%", "net": toy(num_classes=4, img_size=32)}, "^toy is for num_classes 4, the data has 10"),
    ({"budget": "50%", "net": narrow_resnet()}, "^model resnet18 is another network than the one given: model_kwargs"),
    ({"budget": "50%", "net": small_vit(), "model_kwargs": SMALL_VIT}, "^model vit_tiny.* is another network than the"),
    ({"budget": "1kFLOPs", "net": narrow_resnet(), "model_kwargs": NARROW, "img_size": 8}, "out of reach"),
])  # fmt: skip
def test_arguments_that_make_no_sense(given, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=said) as told:
        dnas.search(**given)
    assert "--" not in str(told.value) and "\n" not in str(told.value) and not [*tmp_path.iterdir()]


def test_torch_is_not_imported_before_it_is_needed():
    program = "import sys, dnas; print('torch' in sys.modules, dnas.__version__)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == f"False {dnas.__version__}\n"
