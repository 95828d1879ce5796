"""A supernet around a network of the user's own, and one network of it as the data of an export."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from dnas.nets.cut_tensors import remove_channels
from dnas.nets.own_base import Own, OwnBase, name_of_copy
from dnas.nets.traced_supernet import TracedSupernet, sizes_on
from dnas.nets.tracing import on_meta
from dnas.spec.checks import UserError
from dnas.spec.image_size import sides
from dnas.spec.space import Option


def check_logits(model: nn.Module, what: str, shape: tuple[int, ...], num_classes: int) -> None:
    """Raise UserError unless a network gives one number for each class, by a pass on the device ``meta``."""
    with torch.no_grad():
        out = on_meta(model).eval()(torch.zeros(1, *shape, device="meta"))
    found = list(out.shape) if isinstance(out, torch.Tensor) else f"a {type(out).__name__}"
    if found != [1, num_classes]:
        raise UserError(f"{what} gives {found} for one image; the data has classes for [1, {num_classes}]")


class OwnSupernet(TracedSupernet):
    """All narrower versions of a network of the user's own.

    Args:
        base: the network, which is the widest net of the space.
        own: what makes it.
        model: the network with the weights to start from, which now belong to the supernet (default: fresh ones).

    Raises UserError as `TracedSupernet` does.
    """

    own: Own

    def __init__(self, base: OwnBase, own: Own, model: nn.Module | None = None) -> None:
        model = model or own.create()
        plain = on_meta(model)
        super().__init__(base, model)
        self.own, self._plain = own, (plain,)  # a tuple, so that it is no part of this module

    def check_logits(self) -> None:
        """Raise UserError unless the network gives one number for each class of the data."""
        base = self.outline
        check_logits(self._plain[0], str(base), (base.in_chans, *sides(base.img_size)), base.num_classes)

    def net_of(self, arch: Mapping[str, Option]) -> dict[str, Any]:
        """The network as plain data: how it is made, and the smaller sizes of each module."""
        plain, dropped = copy.deepcopy(self._plain[0]), self.dropped(arch)
        for block in dropped:
            plain.set_submodule(block, nn.Identity())
        goes = self.whole.without_blocks(dropped).cut(self.sizes(arch))[1]
        remove_channels(plain, goes)
        base, made_by = self.outline, {"name": self.name}
        if base.file:
            made_by |= {"file": name_of_copy(base.file), "function": base.function, "sha256": base.digest}
        return {"own": made_by, "modules": sizes_on(plain, goes)} | ({"dropped": dropped} if dropped else {})
