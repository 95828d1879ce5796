"""Transformers: heads and streams as widths, the same logits masked, cut and built by timm itself; costs."""

import random

import pytest
import timm
import torch

from dnas.export import narrowed
from dnas.export.model_file import count_macs, count_macs_torch, count_params
from dnas.nets.shrink import plain_state
from dnas.nets.timm_space import TimmBase
from dnas.nets.timm_supernet import TimmSupernet
from dnas.nets.tracing import trace
from dnas.spec.cost import CostTable

CLASSES = 10
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4}


def supernet(name, kwargs, divisor=8):
    """A supernet in eval mode with norms and biases far from their start."""
    torch.manual_seed(0)
    net = TimmSupernet(TimmBase(name, CLASSES, 3, kwargs["img_size"], divisor=divisor, kwargs=kwargs)).eval()
    for p in net.model.parameters():
        if p.ndim == 1:
            p.data.add_(torch.rand(p.shape) - 0.5)
    return net


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
    plain = timm.create_model(name, num_classes=CLASSES, **(VIT | more | narrower)).eval()
    plain.load_state_dict(plain_state(net, net.space.check(arch)))
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        masked, whole = net(x, arch), net(x, net.widest())
        assert (masked - whole).abs().max() > 1e-2 * whole.abs().max()
        assert (plain(x) - masked).abs().max() < 1e-5 * masked.abs().max()
    assert CostTable.build(net.space, "macs").of(arch) == count_macs(plain, 3, 32) == count_macs_torch(plain, 3, 32)
    assert CostTable.build(net.space, "params").of(arch) == count_params(plain)


@pytest.mark.parametrize("name, kwargs", [("vit_tiny_patch16_224", VIT)])
def test_any_widths_masked_exported_and_counted_alike(name, kwargs):
    net, size = supernet(name, kwargs), kwargs["img_size"]
    tables = {metric: CostTable.build(net.space, metric) for metric in ("macs", "params")}
    x, rng = torch.randn(2, 3, size, size), random.Random(0)
    for _ in range(5):
        arch = net.space.check({d.name: rng.choice(d.options) for d in net.space.decisions})
        found = narrowed.network(net.net_of(arch), num_classes=CLASSES).eval()
        found.load_state_dict(plain_state(net, arch))
        with torch.no_grad():
            masked = net(x, arch)
            assert (found(x) - masked).abs().max() < 1e-5 * masked.abs().max()
        assert count_macs(found, 3, size) == count_macs_torch(found, 3, size) == tables["macs"].of(arch)
        assert count_params(found) == tables["params"].of(arch)
