"""The size of the images: one number for a square, (height, width) for any other rectangle, in pixels."""

from collections.abc import Sequence
from typing import Any

from dnas.spec.checks import UserError

ImgSize = int | tuple[int, int]
MOST = 8_192  # pixels a side


def sides(img_size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width)."""
    if isinstance(img_size, int):
        return img_size, img_size
    height, width = img_size
    return height, width


def as_size(img_size: int | Sequence[int]) -> ImgSize:
    """The one way to write this size: a number where height and width are equal."""
    height, width = sides(img_size)
    return height if height == width else (height, width)


def size_text(img_size: int | Sequence[int]) -> str:
    """``32`` or ``24x96``, height first."""
    height, width = sides(img_size)
    return str(height) if height == width else f"{height}x{width}"


def pixels(img_size: int | Sequence[int]) -> int:
    """How many pixels an image has."""
    height, width = sides(img_size)
    return height * width


def strided(img_size: int | Sequence[int], stride: int) -> ImgSize:
    """The size of the map that a convolution with this stride and timm's padding gives: each side rounds up."""
    height, width = sides(img_size)
    return as_size((-(-height // stride), -(-width // stride)))


def check_size(img_size: Any, least: int = 1) -> ImgSize:
    """``img_size`` as `as_size` writes it. Raises UserError if it is none, or a side is below ``least`` pixels."""
    parts = list(img_size) if isinstance(img_size, (list, tuple)) else [img_size]
    whole = all(isinstance(part, int) and not isinstance(part, bool) and least <= part <= MOST for part in parts)
    if not whole or len(parts) not in (1, 2):
        allowed = f"whole numbers of {least} to {MOST}"
        raise UserError(f"image size {img_size!r} must be one side of a square, or height and width: {allowed}")
    return as_size(parts[0] if len(parts) == 1 else parts)
