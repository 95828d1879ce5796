"""Narrower networks of timm's, exported and imported again: timm's own checks, weights, wrong arch files."""

import copy
import importlib.util
import json
import random
import sys
import warnings

import pytest
import timm
import torch
from timm_checks import CHECKS

from dnas.export.model_file import arch_document, build_net, narrowed, read_arch, save_weights, write_export
from dnas.export.verify import verify_export
from dnas.nets.shrink import plain_state
from dnas.nets.timm_space import TimmBase
from dnas.nets.timm_supernet import TimmSupernet
from dnas.spec.checks import UserError

DATA = {"img_size": 64, "in_chans": 3, "num_classes": 10, "mean": [0.5, 0.4, 0.25], "std": [0.25, 0.2, 1]}
FAMILIES = [
    *("test_resnet", "test_byobnet", "test_efficientnet", "test_convnext", "test_nfnet"),
    *("lcnet_050", "regnety_002", "dla46_c"),
]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """base -> (name of the exported network, folder, supernet, arch), each made once."""
    made = {}

    def export(base):
        if base not in made:
            torch.manual_seed(0)
            net = TimmSupernet(TimmBase(base, 10, 3, 64)).eval()
            rng = random.Random(base)
            arch = net.space.check({d.name: rng.choice(d.options) for d in net.space.decisions})
            name, folder = f"dnas_small_{base}", tmp_path_factory.mktemp(base)
            document = arch_document(name, net.net_of(arch), DATA, supernet=base, answers=arch)
            write_export(folder, document)
            model = build_net(document["net"], num_classes=10)
            model.load_state_dict(plain_state(net, arch))
            save_weights(model, folder)
            spec = importlib.util.spec_from_file_location(f"model_{base}", folder / "model.py")
            module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            made[base] = name, folder, net, arch
        return made[base]

    return export


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("base", FAMILIES)
def test_what_timm_asks_of_its_models(base, check, exported):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        check(exported(base)[0])


@pytest.mark.parametrize("base", FAMILIES)
def test_weights_from_the_file_beside(base, exported):
    name, _, net, arch = exported(base)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = net(x, arch)
        assert torch.allclose(timm.create_model(name, pretrained=True).eval()(x), expected, rtol=1e-4, atol=1e-5)
    # Another number of classes or of channels: timm adapts the ends and keeps the rest.
    other = timm.create_model(name, pretrained=True, num_classes=3, in_chans=1).eval()
    assert other(x[:, :1]).shape == (2, 3)
    same = plain_state(net, arch)
    kept = [n for n, t in other.state_dict().items() if n in same and torch.equal(t, same[n])]
    assert len(kept) >= len(same) - 4
    features = timm.create_model(name, pretrained=True, features_only=True).eval()
    whole = timm.create_model(name, pretrained=True).eval()
    with torch.no_grad():
        for a, b in zip(features(x), whole.forward_intermediates(x, intermediates_only=True), strict=True):
            assert torch.equal(a, b)


def test_an_output_stride_where_the_base_takes_one(exported):
    name, _, net, _ = exported("test_resnet")
    base = timm.create_model(net.outline.name, features_only=True, output_stride=8)
    own = timm.create_model(name, features_only=True, output_stride=8)
    x = torch.zeros(1, 3, 64, 64)
    assert own.feature_info.reduction() == base.feature_info.reduction()
    assert [m.shape[2:] for m in own.eval()(x)] == [m.shape[2:] for m in base.eval()(x)]


def test_without_dnas(exported):
    _, folder, net, arch = exported("test_byobnet")
    found = verify_export(folder)
    assert found["packages"] == ["timm", "torch"] and found["weights"]
    document = read_arch(folder / "arch.json")
    assert document["answers"] == dict(arch)
    for module, (n_in, n_out) in document["widths"].items():
        layer = net.model.get_submodule(module)
        assert n_in <= getattr(layer, "in_channels", getattr(layer, "in_features", 0))
        assert n_out <= getattr(layer, "out_channels", getattr(layer, "out_features", 0))


def test_a_rate_that_the_network_does_not_know_is_told(exported):
    net = read_arch(exported("dla46_c")[1] / "arch.json")["net"]
    with pytest.raises(UserError, match="does not take drop_path_rate"):
        build_net(net, num_classes=10, drop_path_rate=0.1)


def change(path, value):
    def apply(net):
        for key in path[:-1]:
            net = net[key]
        if value is None:
            del net[path[-1]]
        else:
            net[path[-1]] = value

    return apply


@pytest.mark.parametrize(
    "apply, said",
    [
        (change(["base"], "resnet51"), "net.base is 'resnet51'"),
        (change(["base"], "dnas_small_test_resnet"), "net.base is 'dnas_small_test_resnet'"),
        (change(["base"], "os.system"), "net.base"),
        (change(["base"], 3), "net.base"),
        (change(["base"], "test_convnext"), "net.features"),
        (change(["base"], "test_efficientnet"), "net.modules"),
        (change(["kwargs"], {"stem_type": "no'); import os"}), "net.kwargs: model argument stem_type="),
        (change(["kwargs"], {"layers": [1, {}]}), "net.kwargs: model argument layers="),
        (change(["kwargs"], {"pretrained": True}), "net.kwargs: model argument 'pretrained'"),
        (change(["kwargs"], {"checkpoint_path": "weights.pth"}), "net.kwargs: model argument 'checkpoint_path'"),
        (change(["modules", "layer1.0.conv2", "padding"], [1, 0]), "net.modules['layer1.0.conv2']['padding'][1]"),
        (change(["modules", "layer2.0.downsample.1", "padding"], [1, 1]), "left out"),
        (change(["modules", "bn1", "weight"], 4), "a list of 1 entries"),
        (change(["kwargs"], {"no_such": 1}), "net.kwargs is"),
        (change(["kwargs"], {"layers": [2, 2, 2]}), "net.features"),
        (change(["more"], 1), "missing or unknown keys"),
        (change(["modules"], None), "missing or unknown keys"),
        (change(["modules"], []), "net.modules"),
        (change(["modules", "no.such"], {}), "net.modules is 'no.such'"),
        (change(["modules", "bn1", "__class__"], 3), "net.modules['bn1']['__class__']"),
        (change(["modules", "bn1", "forward"], 3), "left out"),
        (change(["modules", "bn1", "training"], 0), "left out"),
        (change(["modules", "bn1", "weight"], [10**6]), "net.modules['bn1']['weight'][0]"),
        (change(["modules", "bn1", "weight"], [0]), "net.modules['bn1']['weight'][0]"),
        (change(["modules", "bn1", "weight"], [4, 4]), "net.modules['bn1']['weight']"),
        (change(["modules", "bn1", "weight"], ["4"]), "net.modules['bn1']['weight'][0]"),
        (change(["modules", "bn1", "weight"], [3]), "cannot be run"),
        (change(["modules", "bn1"], None), "cannot be run"),
        (change(["modules", "bn1", "num_features"], True), "net.modules['bn1']['num_features']"),
        (change(["features"], [1, 2, 3]), "net.features"),
        (change(["features"], [1, 2, 3, 4, 5]), "net.features"),
        (change(["features"], "12345"), "net.features"),
    ],
)
def test_a_wrong_network_is_refused_in_one_line(apply, said, exported, tmp_path):
    document = read_arch(exported("test_resnet")[1] / "arch.json")
    net = copy.deepcopy(document["net"])
    apply(net)
    file = tmp_path / "arch.json"
    file.write_text(json.dumps(document | {"net": net}))
    with pytest.raises(UserError) as caught:
        read_arch(file)
    assert said in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("base", ["test_resnet", "test_efficientnet", "test_convnext", "test_byobnet"])
def test_a_fresh_narrow_network_has_the_variances_of_its_family(base):
    """Against the family's own initialisation at full width: weights times the root of fan-out stay in proportion."""
    torch.manual_seed(0)
    net = TimmSupernet(TimmBase(base, 10, 3, 64))
    arch = {d.name: d.options[len(d.options) // 2] for d in net.space.decisions}
    ratios = []
    for seed in range(3):
        torch.manual_seed(seed)
        wide = timm.create_model(base, num_classes=10)
        narrow = dict(narrowed.network(net.net_of(arch), num_classes=10).named_modules())
        for name, module in wide.named_modules():
            if isinstance(module, torch.nn.Conv2d) and module.groups == 1 and module.weight.numel() > 2000:
                other = narrow[name]
                # One standard deviation whatever the width, or 2 / fan-out.
                fan = 1.0 if base == "test_convnext" else (other.out_channels / module.out_channels) ** 0.5
                ratios.append(float((other.weight.std() / module.weight.std()).detach()) * fan)
    assert len(ratios) > 8
    assert sum(ratios) / len(ratios) == pytest.approx(1, abs=0.02)
