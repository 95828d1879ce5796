"""A workaround for a fault of oneDNN's, which torch computes with on a CPU."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from dnas.spec.recipe import Recipe


class _Subsampled(TorchFunctionMode):
    """Inside, a narrow strided 1x1 convolution is computed as subsampling and a convolution of stride 1.

    With fewer than 16 input channels in channels_last (8 on processors without AVX-512), the backward of a strided one
    writes past a buffer of oneDNN's: gradients may be wrong, and the process dies sooner or later
    (uxlfoundation/oneDNN#6035; torch 2.14).
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.conv2d and len(args) == 7:  # all convolutions of modules are called so
            x, weight, bias, stride, padding, *rest = args
            narrow = weight.shape[1] < 16 and weight.shape[2:] == (1, 1) and padding in (0, (0, 0), "valid")
            if narrow and stride not in (1, (1, 1)):
                rows, columns = stride if isinstance(stride, tuple) else (stride, stride)
                args = (x[..., ::rows, ::columns], weight, bias, 1, 0, *rest)
        return func(*args, **(kwargs or {}))


def subsampled(model: nn.Module, recipe: Recipe) -> AbstractContextManager:
    """What a forward pass that gets a backward one has to be in, for memory to stay whole: see `_Subsampled`."""
    on_cpu = all(p.device.type == "cpu" for p in model.parameters())
    convs = (m for m in model.modules() if isinstance(m, nn.Conv2d))
    strided = any(c.kernel_size == (1, 1) and c.stride != (1, 1) for c in convs)
    return _Subsampled() if on_cpu and recipe.channels_last and strided else nullcontext()
