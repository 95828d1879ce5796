"""The size of the images: one number for a square, (height, width) for any other rectangle, in pixels.

What a program gives a network of its own may have any number of sides: ``()`` for rows of numbers, ``(length,)`` for
signals, ``(depth, height, width)`` for volumes.
"""

import math
from collections.abc import Sequence
from typing import Any

from dnas.spec.checks import UserError

ImgSize = int | tuple[int, ...]
MOST = 8_192  # pixels a side


def sides(img_size: int | Sequence[int]) -> tuple[int, ...]:
    """(height, width), or as many sides as there are."""
    return (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)


def as_size(img_size: int | Sequence[int]) -> ImgSize:
    """The one way to write this size: a number where height and width are equal."""
    found = sides(img_size)
    return found[0] if len(found) == 2 and found[0] == found[1] else found


def plain_size(img_size: int | Sequence[int]) -> int | list[int]:
    """The same as JSON has it."""
    found = as_size(img_size)
    return found if isinstance(found, int) else list(found)


def size_text(img_size: int | Sequence[int]) -> str:
    """``32`` or ``24x96``, height first."""
    size = as_size(img_size)
    return str(size) if isinstance(size, int) else "x".join(map(str, size)) or "one number"


def pixels(img_size: int | Sequence[int]) -> int:
    """How many pixels an image has."""
    return math.prod(sides(img_size))


def strided(img_size: int | Sequence[int], stride: int) -> ImgSize:
    """The size of the map that a convolution with this stride and timm's padding gives: each side rounds up."""
    return as_size([-(-side // stride) for side in sides(img_size)])


def check_size(img_size: Any, least: int = 1) -> ImgSize:
    """``img_size`` as `as_size` writes it. Raises UserError if it is none, or a side is below ``least`` pixels."""
    parts = list(img_size) if isinstance(img_size, (list, tuple)) else [img_size]
    whole = all(isinstance(part, int) and not isinstance(part, bool) and least <= part <= MOST for part in parts)
    if not whole or len(parts) not in (1, 2):
        allowed = f"whole numbers of {least} to {MOST}"
        raise UserError(f"image size {img_size!r} must be one side of a square, or height and width: {allowed}")
    return as_size(parts[0] if len(parts) == 1 else parts)


def check_sides(img_size: Any) -> ImgSize:
    """The same for what a network of a program's own may be shown: up to three sides, or none."""
    if isinstance(img_size, (list, tuple)) and len(img_size) in (0, 1, 3):
        for side in img_size:
            check_size(side)
        return tuple(img_size)
    return check_size(img_size)
