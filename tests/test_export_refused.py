"""Nets, names, data and arch files that are wrong are refused, and nothing is executed that they contain."""

import copy
import importlib
import json
import math
import sys

import pytest
import timm
import torch
from documents import (
    DATA,
    NET,
    document,
)

from dnas.export import arch_schema, model_file
from dnas.spec.checks import UserError

# Wrong inputs. A path leads to the entry that is replaced; DELETE removes it.

DELETE = object()
EVIL = "relu'); __import__('os').system('echo')#"


def changed(value, path, new):
    value = copy.deepcopy(value)
    *way, last = path
    place = value
    for step in way:
        place = place[step]
    if new is DELETE:
        del place[last]
    else:
        place[last] = new
    return value


FIRST, SECOND = ("stages", 1, 0), ("stages", 1, 1)
BAD_NETS = [
    *[((), value) for value in (None, [], "net", 3)],
    (("act",), DELETE),
    (("act",), "gelu"),
    (("act",), "ReLU"),
    (("act",), EVIL),
    (("act",), None),
    (("act",), ["relu"]),
    (("name",), "x"),
    (("stem",), 16),
    (("stem", "width"), 0),
    (("stem", "width"), True),
    (("stem", "width"), "16"),
    (("stem", "width"), 16.0),
    (("stem", "width"), 16385),
    pytest.param(("stem", "width"), 10**5000, id="huge"),  # more digits than Python prints
    (("stem", "stride"), 4),
    (("stem", "stride"), True),
    (("stem", "kernel"), 3),
    (("head",), -1),
    (("head",), 1e9),
    (("head",), float("nan")),
    (("head",), DELETE),
    (("stages",), []),
    (("stages",), {}),
    (("stages",), ([],)),
    (("stages", 1), []),
    (("stages", 1), [[]]),
    (("stages",), NET["stages"] * 17),
    (("stages", 0), NET["stages"][0] * 65),
    ((*FIRST, "kind"), "cn"),
    ((*FIRST, "kind"), DELETE),
    ((*FIRST, "kind"), EVIL),
    ((*FIRST, "kernel"), 2),
    ((*FIRST, "kernel"), 9),
    ((*FIRST, "kernel"), "3"),
    ((*FIRST, "kernel"), True),
    ((*FIRST, "kernel"), [3, 5]),
    ((*FIRST, "stride"), 3),
    ((*FIRST, "mid"), 0),
    ((*FIRST, "mid"), "45; import os"),
    ((*FIRST, "mid"), 20000),
    ((*FIRST, "out"), 24.5),
    ((*FIRST, "out"), None),
    ((*FIRST, "se"), -1),
    ((*FIRST, "se"), 0.25),
    ((*FIRST, "se"), False),
    ((*FIRST, "skip"), True),  # stride 2
    ((*FIRST, "skip"), 0),
    ((*FIRST, "extra\nline"), 1),
    ((*SECOND, "stride"), 2),  # not the first of its stage
    ((*SECOND, "out"), 25),  # skip with other widths
    ((*SECOND, "skip"), "yes"),
    (("stages", 0, 0, "mid"), 26),  # depthwise separable has no expansion
    (("stages", 2, 0), "er"),
]


@pytest.mark.parametrize(("path", "value"), BAD_NETS)
def test_a_wrong_net_is_refused(path, value):
    net = changed(NET, path, value) if path else value
    with pytest.raises(UserError) as caught:
        model_file.check_net(net)
    message = str(caught.value)
    assert message.startswith("net") and "\n" not in message and len(message) < 300
    if len(path) == 4 and value is not DELETE and path[-1] in arch_schema.ROW and path != (*SECOND, "out"):
        assert f"net.stages[{path[1]}][{path[2]}].{path[3]}" in message
    for use in (
        lambda: model_file.build_net(net, num_classes=2),
        lambda: model_file.model_source("dnas_test_net", net, **DATA),
        lambda: document(net=net),
    ):
        with pytest.raises(UserError):
            use()


BAD_NAMES = [
    *["", "A", "1net", "_net", "my-net", "my net", "net.tag", "net\n", "nèt", "n" * 65, None, 3, True, ["net"]],
    *['x"; import os', "x(): pass\n@register_model\ndef y", "x')", "../model", "{name}", "__class__"],
    *["class", "import", "lambda", "print", "dict", "int", "torch", "nn", "build", "network", "partial", "math"],
    *["default_cfgs", "register_model", "resnet50", "mobilenetv2_100", "vit_base_patch16_224"],
]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_wrong_name_is_refused(name):
    for use in (model_file.check_name, lambda n: model_file.model_source(n, NET, **DATA), lambda n: document(name=n)):
        with pytest.raises(UserError, match="name is ") as caught:
            use(name)
        assert "\n" not in str(caught.value)


def test_a_name_of_ours_may_be_used_again(tmp_path, monkeypatch):
    model_file.write_export(tmp_path, document(name="dnas_again"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "model", raising=False)
    importlib.import_module("model")
    monkeypatch.delitem(sys.modules, "model")
    assert timm.is_model("dnas_again")
    model_file.check_name("dnas_again")


BAD_DATA = [
    ("img_size", 0),
    ("img_size", 32.0),
    ("img_size", 100_000),
    ("in_chans", 0),
    ("in_chans", 4),
    ("in_chans", True),
    ("num_classes", "10"),
    ("num_classes", 0),
    ("mean", []),
    ("mean", [0.5]),
    ("mean", [0.5, 0.5, "0.5"]),
    ("mean", [0.5, 0.5, True]),
    ("std", [1, 1, 0]),
    ("std", [1, 1, -1]),
    ("std", [1, 1, math.inf]),
    ("mean", [1, 1, math.nan]),
]


@pytest.mark.parametrize(("key", "value"), BAD_DATA)
def test_wrong_data_is_refused(key, value):
    with pytest.raises(UserError):
        model_file.model_source("dnas_test_net", NET, **{**DATA, key: value})
    with pytest.raises(UserError):
        document(**{key: value})


BAD_DOCUMENTS = [
    *[((), value) for value in (None, [1], "text", 3)],
    (("schema",), 2),
    (("schema",), True),
    (("schema",), DELETE),
    (("extra",), 1),
    (("name",), "resnet50"),
    (("name",), EVIL),
    (("supernet",), ""),
    (("supernet",), "a\nb"),
    (("supernet",), "x" * 200),
    (("img_size",), "32"),
    (("img_size",), 64),  # other MACs
    (("in_chans",), 1),
    (("num_classes",), 11),
    (("mean",), [0.5]),
    (("std",), [1, 1, 0]),
    (("answers",), []),
    (("answers", "stem"), 1.5),
    (("answers", "stem"), True),
    (("answers", "stem"), None),
    (("answers", "stem"), ["ir"]),
    (("net", "act"), EVIL),
    (("net", "head"), 51),  # a good net, of other figures
    (("net", "stages", 1, 0, "stride"), 1),
    (("net", "stages", 1, 0, "mid"), "45"),
    (("widths", "conv_stem"), [3, 16]),
    (("widths", "conv_head"), DELETE),
    (("widths", "other"), [1, 1]),
    (("macs",), 1),
    (("macs",), "1"),
    (("macs",), DELETE),
    (("params",), 1.0),
    (("params",), -5),
    (("budget",), {}),
    (("budget",), [{"metric": "macs", "limit": 1}]),
    (("budget",), [{"metric": "macs", "limit": 0, "reached": 1}]),
    (("budget",), [{"metric": "ms", "limit": "2", "reached": 1}]),
    (("budget",), [{"metric": "macs", "limit": 10**9, "reached": 1}]),  # not what the net has
    (("provenance",), None),
    (("provenance",), "me"),
]


@pytest.mark.parametrize(("path", "value"), BAD_DOCUMENTS)
def test_a_wrong_arch_file_is_refused(path, value, tmp_path, good_document):
    wrong = changed(good_document, path, value) if path else value
    (tmp_path / "arch.json").write_text(json.dumps(wrong))
    with pytest.raises(UserError) as caught:
        model_file.read_arch(tmp_path / "arch.json")
    assert "arch.json: " in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError):
        model_file.write_export(tmp_path / "out", wrong)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def good_document():
    return document()


@pytest.mark.parametrize(
    "edit",
    [
        lambda text: "",
        lambda text: "{",
        lambda text: "import os",
        lambda text: text[:-5],
        lambda text: text + "{}",
        lambda text: text.replace('"seed": 1', '"seed": NaN'),
        lambda text: text.replace('"seed": 1', '"seed": -Infinity'),
        lambda text: text.replace('"seed": 1', '"seed": 1e999'),
        lambda text: text.replace('"seed": 1', '"seed": ' + "1" * 5000),
        lambda text: text.replace('"seed": 1', '"seed": ' + "[" * 100_000),
        lambda text: text.replace("0.25,", "Infinity,"),
        lambda text: text + " " * model_file.MAX_BYTES,
        lambda text: "\xff\xfe" + text,
    ],
)
def test_what_is_no_arch_file_is_refused(edit, tmp_path, good_document):
    text = json.dumps(good_document)
    assert edit(text) != text
    (tmp_path / "arch.json").write_bytes(edit(text).encode("latin-1"))
    with pytest.raises(UserError, match="arch.json: ") as caught:
        model_file.read_arch(tmp_path / "arch.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["none.json", "."])
def test_an_arch_file_that_cannot_be_read_is_refused(path, tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        model_file.read_arch(tmp_path / path)


@pytest.mark.parametrize("value", [math.nan, math.inf, {1, 2}, torch.zeros(1), object()])
def test_what_json_cannot_hold_is_refused(value):
    with pytest.raises(UserError):
        document(provenance={"x": value})
