"""DMCP's own space: MobileNetV2 with a width gate on every stage width and every inner width."""

from dnas.spec.image_size import ImgSize
from dnas.spec.layer_space import Candidate, EfficientNetSpace, Stage, fit_strides, round_width

# (expansion, channels, layers, stride): table 2 of the MobileNetV2 paper (arXiv 1801.04381).
ROWS = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


def mobilenet_v2(
    *, num_classes: int, in_chans: int = 3, img_size: ImgSize = 32, width_mult: float = 1.0, divisor: int = 8
) -> EfficientNetSpace:
    """MobileNetV2 at ``width_mult`` is the widest net and the base net of the space (DMCP searches from 1.5)."""

    def width(channels: int) -> int:
        return round_width(channels * width_mult, divisor)

    stem_stride, *strides = fit_strides(img_size, (2, *(row[3] for row in ROWS)))
    stages = tuple(
        Stage(width(c), n, s, (Candidate("ds" if e == 1 else "ir", 3, e, e),))
        for (e, c, n, _), s in zip(ROWS, strides, strict=True)
    )
    return EfficientNetSpace(
        name="mobilenet_v2",
        stem=width(32),
        stem_stride=stem_stride,
        stages=stages,
        head=width(1280),
        act="relu6",
        bipath=False,
        num_classes=num_classes,
        in_chans=in_chans,
        img_size=img_size,
        divisor=divisor,
    )
