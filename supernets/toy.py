"""A tiny space, for first steps and for tests: three layers, searched in seconds."""

from dnas.spec.image_size import ImgSize
from dnas.spec.layer_space import Candidate, EfficientNetSpace, Stage, round_width


def toy(
    *, num_classes: int = 4, in_chans: int = 3, img_size: ImgSize = 12, width_mult: float = 1.0, divisor: int = 4
) -> EfficientNetSpace:
    """Three layers, two of which may be dropped; 3x3 or 5x5 kernels; inner widths up to 32. The other widths are 4.

    The grid is coarse: for example, no network costs 88 to 90 % of the widest net.
    """
    candidates = (Candidate("ir", 3, expand=8, base=6), Candidate("ir", 5, expand=8, base=6))
    width = round_width(4 * width_mult, divisor)
    stage = Stage(width, 3, 1, candidates, droppable=True)
    return EfficientNetSpace("toy", width, 1, (stage,), width, "relu", True, num_classes, in_chans, img_size, divisor)
