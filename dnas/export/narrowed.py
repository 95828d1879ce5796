"""Build a found net from a network of timm's and the smaller sizes of its modules.

Everything below this docstring is copied unchanged into the ``model.py`` of an export, where dnas is absent. So it may
import only torch, timm and Python's own modules.
"""

import math
from functools import partial
from typing import Any

import timm
import torch
from timm.models import build_model_with_cfg
from torch import nn


def build(net: dict[str, Any], variant: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """The network ``net``, as a timm entry point named ``variant`` returns it.

    ``kwargs`` are timm's: num_classes, in_chans, features_only, out_indices, global_pool, drop_rate, drop_path_rate,
    pretrained_cfg, ... With features_only all feature levels are returned by default, however many there are.
    """
    features = {"feature_cls": "getter", "out_indices": tuple(range(len(net["features"])))}
    return build_model_with_cfg(partial(network, net), variant, pretrained, feature_cfg=features, **kwargs)


def network(net: dict[str, Any], **kwargs: Any) -> nn.Module:
    """The network ``net["base"]`` of timm's with the sizes of ``net["modules"]``, freshly initialised.

    The blocks ``net["dropped"]`` are left out.

    ``kwargs`` go to `timm.create_model` and override ``net["kwargs"]``.
    """
    model = timm.create_model(net["base"], pretrained=False, **{**net["kwargs"], **kwargs})
    drop(model, net.get("dropped", []))
    narrow(model, net["modules"])
    for level, width in zip(model.feature_info, net["features"], strict=True):
        level["num_chs"] = width
    return model


def drop(model: nn.Module, blocks: list[str]) -> None:
    """Put ``nn.Identity`` in the place of residual blocks of ``model``."""
    for path in blocks:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, nn.Identity())


def narrow(model: nn.Module, modules: dict[str, dict[str, Any]]) -> None:
    """Give the modules of ``model`` these sizes: module -> {name of a tensor or number: size}."""
    found = dict(model.named_modules())
    for path, sizes in modules.items():
        for name, size in sizes.items():
            if hasattr(found.get(path), name):  # timm leaves the head out without classes, and for features_only
                _narrow(found[path], name, size)


@torch.no_grad()
def _narrow(module: nn.Module, name: str, size: Any) -> None:
    """Cut a tensor of ``module`` to its first entries along each dimension, or set a number that the module keeps."""
    old = getattr(module, name)
    if isinstance(old, torch.Tensor):
        new = old[tuple(slice(0, n) for n in size)].clone() * _scale(module, old, size)
        if isinstance(old, nn.Parameter):
            old.data = new  # in place: another module may share it
        else:
            setattr(module, name, new)
    elif isinstance(old, (list, tuple)):
        setattr(module, name, type(old)(n if n else o for n, o in zip(size, old, strict=True)))
    else:
        setattr(module, name, size)


def _scale(module: nn.Module, old: torch.Tensor, size: list[int | None]) -> float:
    """The factor that gives weights that timm drew for ``old`` the spread that timm would have drawn at this ``size``.

    The variance of the weights shows the law: 2 / fan-out, 2 / fan-in, 1 / fan-in, 1 / (3 fan-in) as in torch, or a
    variance that depends on no width.
    """
    if old.ndim < 2 or old.is_meta or not isinstance(old, nn.Parameter):  # buffers are not drawn
        return 1.0
    (outs, ins), area, variance = old.shape[:2], old[0, 0].numel(), max(float(old.var()), 1e-24)
    narrower_out, narrower_in = outs / (size[0] or outs), ins / (size[1] or ins)
    laws = [(2 * groups / (outs * area), narrower_out) for groups in (1, getattr(module, "groups", 1))]
    laws += [(k / (ins * area), narrower_in) for k in (2, 1)]
    if float(old.abs().max()) <= 1.001 / math.sqrt(ins * area):  # torch's weights are uniform: none is larger
        laws.append((1 / (3 * ins * area), narrower_in))
    law, ratio = min(laws, key=lambda entry: abs(math.log(entry[0] / variance)))
    return math.sqrt(ratio) if 0.8 < law / variance < 1.25 else 1.0
