"""``--freeze``: what a pattern matches, and that this stays bit for bit while all else learns."""

import json
from functools import partial

import pytest
import safetensors.torch
import timm
import torch
from commands import call, check_refused, search_tool
from stopped import in_parts
from timm.utils import random_seed

from dnas.spec.checks import UserError
from dnas.spec.recipe import Recipe
from dnas.training.data import load_data
from dnas.training.freeze import check_patterns, freeze
from dnas.training.from_scratch import train_from_scratch

SMALL = {"layers": [1, 1, 1, 1], "channels": [8, 16, 16, 24]}


def network():
    torch.manual_seed(0)
    return timm.create_model("resnet18", num_classes=10, **SMALL)


@pytest.mark.parametrize("patterns, frozen", [
    ("", ()), ("conv1", ("conv1.",)), ("layer1", ("layer1.",)), ("layer[12].*.bn?", ("layer1.0.bn", "layer2.0.bn")),
    ("bn1,layer4.0.conv1", ("bn1.", "layer4.0.conv1.")), ("fc.bias", ("fc.bias",)),
    ("layer*", ("layer1.", "layer2.", "layer3.", "layer4.")),
])  # fmt: skip
def test_what_a_pattern_matches(patterns, frozen):
    model = network().eval()
    freeze(model, patterns)
    stays = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert stays == {name for name, _ in model.named_parameters() if name.startswith(frozen or ("none",))}
    for name, module in model.named_modules():
        is_norm = isinstance(module, torch.nn.BatchNorm2d)
        assert module.training == (not (is_norm and frozen and name.startswith(tuple(f.rstrip(".") for f in frozen))))
    if patterns:
        check_patterns(model, patterns)


@pytest.mark.parametrize("patterns, said", [
    ("layer5", "^freeze 'layer5' matches no module with weights; near: layer"),
    ("conv1,", "^freeze '' matches no module"), ("maxpool", "^freeze 'maxpool' matches no module with weights"),
    ("zzz", "^freeze 'zzz' matches no module with weights; near: conv1, "),
    ("*", "^freeze '\\*' matches every module: nothing is left to learn$"),
])  # fmt: skip
def test_patterns_that_are_none(patterns, said):
    with pytest.raises(UserError, match=said):
        check_patterns(network(), patterns)


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_what_is_frozen_keeps_every_bit_and_the_rest_moves(ema):
    """Parameters and statistics, with weight decay and momentum, which move all that an optimizer has."""
    recipe = Recipe(epochs=2, batch_size=64, opt="sgd", lr=0.1, freeze="conv1,bn1,layer1", model_ema_decay=ema)
    start = {name: tensor.clone() for name, tensor in network().state_dict().items()}
    model, _ = train_from_scratch(network(), load_data(img_size=16).take(300), recipe, seed=0)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, start[name]) == name.startswith(("conv1.", "bn1.", "layer1.")), name


def test_a_training_goes_on_to_the_bit(tmp_path):
    data, recipe = load_data(img_size=16).take(300), Recipe(epochs=2, batch_size=64, freeze="conv1,layer1")

    def part(journal):
        random_seed(1)
        on_step, saved = partial(journal.step, "training"), journal.under_way("training")
        return train_from_scratch(network(), data, recipe, seed=3, on_step=on_step, saved=saved)[0]

    model, other = in_parts(tmp_path / "new", (), part), in_parts(tmp_path, (1, 4), part)
    assert all(map(torch.equal, model.state_dict().values(), other.state_dict().values()))


FLAGS = ("--model", "resnet18", "--model-kwargs", "layers=[1,1,1,1]", "channels=[8,16,16,24]", "--img-size", 8)
FLAGS += ("--budget", "60%", "--divisor", 2, "--search-epochs", 1, "--epochs", 1, "-b", 256, "--method", "l1")


def test_a_search_fine_tunes_what_is_not_frozen(tmp_path, trusted, monkeypatch):
    """Compared with the weights that the search left."""
    out = tmp_path / "run"
    given = ("--keep-weights", "--freeze", "conv1,layer1", "--output", out)
    assert call(search_tool, monkeypatch, *FLAGS, *given) == 0
    assert json.loads((out / "metrics.json").read_text())["found"]["inherited"]
    start, found = (safetensors.torch.load_file(out / f"{name}.safetensors") for name in ("search", "model"))
    for name, tensor in found.items():
        if "running" not in name and "tracked" not in name:  # statistics are measured anew for the narrower network
            assert torch.equal(tensor, start[name]) == name.startswith(("conv1.", "layer1.")), name


@pytest.mark.parametrize("flags, said", [
    (("--freeze", "conv1"), "--freeze 'conv1' goes with --keep-weights"),
    (("--keep-weights", "--freeze", "layr1"), "--freeze 'layr1' matches no module with weights; near: layer1"),
])  # fmt: skip
def test_a_search_refuses_before_it_begins(flags, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("dnas.cli.search.time_step", lambda *_: pytest.fail("the search has begun"))
    check_refused(call(search_tool, monkeypatch, *FLAGS, *flags, "--output", tmp_path / "run"), capsys, said)
    assert not (tmp_path / "run").exists()
