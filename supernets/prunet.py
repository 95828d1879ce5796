"""The default space, after PruNet's (arXiv 2209.11785): it varies what GPUNet varies, with bi-path blocks.

The layers are stochastic layers. They choose kernel 3 or 5, squeeze-excite or not, and in the early stages fused or
plain inverted residuals. GPUNet fuses only there: elsewhere fused blocks cost more than they bring. The widest
expansions of the fused candidates give them about the same widest cost as the plain candidates. Otherwise only the
fused 5x5 convolutions would decide the cost of the widest net, and so the meaning of "half of the widest net".
"""

from dnas.spec.image_size import ImgSize
from dnas.spec.layer_space import Candidate, EfficientNetSpace, Stage, fit_strides, round_width

PLAIN = tuple(Candidate("ir", k, expand=6, base=4, se=se) for se in (0, 0.25) for k in (3, 5))
FUSED = tuple(Candidate("er", k, expand=e, base=b, se=se) for se in (0, 0.25) for k, e, b in ((3, 3, 2), (5, 1.5, 1)))
# (channels, layers, stride, candidates) before scaling. The first stage is cheap, as usual.
ROWS = (
    (16, 1, 1, (Candidate("ds", 3),)),
    (24, 2, 2, PLAIN + FUSED),
    (40, 3, 2, PLAIN + FUSED),
    (80, 3, 2, PLAIN),
    (112, 2, 1, PLAIN),
    (192, 3, 2, PLAIN),
)


def prunet(
    *, num_classes: int, in_chans: int = 3, img_size: ImgSize = 32, width_mult: float = 1.0, divisor: int = 8
) -> EfficientNetSpace:
    """The space has Markov gates on the stage widths, bi-path blocks as candidates, and layers that may be dropped.

    The base net has a 3x3 depthwise separable block in the first stage, and plain 3x3 inverted residuals of expansion 4
    in all other layers.
    """

    def width(channels: int) -> int:
        return round_width(channels * width_mult, divisor)

    stem_stride, *strides = fit_strides(img_size, (2, *(row[2] for row in ROWS)))
    stages = tuple(
        Stage(width(c), n, s, candidates, droppable=True)
        for (c, n, _, candidates), s in zip(ROWS, strides, strict=True)
    )
    return EfficientNetSpace(
        name="prunet",
        stem=width(32),
        stem_stride=stem_stride,
        stages=stages,
        head=width(960),
        act="relu",
        bipath=True,
        num_classes=num_classes,
        in_chans=in_chans,
        img_size=img_size,
        divisor=divisor,
    )
