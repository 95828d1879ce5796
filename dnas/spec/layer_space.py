"""A search space of layers as plain data: the outline of timm's EfficientNet, and what each of its layers may become.

The outline is a stem, stages of layers, and a head. The decisions of the space, the rows of a found network and the
supernet's modules all follow from an `EfficientNetSpace` (`dnas.nets.layer_supernet`).
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dnas.spec.image_size import ImgSize, sides, strided


@dataclass(frozen=True)
class Candidate:
    """One kind of block that a layer may become.

    ``kind`` is timm's: ``ds`` depthwise separable, ``ir`` inverted residual, ``er`` fused. ``expand`` and ``base`` are
    hidden width over input width, of the widest and of the base net; ``se`` is squeeze width over input width.
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
    """``depth`` layers of output ``width``; the first has the stride, the others may be dropped if ``droppable``.

    The first candidate is the base net's.
    """

    width: int
    depth: int
    stride: int
    candidates: tuple[Candidate, ...]
    droppable: bool = False


@dataclass(frozen=True)
class EfficientNetSpace:
    """A whole search space as plain data. Widths are the widest ones; ``divisor`` is the step of the width grids.

    ``most_widths`` bounds the number of widths of a grid. ``bipath`` searches inner widths with pairs (PruNet),
    otherwise with Markov gates (DMCP).
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
    """At most ``most`` widths down from ``top`` to a tenth of it (DMCP's range), in steps that ``divisor`` divides.

    A ``top`` below ``divisor`` is the only width.
    """
    step = divisor * math.ceil(top / (divisor * most))
    return tuple(range(top, min(top, max(divisor, math.ceil(top / 10))) - 1, -step))[::-1]


def round_width(width: float, divisor: int) -> int:
    """The multiple of ``divisor`` nearest to ``width``, at least one of it."""
    return max(divisor, round(width / divisor) * divisor)


def nearest(grid: Sequence[int], width: float) -> int:
    """The width of the grid nearest to ``width``."""
    return min(grid, key=lambda w: abs(w - width))


def fit_strides(img_size: ImgSize, strides: Sequence[int], smallest: int = 4) -> tuple[int, ...]:
    """Drop the earliest strides of 2 that would leave an image of up to 64 pixels a last map below ``smallest``.

    The shorter side of the image counts.
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
