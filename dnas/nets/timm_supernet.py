"""A supernet around a network of timm's, and one network of it as the data of an export."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from dnas.nets.channels import Axis
from dnas.nets.cut_tensors import remove_channels
from dnas.nets.timm_space import TimmBase
from dnas.nets.traced_supernet import TracedSupernet, sizes_on
from dnas.spec.image_size import ImgSize, sides
from dnas.spec.space import Option


class TimmSupernet(TracedSupernet):
    """All narrower versions of a network of timm's.

    Args:
        base: the network, which is the widest net of the space.
        pretrained, checkpoint: start from timm's weights, or from those in a file (with or without its classifier).

    Raises UserError if the network cannot be run on an image of its size, or has no channels that can be cut.
    """

    def __init__(self, base: TimmBase, pretrained: bool = False, checkpoint: str | None = None) -> None:
        super().__init__(base, base.create(pretrained, checkpoint))

    def net_of(self, arch: Mapping[str, Option]) -> dict[str, Any]:
        """The network as `dnas.export.narrowed.build` reads it: the base, and the smaller sizes of each module."""
        dropped = self.dropped(arch)
        goes = self.whole.without_blocks(dropped).cut(self.sizes(arch))[1]
        return narrowed_net(self.outline, goes, dropped)


def narrowed_net(base: TimmBase, goes: Mapping[Axis, np.ndarray], dropped: Sequence[str] = ()) -> dict[str, Any]:
    """The data of a narrower network, as `dnas.export.narrowed.build` reads it.

    It has the new sizes of each module and the channels of the feature levels. They are measured on a copy on ``meta``,
    from which the blocks ``dropped`` and the positions ``goes`` are removed.
    """
    plain = base.create(device="meta")
    before = measure(plain, base.in_chans, base.img_size)
    for block in dropped:
        plain.set_submodule(block, nn.Identity())
    remove_channels(plain, goes)
    after = measure(plain, base.in_chans, base.img_size)
    modules = sizes_on(plain, goes)
    # The numbers that timm reports, and those from which it builds a new head.
    heads = [(path, m) for path, m in plain.named_modules() if any(c is plain.get_classifier() for c in m.children())]
    for path, module in dict([("", plain), *heads]).items():
        for name in ("num_features", "in_features", "head_hidden_size", "hidden_size", "embed_dim"):
            value = getattr(module, name, None)
            # In a network, num_features are the channels of the last map; in a head, those that its classifier reads.
            first = name == "in_features" or (module is plain and name == "num_features")
            keys = ("num_features", "head_hidden_size") if first else ("head_hidden_size", "num_features")
            key = next((k for k in keys if type(value) is int and value == before[k]), None)
            if key and name not in modules.get(path, {}):
                modules.setdefault(path, {})[name] = after[key]
    net = {"base": base.name, "kwargs": dict(base.kwargs), "features": after["features"], "modules": modules}
    return net | ({"dropped": [*dropped]} if dropped else {})


def measure(model: nn.Module, in_chans: int, img_size: ImgSize) -> dict[str, Any]:
    """The sizes of a network on the device ``meta``, measured in one pass.

    ``features``: the channels of all feature levels. ``num_features``: the channels of the last map. ``pool_size``: the
    height and width of the last map, None for tokens. ``head_hidden_size``: the number of channels that the classifier
    reads.
    """
    x = torch.zeros(1, in_chans, *sides(img_size), device="meta")
    with torch.no_grad():
        levels = model.eval().forward_intermediates(x, intermediates_only=True)
        last = model.forward_features(x)
        hidden = model.forward_head(last, pre_logits=True)
    if last.ndim == 3 or getattr(model, "output_fmt", "NCHW") != "NCHW":  # tokens, or a map with its channels last
        last = last.movedim(-1, 1)
    pool_size = tuple(last.shape[2:]) if last.ndim == 4 else None
    sizes = {"num_features": last.shape[1], "head_hidden_size": hidden.shape[1], "pool_size": pool_size}
    return {"features": [level.shape[1] for level in levels], **sizes}
