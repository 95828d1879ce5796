"""The default space, after PruNet's (arXiv 2209.11785): what GPUNet varies, with a bi-path block for each candidate.

Stochastic layers over kernel 3 or 5, squeeze-excite or not, and in the early stages fused or plain inverted residuals
(GPUNet fuses only there: elsewhere fused blocks cost more than they bring). The fused candidates' widest expansions are
chosen so that their widest cost is of the order of the plain ones'; otherwise the widest net, and with it what
"half of the widest net" means, would be a matter of fused 5x5 convolutions alone.
"""

from dnas.spec.image_size import ImgSize
from dnas.spec.layer_space import Candidate, EfficientNetSpace, Stage, fit_strides, round_width

PLAIN = tuple(Candidate("ir", k, expand=6, base=4, se=se) for se in (0, 0.25) for k in (3, 5))
FUSED = tuple(Candidate("er", k, expand=e, base=b, se=se) for se in (0, 0.25) for k, e, b in ((3, 3, 2), (5, 1.5, 1)))
# (channels, layers, stride, candidates) before scaling; the first stage is the usual cheap one.
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
    """Stage widths on Markov gates, blocks and inner widths on bi-path blocks, layers that may be dropped.

    Its base net is plain 3x3 inverted residuals of expansion 4 in every layer.
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
