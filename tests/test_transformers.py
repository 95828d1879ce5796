"""Transformers: heads and streams as widths, the same logits masked, cut and built by timm itself; costs."""

import random
from dataclasses import replace

import pytest
import timm
import torch
from timm.utils import random_seed
from torch import nn

from dnas.cli.retrain import for_data, resized
from dnas.export import narrowed
from dnas.export.model_file import arch_document, build_net, count_macs, count_macs_torch, count_params
from dnas.methods.catalog import METHODS
from dnas.methods.loop import begin, search
from dnas.methods.method import Task
from dnas.methods.rank_and_cut import score_batches
from dnas.methods.rankings import l1_norms, taylor
from dnas.nets.shrink import plain_state
from dnas.nets.timm_space import TimmBase, sized
from dnas.nets.timm_supernet import TimmSupernet
from dnas.nets.tracing import trace
from dnas.runtime.run_folder import provenance
from dnas.spec.budget import parse_budget
from dnas.spec.checks import UserError
from dnas.spec.cost import CostTable, resolve_budgets
from dnas.spec.recipe import Recipe
from dnas.training.data import load_data

CLASSES = 10
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4}


def supernet(name, kwargs, divisor=8):
    """A supernet in eval mode, with norms, biases, tables and tokens far from their start, in double precision."""
    torch.manual_seed(0)
    net = TimmSupernet(TimmBase(name, CLASSES, 3, kwargs.get("img_size", 64), divisor=divisor, kwargs=kwargs)).eval()
    for p in net.model.parameters():
        if p.ndim == 1 or float(p.detach().abs().max()) < 1e-3:
            p.data.add_(torch.rand(p.shape) - 0.5)
    return net.double()


def test_timm_builds_a_network_for_the_size_of_the_images():
    """Transformers have a fixed size; others, the size that timm has anyway, and a size that is given, stay."""

    def kwargs(name, size, **more):
        return dict(sized(TimmBase(name, CLASSES, 3, size, kwargs=more)).kwargs)

    assert kwargs("vit_tiny_patch16_224", 96) == {"img_size": 96}
    assert kwargs("swin_tiny_patch4_window7_224", (96, 64)) == {"img_size": [96, 64]}
    assert kwargs("vit_tiny_patch16_224", 224) == kwargs("resnet18", 96) == kwargs("no_network", 96) == {}
    assert kwargs("vit_tiny_patch16_224", 96, img_size=224) == {"img_size": 224}
    assert kwargs("vit_tiny_patch16_224.nonsense", 96) == {}  # an error of `TimmBase.create`
    assert kwargs("twins_svt_small", 100) == {}  # timm refuses to build it for 100 pixels, and it runs there
    base = sized(TimmBase("vit_tiny_patch16_224", CLASSES, 3, (32, 64), kwargs={"depth": 1, "embed_dim": 48}))
    assert str(base) == "--model vit_tiny_patch16_224 --model-kwargs {'depth': 1, 'embed_dim': 48}"
    assert TimmSupernet(base).model.eval()(torch.zeros(1, 3, 32, 64)).shape == (1, CLASSES)


def test_a_head_is_a_unit_of_everything_that_knows_it():
    groups = {g.name: g for g in trace(timm.create_model("vit_tiny_patch16_224", **VIT), (3, 32, 32)).groups}
    assert {name: (g.size, g.step) for name, g in groups.items()} == {
        "patch_embed.proj": (64, 1),
        **{f"blocks.{k}.attn.qkv": (4, 48) for k in range(2)},
        **{f"blocks.{k}.mlp.fc1": (256, 1) for k in range(2)},
    }
    own = [[*range(16 * h, 16 * h + 16)] for h in range(4)]
    of_qkv = [[64 * part + c for part in range(3) for c in head] for head in own]
    assert {axis: at.tolist() for axis, at in groups["blocks.0.attn.qkv"].places.items()} == {
        **{(f"blocks.0.attn.qkv.{n}", 0): of_qkv for n in ("weight", "bias", "out_features")},
        **{("blocks.0.attn.proj.weight", 1): own, ("blocks.0.attn.proj.in_features", 0): own},
        **{("blocks.0.attn.num_heads", 0): [[h] for h in range(4)], ("blocks.0.attn.attn_dim", 0): own},
    }
    stream = groups["patch_embed.proj"].places
    assert {("cls_token", 2), ("pos_embed", 2), ("norm.bias", 0), ("head.weight", 1)} <= {*stream}
    assert ("blocks.0.attn.attn_dim", 0) not in stream


@pytest.mark.parametrize(
    "name, more, narrower",
    [
        ("vit_tiny_patch16_224", {}, {"embed_dim": 48, "num_heads": 3, "mlp_ratio": 2}),
        ("vit_tiny_patch16_224", {}, {"embed_dim": 32, "num_heads": 2, "mlp_ratio": 1}),
        ("vit_tiny_patch16_224", {"qk_norm": True, "global_pool": "avg", "class_token": False, "init_values": 0.5},
         {"embed_dim": 48, "num_heads": 3, "mlp_ratio": 3}),
        ("deit_tiny_distilled_patch16_224", {}, {"embed_dim": 16, "num_heads": 1, "mlp_ratio": 4}),
    ],
)  # fmt: skip
def test_a_narrow_vit_is_the_one_that_timm_builds(name, more, narrower):
    """The sizes of a whole ViT in steps of a head are arguments of timm's: the same weights, logits and costs."""
    net = supernet(name, VIT | more)
    wanted = {"patch": narrower["embed_dim"], "qkv": 3 * 16 * narrower["num_heads"]}
    wanted["fc1"] = narrower["embed_dim"] * narrower["mlp_ratio"]
    arch = {d.name: next(w for key, w in wanted.items() if key in d.name) for d in net.space.decisions}
    plain = timm.create_model(name, num_classes=CLASSES, **(VIT | more | narrower)).eval().double()
    plain.load_state_dict(plain_state(net, net.space.check(arch)))
    x = torch.randn(2, 3, 32, 32).double()
    with torch.no_grad():
        masked, whole = net(x, arch), net(x, net.widest())
        assert (masked - whole).abs().max() > 1e-2 * whole.abs().max()
        assert (plain(x) - masked).abs().max() < 1e-9 * masked.abs().max()
    assert CostTable.build(net.space, "macs").of(arch) == count_macs(plain, 3, 32) == count_macs_torch(plain, 3, 32)
    assert CostTable.build(net.space, "params").of(arch) == count_params(plain)


def test_a_found_vit_is_retrained_on_images_of_another_size():
    """Its costs are those of timm's own network for this size; the wrong size is refused in one line."""
    net, narrower = supernet("vit_tiny_patch16_224", VIT), {"embed_dim": 32, "num_heads": 2, "mlp_ratio": 1}
    arch = {d.name: 96 if "qkv" in d.name else 32 for d in net.space.decisions}
    pixels = {"mean": [0.0] * 3, "std": [1.0] * 3}
    of = {"num_classes": CLASSES, "in_chans": 3, "img_size": 32} | pixels
    told = {"supernet": "vit", "answers": arch, "provenance": provenance(torch.device("cpu"))}
    found = arch_document("vit", net.net_of(net.space.check(arch)), of, **told)
    here = for_data(found, load_data("digits", img_size=48), "vit", None)
    plain = timm.create_model("vit_tiny_patch16_224", num_classes=CLASSES, **(VIT | narrower | {"img_size": 48}))
    assert here["macs"] == count_macs(plain, 3, 48) > found["macs"] and here["params"] == count_params(plain)
    model = build_net(here["net"], num_classes=CLASSES, in_chans=3)
    assert {n: t.shape for n, t in model.state_dict().items()} == {n: t.shape for n, t in plain.state_dict().items()}
    assert for_data(found, load_data("digits", img_size=32), "vit", None)["net"] == found["net"]
    with pytest.raises(UserError, match="^the network cannot be run on images of 48 px: Input height"):
        arch_document("vit", found["net"], of | {"img_size": 48}, **told)  # timm raises an AssertionError
    # A network that was found at timm's own size has no argument yet.
    assert resized({"base": "vit_tiny_patch16_224", "kwargs": {}}, 96)["kwargs"] == {"img_size": 96}
    assert resized({"base": "resnet18", "kwargs": {}}, 96)["kwargs"] == {}
    with pytest.raises(UserError, match="cannot be used"):
        resized({"base": "nest_tiny", "kwargs": {"img_size": 224}}, 100)


# One of each kind, small: windows with tables of biases and masks; tokens that are mixed; stages and depthwise pooling;
# heads that share the width of the stream, alone and in class attention; attention between channels; a bias that is a
# concatenation; rotated positions and gated MLPs; norms of responses.
SMALL = {
    "vit_tiny_patch16_224": VIT,
    "swin_tiny_patch4_window7_224": {
        "img_size": 56,
        "depths": [2, 1, 1, 1],
        "embed_dim": 16,
        "num_heads": [2, 2, 2, 2],
    },
    "mixer_s32_224": {"img_size": 64},
    "pit_ti_224": {"img_size": 64},
    "cait_xxs24_224": {"img_size": 32, "depth": 1},
    "xcit_nano_12_p16_224": {"img_size": 32, "depth": 1},
    "beit_base_patch16_224": {"img_size": 32, "embed_dim": 64, "depth": 2, "num_heads": 4},
    "eva02_tiny_patch14_224": {"img_size": 28, "embed_dim": 64, "depth": 2, "num_heads": 4},
    "convnextv2_atto": {"depths": [1, 1, 1, 1], "dims": [8, 16, 16, 24]},
}


@pytest.mark.parametrize("name, kwargs", SMALL.items())
def test_any_widths_masked_exported_and_counted_alike(name, kwargs):
    net, size = supernet(name, kwargs), kwargs.get("img_size", 64)
    assert len(net.space.decisions) > 1 and net.channels.fixed == ()
    tables = {metric: CostTable.build(net.space, metric) for metric in ("macs", "params")}
    x, rng = torch.randn(2, 3, size, size).double(), random.Random(0)
    whole = net.model(x).detach()
    for _ in range(5):
        arch = net.space.check({d.name: rng.choice(d.options) for d in net.space.decisions})
        found = narrowed.network(net.net_of(arch), num_classes=CLASSES).eval().double()
        found.load_state_dict(plain_state(net, arch))
        with torch.no_grad():
            masked = net(x, arch)
            assert (found(x) - masked).abs().max() < 1e-9 * masked.abs().max()
            assert (whole - masked).abs().max() > 1e-3 * masked.abs().max()
        assert count_macs(found, 3, size) == count_macs_torch(found, 3, size) == tables["macs"].of(arch)
        assert count_params(found) == tables["params"].of(arch)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "cait_xxs24_224"])
def test_what_timm_does_with_its_transformers(name):
    """New classifiers, features and the numbers that timm reports, of the narrowest network."""
    net, size = supernet(name, SMALL[name]), SMALL[name]["img_size"]
    data = net.net_of({d.name: d.options[0] for d in net.space.decisions})
    model, x = build_net(data, num_classes=CLASSES).eval(), torch.randn(2, 3, size, size)
    last = model.forward_features(x)
    assert last.shape[-1] == model.num_features < timm.create_model(name, **SMALL[name]).num_features
    assert model.forward_head(last, pre_logits=True).shape[1] == model.head_hidden_size
    channels = [level.shape[1] for level in model.forward_intermediates(x, intermediates_only=True)]
    assert channels == [info["num_chs"] for info in model.feature_info]
    features = narrowed.build(data, "dnas", features_only=True, pretrained_cfg={"input_size": (3, size, size)}).eval()
    maps = features(x)
    assert [m.shape[1] for m in maps] == features.feature_info.channels() == channels
    for classes in (7, 0, 3):
        model.reset_classifier(classes)
        assert model(x).shape == (2, classes or model.head_hidden_size)


def test_fresh_weights_have_the_spread_of_timms():
    """timm draws linear weights of a ViT with 0.02 at any width, which at 768 is nearly the variance of torch's law."""
    net = supernet("vit_tiny_patch16_224", VIT | {"embed_dim": 768, "num_heads": 12, "depth": 1})
    arch = {d.name: d.options[len(d.options) // 3] for d in net.space.decisions}
    block = build_net(net.net_of(arch), num_classes=CLASSES).blocks[0]
    for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc1):
        assert layer.in_features < 768
        assert float(layer.weight.detach().std()) == pytest.approx(0.02, rel=0.02)


TINY = {"img_size": 8, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4}


def tiny():
    """A supernet of a tiny ViT, and the task of a search for 40 % of it on the digits."""
    random_seed(0)
    data = load_data(img_size=8).take(300)
    base = TimmBase("vit_tiny_patch16_224", data.num_classes, data.in_chans, 8, divisor=4, kwargs=TINY)
    net = TimmSupernet(base)
    tables = {metric: CostTable.build(net.space, metric) for metric in ("macs", "params")}
    recipe = Recipe(epochs=4, batch_size=32)
    return net, Task(tables, resolve_budgets(tables, parse_budget("40%")), data, recipe, None, 0)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_finds_a_vit_inside_the_budget(name):
    """Slimming has norms with scales only for the embedding; the others choose heads, the embedding and MLPs."""
    net, task = tiny()
    _, arch = search(METHODS[name], net, replace(task, config=METHODS[name].config()))
    assert 0.98 <= task.tables["macs"].of(arch) / task.budgets[0].limit <= 1
    found = narrowed.network(net.net_of(arch), num_classes=10, in_chans=task.data.in_chans)
    assert count_macs(found, task.data.in_chans, 8) == task.tables["macs"].of(arch)
    assert found.blocks[0].attn.num_heads * 3 * 8 == arch["blocks.0.attn.qkv"]


def test_scores_of_heads_are_those_of_all_their_channels():
    """L1: the rows of query, key and value. Taylor: the slope of the loss along a factor of what a head writes."""
    net, task = tiny()
    task = replace(task, config=METHODS["taylor"].config(score_batches=1))
    own, model = begin(METHODS["taylor"], net, task), net.model.eval()
    rows = model.blocks[1].attn.qkv.weight.detach().view(3, 4, 8, 32).abs().sum((0, 2, 3))
    l1 = l1_norms(own, task)["blocks.1.attn.qkv"]
    torch.testing.assert_close(l1.detach(), rows / rows.mean())
    (x, y), seen = next(iter(score_batches(task))), []
    hook = model.blocks[1].attn.proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    loss = nn.functional.cross_entropy(model(x), y)
    hook.remove()
    slope = (torch.autograd.grad(loss, seen[0])[0] * seen[0]).view(len(x), -1, 4, 8).sum((0, 1, 3))
    torch.testing.assert_close(taylor(own, task)["blocks.1.attn.qkv"], slope.detach() ** 2)
