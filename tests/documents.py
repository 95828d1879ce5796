"""A network with every kind of block, and its arch.json, for the tests of export."""

from dnas import export

IMG, IN_CHANS, CLASSES = 32, 3, 10

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
    return export.arch_document(**{"name": "dnas_test_net", "net": NET, "data": data, **known, **changes})
