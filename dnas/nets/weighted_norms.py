"""Norms over channels in which a channel counts as much as its factor: those of a narrower network if it is 0 or 1."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from timm.layers.grn import GlobalResponseNorm
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


@contextmanager
def weighted_norms(model: nn.Module, factors: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, the norms with these weights (name -> a factor for each channel) weight channels by their factors.

    They are layer norms, group norms of one group, root mean square norms, and timm's global response norms.
    """
    modules = {name: model.get_submodule(name.rpartition(".")[0]) for name in factors}
    responses = {name: m for name, m in modules.items() if isinstance(m, GlobalResponseNorm)}
    hooks = [m.register_forward_hook(partial(_response_norm, factors[name])) for name, m in responses.items()]
    try:
        with _WeightedNorms({id(m.weight): factors[name] for name, m in modules.items() if name not in responses}):
            yield
    finally:
        for hook in hooks:
            hook.remove()


class _WeightedNorms(TorchFunctionMode):
    """Inside this context, norms with these weights (by ``id``) weight channels by their factors in all means."""

    def __init__(self, factors: Mapping[int, Tensor]) -> None:
        super().__init__()
        self.factors = factors

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        given = kwargs or {}  # torch's norms pass all but the first two by name
        factor = self.factors.get(id(given.get("weight"))) if func in (F.layer_norm, F.group_norm, F.rms_norm) else None
        if factor is None:
            return func(*args, **given)
        with torch.autocast(args[0].device.type, enabled=False):  # squares overflow in float16, as torch's norms know
            return self._norm(func, args[0], factor, given)

    def _norm(self, func: Any, x: Tensor, factor: Tensor, given: Mapping[str, Any]) -> Tensor:
        """The norm, in float32 at least."""
        dtype, (weight, bias), share = x.dtype, (given["weight"], given.get("bias")), factor / factor.sum()
        x = x.to(torch.promote_types(dtype, torch.float32))
        # Means over channels are products with a vector: one pass each.
        if func is F.group_norm:
            x = x - (x.reshape(*x.shape[:2], -1).mean(2) @ share).view(-1, *[1] * (x.ndim - 1))
            square = (x.square().reshape(*x.shape[:2], -1).mean(2) @ share).view(-1, *[1] * (x.ndim - 1))
            weight, bias = (None if t is None else t.view(-1, *[1] * (x.ndim - 2)) for t in (weight, bias))
        else:
            x = x - (x @ share)[..., None] if func is F.layer_norm else x
            square = (x.square() @ share)[..., None]
        eps = given["eps"] if given.get("eps") is not None else torch.finfo(dtype).eps
        x = x * torch.rsqrt(square + eps)
        return x * weight if bias is None else torch.addcmul(bias, x, weight)


def _response_norm(factor: Tensor, module: Any, args: tuple[Tensor], _: Tensor) -> Tensor:
    """What a global response norm writes: x + bias + weight * x * |x| / (mean of |x| over channels)."""
    x, shape = args[0], module.wb_shape
    size = x.norm(p=2, dim=module.spatial_dim, keepdim=True)
    mean = (size * (factor / factor.sum()).view(shape)).sum(module.channel_dim, keepdim=True)
    return x + torch.addcmul(module.bias.view(shape), module.weight.view(shape), x * (size / (mean + module.eps)))
