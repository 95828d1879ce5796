"""``dnas retrain``: other data than those of the search, and a complete run that trains on."""

import json
import math
import shutil

import pytest
import safetensors.torch
import torch
from commands import call, check_refused, retrain_tool, search_tool
from image_files import encode, noise, write_folder
from stopped import Asked

from dnas.export.model_file import build_net, count_macs, count_params

SHORT = ("--supernet", "toy", "--img-size", 8, "--budget", "50%", "--search-epochs", 2, "--epochs", 1, "-b", 256)


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory):
    from commands import trust  # noqa: PLC0415

    out = tmp_path_factory.mktemp("retrain") / "run"
    with pytest.MonkeyPatch.context() as patch:
        trust(patch)
        assert call(search_tool, patch, *SHORT, "--output", out) == 0
    return out


def read(path):
    return json.loads(path.read_text())


@pytest.fixture
def wide_images(tmp_path):
    files = {}
    for split, count in (("train", 12), ("validation", 3)):
        for c, name in enumerate(("a", "b", "c")):
            for k in range(count):
                files[f"{split}/{name}/{k}.png"] = encode(noise(1, 24, 1, seed=k + 100 * c)[0][:, :12])
    return write_folder(tmp_path / "wide", files)


def test_other_data_another_size_and_other_classes(toy_run, wide_images, tmp_path, trusted, monkeypatch, capsys):
    out = tmp_path / "again"
    flags = ("--data-dir", wide_images, "--img-size", 12, 24, "--in-chans", 1, "--workers", 0, "-b", 12, "--epochs", 1)
    capsys.readouterr()
    assert call(retrain_tool, monkeypatch, toy_run, *flags, "--output", out) == 0
    said = " ".join(capsys.readouterr().out.split())
    found, here = read(toy_run / "arch.json"), read(out / "arch.json")
    sizes = {key: here[key] for key in ("img_size", "in_chans", "num_classes")}
    assert sizes == {"img_size": [12, 24], "in_chans": 1, "num_classes": 3}
    assert here["net"] == found["net"] and here["budget"] == [] and here["name"] == found["name"]
    model = build_net(here["net"], num_classes=3, in_chans=1)
    assert model(torch.zeros(2, 1, 12, 24)).shape == (2, 3)
    assert here["macs"] == count_macs(model, 1, (12, 24)) != found["macs"] and here["params"] == count_params(model)
    assert "was found for other data: img_size [12, 24] (was 8), in_chans 1 (was 3), num_classes 3 (was 10)" in said
    metrics = read(out / "metrics.json")["found"]
    assert metrics["macs"] == here["macs"] and len(metrics["class_top1"]) == 3


def test_the_data_of_the_search_keep_its_budget(toy_run, tmp_path, trusted, monkeypatch, capsys):
    out = tmp_path / "again"
    assert call(retrain_tool, monkeypatch, toy_run, "--epochs", 1, "-b", 256, "--output", out) == 0
    assert read(out / "arch.json")["budget"] == read(toy_run / "arch.json")["budget"] != []
    assert "other data" not in capsys.readouterr().out


def test_a_complete_run_trains_on(toy_run, tmp_path, trusted, monkeypatch, capsys):
    out, seen = tmp_path / "long", []
    flags = ("--epochs", 2, "-b", 256, "--sched", "step", "--opt", "sgd", "--lr", 0.01, "--grad-accum-steps", 2)
    assert call(retrain_tool, monkeypatch, toy_run, *flags, "--output", out) == 0
    weights, before = (out / "model.safetensors").read_bytes(), read(out / "metrics.json")
    capsys.readouterr()
    copy = shutil.copytree(out, tmp_path / "copy")
    for wrong, said in ((2, "has 2 already"), (1, "has 2 already")):
        check_refused(call(retrain_tool, monkeypatch, "--resume", out, "--epochs", wrong), capsys, said)
    check_refused(call(retrain_tool, monkeypatch, "--resume", out, "--lr", 1), capsys, "none but --epochs")

    from dnas.training import from_scratch  # noqa: PLC0415

    real = from_scratch.train

    def train(loss_of, learner, batches, recipe, **more):
        seen.append((learner.update, recipe.epochs))
        start = {name: t.clone() for name, t in learner.module.state_dict().items()}
        for k, loss in enumerate(real(loss_of, learner, batches, recipe, **more)):
            if stop_after and k == stop_after:
                raise ArithmeticError("planted")
            yield loss
        seen.append(start)

    monkeypatch.setattr(from_scratch, "train", train)
    stop_after = 0
    assert call(retrain_tool, monkeypatch, "--resume", out, "--epochs", 4) == 0
    steps = math.ceil((1437 // 256) / 2)
    assert seen[0] == (2 * steps, 4)
    assert read(out / "metrics.json")["found"]["epochs"] == 4 and read(out / "metrics-2-epochs.json") == before
    assert read(out / "config.json")["args"]["epochs"] == 4 and (out / "model.safetensors").read_bytes() != weights
    assert all(torch.equal(t, seen[1][name]) for name, t in safetensors.torch.load(weights).items())

    stop_after = 1  # stopped while it trains on, before any checkpoint: it begins again where it was complete
    with pytest.raises(ArithmeticError):
        call(retrain_tool, monkeypatch, "--resume", copy, "--epochs", 4)
    assert not (copy / "metrics.json").exists()
    stop_after, seen[:] = 0, []
    assert call(retrain_tool, monkeypatch, "--resume", copy) == 0
    assert seen[0] == (2 * steps, 4)
    assert (copy / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


EVERYTHING_ELSE = "conv_stem,bn1,blocks,conv_head,bn2"  # than the classifier


def weights_of(path):
    return safetensors.torch.load_file(path)


def test_training_starts_from_a_file_and_parts_are_frozen(toy_run, tmp_path, trusted, monkeypatch, capsys):
    """A torch file as timm's train.py writes it. What is frozen keeps every bit, the rest moves."""
    start, out = weights_of(toy_run / "model.safetensors"), tmp_path / "tuned"
    torch.save({"state_dict": start, "arch": "x", "epoch": 3}, tmp_path / "start.pth")
    given = ("--initial-checkpoint", tmp_path / "start.pth", "--freeze", "conv_stem,bn1,blocks.0.?", "-b", 256)
    more = ("--epochs", 1, "--model-ema-decay", 0.5, "--output", out)
    assert call(retrain_tool, monkeypatch, toy_run, *given, *more) == 0
    assert "classifier" not in capsys.readouterr().out
    for name, tensor in weights_of(out / "model.safetensors").items():
        assert torch.equal(tensor, start[name]) == name.startswith(("conv_stem", "bn1", "blocks.0.")), name


def test_a_classifier_for_other_classes_is_replaced(toy_run, wide_images, tmp_path, trusted, monkeypatch, capsys):
    """All but the classifier are the tensors of the file."""
    file, out = toy_run / "model.safetensors", tmp_path / "three"
    flags = ("--data-dir", wide_images, "--img-size", 12, 24, "--workers", 0, "-b", 12, "--epochs", 1)
    given = ("--initial-checkpoint", file, "--freeze", EVERYTHING_ELSE)
    assert call(retrain_tool, monkeypatch, toy_run, *flags, *given, "--output", out) == 0
    assert "model.safetensors does not fit the data: a new one is trained" in " ".join(capsys.readouterr().out.split())
    start, found = weights_of(file), weights_of(out / "model.safetensors")
    assert len(start["classifier.weight"]) == 10 and len(found["classifier.weight"]) == 3
    others = [name for name in start if not name.startswith("classifier")]
    assert others and all(torch.equal(found[name], start[name]) for name in others)


def test_files_and_parts_that_do_not_fit(toy_run, tmp_path, trusted, monkeypatch, capsys):
    start = weights_of(toy_run / "model.safetensors")
    name = next(name for name in start if name.startswith("blocks"))
    (tmp_path / "none.safetensors").write_bytes(b"nothing")
    safetensors.torch.save_file(start | {name: torch.zeros(3)}, tmp_path / "shape.safetensors")
    safetensors.torch.save_file({n: t for n, t in start.items() if n != name}, tmp_path / "less.safetensors")
    safetensors.torch.save_file(start | {"more": torch.zeros(3)}, tmp_path / "more.safetensors")
    torch.save({"state_dict": start, "code": Asked(1)}, tmp_path / "code.pth")
    good = toy_run / "model.safetensors"
    for flags, said in [
        (["--initial-checkpoint", "no/file"], "--initial-checkpoint 'no/file' is no file"),
        (["--initial-checkpoint", tmp_path / "none.safetensors"], "cannot be read as weights"),
        (["--initial-checkpoint", tmp_path / "shape.safetensors"], f"does not fit the network: {name} is [3], ["),
        (["--initial-checkpoint", tmp_path / "less.safetensors"], f"does not fit the network: {name} is missing, ["),
        (["--initial-checkpoint", tmp_path / "more.safetensors"], "the network: more is not in the network"),
        (["--initial-checkpoint", tmp_path / "code.pth"], "cannot be read as weights"),
        (["--freeze", "conv_stem"], "--freeze 'conv_stem' goes with --initial-checkpoint"),
        (["--initial-checkpoint", good, "--freeze", "conv_stem,conv_haed"], "--freeze 'conv_haed' matches no module"),
        (["--initial-checkpoint", good, "--freeze", "conv_haed"], "near: conv_head"),
        (["--initial-checkpoint", good, "--freeze", "*"], "nothing is left to learn"),
    ]:
        out = tmp_path / "out"
        check_refused(call(retrain_tool, monkeypatch, toy_run, *flags, "--output", out), capsys, said)
        assert not out.exists()


def test_a_search_does_not_train_on(toy_run, monkeypatch, capsys):
    code = call(search_tool, monkeypatch, "--resume", toy_run, "--epochs", 9)
    check_refused(code, capsys, "takes all other flags from the run: none are expected here")
