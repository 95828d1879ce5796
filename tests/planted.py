"""Weights and images with a planted best answer in the space `toy`: a search that does not find it is broken.

Images are noise in which each class repeats itself at a displacement of its own, four pixels away. Only a 5x5 depthwise
kernel can see that, and only in the first layer; `plant` gives the supernet weights that do so with 12 hidden channels.
More hidden channels and more layers add noise only. So the best network has a 5x5 kernel of inner width 12, and one
layer; a cheaper kernel, or another width, would fit the budget just as well. The weights are to be left as they are:
search with a learning rate of nearly zero.
"""

import torch
from torch import nn

from dnas.nets.supernet import Supernet
from dnas.training.batches import Data, in_memory

SHIFTS = ((0, 4), (4, 0), (4, 4), (4, -4))  # of the four classes, in pixels
BEST = {"stage0/0/block": "ir-k5", "stage0/0/ir-k5/mid": 12, "stage0/1/keep": "drop", "stage0/2/keep": "drop"}


def planted_data(seed: int = 0, num_train: int = 2048, num_val: int = 512, img_size: int = 12) -> Data:
    """Noise images uint8 [N, 3, S, S] of four classes, each correlated with itself at its class's displacement."""
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.arange(count) % len(SHIFTS)
        noise = torch.randn(count, 3, img_size, img_size, generator=generator)
        moved = torch.stack([noise[k].roll(SHIFTS[c], (1, 2)) for k, c in enumerate(labels.tolist())])
        return ((noise + moved) * 30 + 128).clamp(0, 255).to(torch.uint8), labels

    names = tuple(f"shift {dy},{dx}" for dy, dx in SHIFTS)
    return in_memory("planted", draw(num_train), draw(num_val), names, None, 3, "cpu", flip=False)


@torch.no_grad()
def plant(net: Supernet, seed: int = 0) -> Supernet:
    """Set the weights of a `toy` supernet so that `BEST` classifies `planted_data`, and everything else disturbs it."""
    generator = torch.Generator().manual_seed(seed)

    def noise(like: nn.Parameter, scale: float) -> torch.Tensor:
        return torch.randn(like.shape, generator=generator) * scale

    net.conv_stem.weight.copy_(noise(net.conv_stem.weight, 0.3))
    for c in range(3):  # the first stem channels are the colours themselves
        net.conv_stem.weight[c] = 0
        net.conv_stem.weight[c, c, 1, 1] = 1
    for position, layer in enumerate(net.layers):
        three, five = (layer.blocks[name].block for name in ("ir-k3", "ir-k5"))
        for conv in (five.conv_pw, five.conv_dw, five.conv_pwl, three.conv_dw):
            conv.weight.copy_(noise(conv.weight, 1.0))
        if position:
            continue
        five.conv_pw.weight[:12], five.conv_dw.weight[:12], five.conv_pwl.weight[:4, :12] = 0, 0, 0
        for h in range(12):  # hidden channel h: colour h // 4, displacement h % 4
            dy, dx = (shift // 2 for shift in SHIFTS[h % 4])
            five.conv_pw.weight[h, h // 4] = 1
            five.conv_dw.weight[h, 0, 2 - dy, 2 - dx] = five.conv_dw.weight[h, 0, 2 + dy, 2 + dx] = 1
            five.conv_pwl.weight[h % 4, h] = 1
    net.conv_head.weight.zero_()
    net.classifier.weight.zero_()
    net.classifier.bias.zero_()
    for c in range(4):
        net.conv_head.weight[c, c], net.classifier.weight[c, c] = 1, 30
    return net
