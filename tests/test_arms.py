"""Kept weights: fine-tuned or trained from scratch, the arms of "Rethinking the Value of Network Pruning"."""

import json

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from commands import call, check_refused, retrain_tool, search_tool
from image_files import encode, write_folder
from timm.utils import random_seed

from dnas.export.model_file import build_net, read_arch
from dnas.spec.checks import UserError
from dnas.spec.recipe import Recipe, arm_epochs, parse_arms
from dnas.training.data import load_data
from dnas.training.loop import evaluate, recalibrate

NET = ("--model", "resnet18", "--model-kwargs", "layers=[1,1,1,1]", "channels=[8,16,16,24]", "--divisor", 2)


def test_epochs_of_the_arms():
    """20 epochs of search, as dear as 30 of the widest net; 10 of fine-tuning; a found net of a quarter of the cost."""
    found = {arm: arm_epochs(arm, 10, 20, 30.0, 0.25) for arm in ("finetune", "scratch-e", "scratch-b")}
    assert found == {"finetune": 10, "scratch-e": 30, "scratch-b": 130}


@pytest.mark.parametrize("text", ["fine-tune", "scratch-e,scratch-e", "scratch-e,", "finetune,scratch"])
def test_arms_that_are_none(text):
    with pytest.raises(UserError, match="arms"):
        parse_arms(text, True)


def test_a_fine_tuning_needs_weights(tmp_path, monkeypatch, capsys):
    code = call(search_tool, monkeypatch, *NET, "--budget", "50%", "--arms", "finetune", "--output", tmp_path / "run")
    check_refused(code, capsys, "--keep-weights is needed")


def test_recalibrated_norms_have_the_mean_and_variance_of_all_images():
    """Of the first norm, against numpy on what the first convolution writes; batches of one size weigh the same."""
    random_seed(0)
    model = timm.create_model("resnet18", num_classes=10, layers=[1, 1, 1, 1], channels=[8, 16, 16, 24]).train()
    data = load_data(img_size=16).take(128)
    batches = [x for x, _ in data.train_batches(64, seed=0)]
    model.bn1.running_mean.fill_(9)
    recalibrate(model, data.train_batches(64, seed=0), Recipe())
    with torch.no_grad():
        maps = [model.conv1(x).numpy() for x in batches]
    means = np.mean([m.mean((0, 2, 3)) for m in maps], 0)
    variances = np.mean([m.var((0, 2, 3)) * m[:, 0].size / (m[:, 0].size - 1) for m in maps], 0)
    np.testing.assert_allclose(model.bn1.running_mean, means, atol=1e-5)
    np.testing.assert_allclose(model.bn1.running_var, variances, rtol=1e-4)
    assert model.bn1.momentum == 0.1 and model.training


@pytest.fixture(scope="module")
def digit_folder(tmp_path_factory):
    """The digits as image files, a few of each class."""
    data, files = load_data(img_size=8, in_chans=1), {}
    for split, batches, most in (
        ("train", data.train_batches(1437, seed=0), 80),
        ("validation", data.val_batches(360), 15),
    ):
        x, y = next(iter(batches))
        pixels = ((x * data.std[0] + data.mean[0]).clamp(0, 1) * 255).round().to(torch.uint8).numpy()
        for label in range(10):
            for k, image in enumerate(pixels[y == label][:most]):
                files[f"{split}/{label}/{k}.png"] = encode(image)
    return write_folder(tmp_path_factory.mktemp("arms") / "images", files)


@pytest.fixture(scope="module")
def trained(digit_folder, tmp_path_factory):
    """A stand-in for pretrained weights: a file of a network that was trained for a few epochs."""
    from dnas.training.from_scratch import train_from_scratch  # noqa: PLC0415

    random_seed(0)
    data = load_data(data_dir=digit_folder, img_size=16, workers=0)
    model = timm.create_model("resnet18", num_classes=10, layers=[1, 1, 1, 1], channels=[8, 16, 16, 24])
    train_from_scratch(model, data, Recipe(epochs=20, batch_size=32), seed=0)
    path = tmp_path_factory.mktemp("weights") / "dense.safetensors"
    safetensors.torch.save_file({name: t.contiguous() for name, t in model.state_dict().items()}, path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("method", ["taylor", "gates"])
def test_prune_and_fine_tune_a_trained_network(method, digit_folder, trained, tmp_path, trusted, monkeypatch, capsys):
    out = tmp_path / "run"
    flags = (*NET, "--initial-checkpoint", trained, "--keep-weights", "--arms", "finetune,scratch-e,scratch-b")
    flags += ("--data-dir", digit_folder, "--img-size", 16, "--workers", 0, "--budget", "60%", "--method", method)
    flags += ("--search-epochs", 2, "--epochs", 1, "-b", 32, "--lr", 0.001, "--num-random", 1, "--output", out)
    assert call(search_tool, monkeypatch, *flags) == 0
    said, metrics = " ".join(capsys.readouterr().out.split()), json.loads((out / "metrics.json").read_text())
    found, arms = metrics["found"], metrics["arms"]
    assert (
        [*arms] == ["finetune", "scratch-e", "scratch-b"] and arms["finetune"] == found and len(metrics["random"]) == 1
    )
    assert found["inherited"] and not arms["scratch-e"].get("inherited")
    assert found["before"] > 20 and found["top1"] > 30  # of ten classes
    assert arms["scratch-b"]["epochs"] > arms["scratch-e"]["epochs"] > arms["finetune"]["epochs"] == 1
    if method == "taylor":
        assert arms["scratch-e"]["epochs"] == 3
    assert f"finetune, 1 epochs: top-1 {found['top1']:.2f} % (before: {found['before']:.2f} %)" in said
    assert "Trainings of the found net" in (out / "report.html").read_text()
    # The weights before and after the fine-tuning are those of the exported network; ONNX computes the same.
    data = load_data(data_dir=digit_folder, img_size=16, workers=0)
    model = build_net(read_arch(out / "arch.json")["net"], num_classes=10)
    model.load_state_dict(safetensors.torch.load_file(out / "search.safetensors"))
    recalibrate(model, data.train_batches(32, seed=0), Recipe())
    assert evaluate(model, data.val_batches(256), Recipe())["top1"] == pytest.approx(found["before"], abs=8)
    model.load_state_dict(safetensors.torch.load_file(out / "model.safetensors"))
    model.eval()
    assert evaluate(model, data.val_batches(256), Recipe())["top1"] == pytest.approx(found["top1"])
    onnxruntime = pytest.importorskip("onnxruntime")  # Meant: a package that only exports to ONNX need
    x = torch.randn(2, 3, 16, 16)
    torch.onnx.export(model, (x,), tmp_path / "net.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    (logits,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(logits, model(x).detach().numpy(), atol=1e-4)


def test_arms_of_a_stopped_run_are_not_trained_again(tmp_path, trusted, monkeypatch):
    """A rule trains nothing before: both arms have the epochs of the found net, and are the same training."""
    out = tmp_path / "run"
    flags = ("--supernet", "toy", "--img-size", 8, "--budget", "50%", "--method", "balanced", "--epochs", 1, "-b", 256)
    assert call(search_tool, monkeypatch, *flags, "--arms", "scratch-e,scratch-b", "--output", out) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["arms"]["scratch-e"] == metrics["arms"]["scratch-b"] == metrics["found"]
    before = (out / "metrics.json").read_bytes()
    assert call(search_tool, monkeypatch, "--resume", out) == 0 and (out / "metrics.json").read_bytes() == before
    assert call(retrain_tool, monkeypatch, out, "--epochs", 1, "-b", 256, "--output", tmp_path / "more") == 0
