"""A search space of layers as plain data: the outline of timm's EfficientNet, and the candidate blocks of each layer.

The outline is a stem, stages of layers, and a head. The decisions of the space, the rows of a found net and the
supernet's modules all follow from an `EfficientNetSpace` (`dnas.nets.layer_supernet`).
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dnas.spec.image_size import ImgSize, sides, strided


@dataclass(frozen=True)
class Candidate:
    """One kind of block that a layer may have.

    ``kind`` is timm's: ``ds`` depthwise separable, ``ir`` inverted residual, ``er`` fused. ``expand`` and ``base`` are
    the hidden width over the input width, in the widest net and in the base net. ``se`` is the squeeze width over the
    input width (0: no squeeze-excite).
    """

    kind: str
    kernel: int
    expand: float = 1.0
    base: float = 1.0
    se: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.kind}-k{self.kernel}" + ("-se" if self.se else "")


@dataclass(frozen=True)
class Stage:
    """``depth`` layers with the output width ``width``. The first layer has the stride.

    If ``droppable``, all layers but the first may be dropped. The base net has the first candidate.
    """

    width: int
    depth: int
    stride: int
    candidates: tuple[Candidate, ...]
    droppable: bool = False


@dataclass(frozen=True)
class EfficientNetSpace:
    """A whole search space as plain data. All widths are those of the widest net.

    The step of a width grid is a multiple of ``divisor``. A grid has at most ``most_widths`` widths. If ``bipath``,
    inner widths are searched with pairs (PruNet), otherwise with Markov gates (DMCP).
    """

    name: str
    stem: int
    stem_stride: int
    stages: tuple[Stage, ...]
    head: int
    act: str
    bipath: bool
    num_classes: int
    in_chans: int = 3
    img_size: ImgSize = 32
    divisor: int = 8
    most_widths: int = 32


def width_grid(top: int, divisor: int, most: int = 32) -> tuple[int, ...]:
    """The ascending grid of widths from ``top`` down to a tenth of it (DMCP's range): at most ``most`` widths.

    The step is a multiple of ``divisor``. No width is below ``divisor``, unless ``top`` is: then it is the only width.
    """
    step = divisor * math.ceil(top / (divisor * most))
    return tuple(range(top, min(top, max(divisor, math.ceil(top / 10))) - 1, -step))[::-1]


def round_width(width: float, divisor: int) -> int:
    """The multiple of ``divisor`` that is nearest to ``width``, at least ``divisor``."""
    return max(divisor, round(width / divisor) * divisor)


def nearest(grid: Sequence[int], width: float) -> int:
    """The width of the grid nearest to ``width``."""
    return min(grid, key=lambda w: abs(w - width))


def fit_strides(img_size: ImgSize, strides: Sequence[int], smallest: int = 4) -> tuple[int, ...]:
    """The strides for an image of ``img_size`` pixels: a small image has fewer strides of 2.

    For an image whose shorter side has up to 64 pixels, the earliest strides of 2 become 1, as many as the last map
    needs for a side of at least ``smallest``. Larger images keep all strides.
    """
    halvings, side = sum(s == 2 for s in strides), min(sides(img_size))
    allowed = sum(math.ceil(side / 2**n) >= smallest for n in range(1, halvings + 1))  # each halving rounds up
    allowed = halvings if side > 64 else allowed
    fitted = []
    for s in strides:
        drop = s == 2 and halvings > allowed
        fitted.append(1 if drop else s)
        halvings -= drop
    return tuple(fitted)


def layers_of(macro: EfficientNetSpace) -> Iterable[tuple[str, int, int, Stage, str, str, int, ImgSize]]:
    """Every layer: (name, stage index, layer index, stage, in decision, out decision, stride, size of its input)."""
    before, size = "stem", strided(macro.img_size, macro.stem_stride)
    for s, stage in enumerate(macro.stages):
        width = f"stage{s}/width"
        for i in range(stage.depth):
            stride = stage.stride if i == 0 else 1
            yield f"stage{s}/{i}", s, i, stage, before, width, stride, size
            before, size = width, strided(size, stride)
