"""Networks that `dnas.model_file.native` builds against their rows, against closed forms and against timm's own."""

import copy
import math
import pickle
import random
from functools import partial

import pytest
import timm
import torch
from documents import (
    CLASSES,
    IMG,
    IN_CHANS,
    closed_form,
    layers,
)
from torch import nn

from dnas.export import model_file, native


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
    model_file.check_net(net)
    model = model_file.build_net(net, num_classes=CLASSES)
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
    assert model_file.count_macs(model, IN_CHANS, IMG) == macs
    assert model_file.count_macs_torch(model, IN_CHANS, IMG) == macs
    assert [m.training for m in model.modules()] == modes and model.training and not model.blocks[0].training
    assert model_file.count_params(model) == sum(p.numel() for p in model.parameters()) == params
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
    model = model_file.build_net(net, num_classes=CLASSES).eval()
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
    block = model_file.build_net(net, num_classes=2).blocks[0][0]
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
    theirs, ours = timm.create_model(name).eval(), model_file.build_net(PUBLISHED[name], num_classes=1000).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))
    assert closed_form(PUBLISHED[name], 224, 1000)[1] == model_file.count_params(ours)
    if name == "mobilenetv2_100":
        assert model_file.count_params(ours) == 3_504_872
        macs = {
            count(m, 3, 224) for m in (ours, theirs) for count in (model_file.count_macs, model_file.count_macs_torch)
        }
        assert macs == {closed_form(PUBLISHED[name], 224, 1000)[0]}
        assert round(macs.pop() / 1e6, 2) == 300.77


@pytest.mark.parametrize("output_stride", [8, 16])
def test_features_with_an_output_stride(output_stride):
    """As for a segmentation head: later strides become dilations, weights stay, maps are larger."""
    net = max((n for n in NETS if n["stem"]["stride"] == 2), key=lambda n: sum(s[0]["stride"] for s in n["stages"]))
    plain, dilated = (
        native.build(net, "dnas", features_only=True, **how).eval() for how in ({}, {"output_stride": output_stride})
    )
    x = torch.randn(1, IN_CHANS, 64, 64)
    assert [t.shape for t in plain.state_dict().values()] == [t.shape for t in dilated.state_dict().values()]
    assert dilated.feature_info.reduction() == [min(r, output_stride) for r in plain.feature_info.reduction()]
    assert [64 // m.shape[2] for m in dilated(x)] == dilated.feature_info.reduction()


class Products(torch.nn.Module):
    """A network with a product of a map and a parameter, a layer that torch runs in batches, and attention."""

    def __init__(self, padding, multiply):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3, padding=padding)
        self.mix = torch.nn.Parameter(torch.randn(4, 21))
        self.keys, self.values = torch.nn.Linear(21, 21), torch.nn.Linear(21, 6)
        self.fc = torch.nn.Linear(6, 5)
        self.multiply = multiply

    def forward(self, x):
        x = self.multiply(self.conv(x).flatten(2).transpose(1, 2), self.mix)  # [1, 64, 21]
        pairs = x.view(1, 2, 32, 21).transpose(1, 2)  # [1, 32, 2, 21], not contiguous
        keys = self.keys(pairs).view(1, 64, 21)
        attended = torch.nn.functional.scaled_dot_product_attention(x, keys, self.values(x))
        return self.fc(attended.mean(1))


@pytest.mark.parametrize("padding", ["same", 1])
@pytest.mark.parametrize("multiply", [torch.matmul, partial(torch.einsum, "blc,cd->bld")], ids=["matmul", "einsum"])
def test_counters_agree(padding, multiply, monkeypatch):
    """fvcore lacks a convolution whose padding is a word, and rounds einsum: there torch counts both times."""
    net, by_torch = Products(padding, multiply), model_file.count_macs_torch
    by_hand = 64 * (4 * 3 * 9 + 4 * 21 + 21 * 21 + 21 * 6) + 64 * 64 * (21 + 6) + 6 * 5
    assert by_torch(net, 3, 8) == by_hand
    asked = []
    monkeypatch.setattr(model_file, "count_macs_torch", lambda *args: asked.append(args) or by_torch(*args))
    assert model_file.count_macs(net, 3, 8) == by_hand
    assert len(asked) == (padding == "same" or multiply is not torch.matmul)
