"""A network with every kind of block, and its arch.json, for the tests of export."""

import math

from dnas.export import model_file

IMG, IN_CHANS, CLASSES = 32, 3, 10


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


NET = {
    "act": "hard_swish",
    "stem": {"width": 13, "stride": 1},
    "stages": [
        [{"kind": "ds", "kernel": 3, "stride": 1, "mid": 13, "out": 13, "se": 4, "skip": True}],
        [
            {"kind": "ir", "kernel": 5, "stride": 2, "mid": 45, "out": 24, "se": 7, "skip": False},
            {"kind": "er", "kernel": 3, "stride": 1, "mid": 44, "out": 24, "se": 5, "skip": True},
        ],
        [{"kind": "er", "kernel": 3, "stride": 2, "mid": 64, "out": 30, "se": 0, "skip": False}],
        [{"kind": "ir", "kernel": 7, "stride": 1, "mid": 96, "out": 31, "se": 0, "skip": False}],
    ],
    "head": 50,
}
DATA = {"img_size": IMG, "in_chans": 3, "num_classes": CLASSES, "mean": [0.5, 0.4, 0.25], "std": [0.25, 0.2, 1]}


def document(**changes):
    known = {"supernet": "prunet", "answers": {"stem": 13, "block": "ir-k3"}, "provenance": {"seed": 1, "git": None}}
    data = {key: changes.pop(key, value) for key, value in DATA.items()}
    return model_file.arch_document(**{"name": "dnas_test_net", "net": NET, "data": data, **known, **changes})
