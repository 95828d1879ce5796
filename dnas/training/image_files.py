"""Image files in class folders: one rule for folders and tars says which files are read, and how they are decoded."""

import hashlib
import io
import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TypeVar

import numpy as np
from PIL import Image
from timm.utils import natural_key
from torchvision.datasets.folder import IMG_EXTENSIONS

from dnas.spec.checks import UserError

Result = TypeVar("Result")
LAYOUT = "train/<class>/<image> and validation/<class>/<image> (or val/<class>/<image>)"
SPLITS = {"train": "train", "validation": "validation", "val": "validation"}
MODES = {1: "L", 3: "RGB"}  # Pillow's, by number of channels
READ = tuple(sorted(IMG_EXTENSIONS))  # in any case
WITH_16_BITS = ("PNG", "PPM")  # formats whose images of mode I have 16 bits
ALPHA = ("LA", "RGBA", "PA", "La", "RGBa")


class Layout:
    """What is in a folder or tar ``where``, entry by entry, and where each image belongs.

    * The class of an image is the folder just below ``train`` or ``validation``, however deep the file is in it. These
      two are at the top, or in the one folder at the top.
    * Hidden files and folders are skipped, and the notes that macOS adds to archives (``__MACOSX``).
    * A file that is no image by its extension is left out and counted in ``left_out``.
    * Class names are compared in Unicode's normal form C: systems write the same name in different ways.
    """

    def __init__(self, where: str) -> None:
        self.where = where
        self.left_out: Counter[str] = Counter()  # files in the class folders, by extension
        self.sizes: list[str] = []  # "split/class/name bytes" of each image, for a digest
        self._counts: dict[str, Counter[str]] = {"train": Counter(), "validation": Counter()}
        self._origins: set[tuple[str, ...]] = set()
        self._spelled: dict[tuple[str, str], str] = {}
        self._seen: set[PurePosixPath] = set()

    def place(self, name: PurePosixPath, size: int | None) -> tuple[str, str] | None:
        """(split, class) of an image of ``size`` bytes; None for what is no image. ``size`` None: a folder."""
        parts = name.parts
        if any(part.startswith(".") or part == "__MACOSX" for part in parts):
            return None
        top = int(len(parts) > 1 and parts[0] not in SPLITS and parts[1] in SPLITS)
        split, inside = SPLITS.get("".join(parts[top : top + 1])), parts[top + 1 :]
        if not split or (size is not None and not inside):
            return None
        self._origins.add(parts[: top + 1])
        is_image = size is not None and name.suffix.lower() in READ
        if size is not None and len(inside) == 1:
            if is_image:
                raise UserError(f"{self.where}: image {str(name)!r} is in no class folder: expected {LAYOUT}")
            return None
        if not inside:
            return None
        label = unicodedata.normalize("NFC", inside[0])
        if self._spelled.setdefault((split, label), inside[0]) != inside[0]:
            raise UserError(f"{self.where}: class {label!r} has two folders in {split}, of other bytes: expected one")
        self._counts[split][label] += is_image
        if size is not None and not is_image:
            self.left_out[name.suffix.lower() or "no extension"] += 1
        if not is_image:
            return None
        if name in self._seen:
            raise UserError(f"{self.where}: image {str(name)!r} is there twice: expected once")
        self._seen.add(name)
        self.sizes.append(f"{split}/{unicodedata.normalize('NFC', '/'.join(inside))} {size}")
        return split, label

    def class_names(self) -> tuple[str, ...]:
        """The class names in timm's order, after all entries. Raises UserError if the layout is not as expected."""
        if sorted(SPLITS[origin[-1]] for origin in self._origins) != ["train", "validation"]:
            seen = ", ".join(sorted(repr("/".join(origin)) for origin in self._origins)) or "none"
            raise UserError(f"{self.where} has these folders of classes: {seen}; expected {LAYOUT}")
        train, val = self._counts.values()
        for split, counts in self._counts.items():
            if not counts:
                raise UserError(f"{self.where}: folder {split!r} has no class folder: expected {LAYOUT}")
            for name, count in counts.items():
                if not count:
                    others = f" ({counted(self.left_out)} left out)" if self.left_out else ""
                    folder = f"{split}/{name}"
                    raise UserError(
                        f"{self.where}: class folder {folder!r} has no image in it{others}: expected {' '.join(READ)}"
                    )
        if train.keys() != val.keys():
            odd = min(train.keys() ^ val.keys())
            raise UserError(
                f"{self.where}: class {odd!r} is in one split only: expected the same in train and validation"
            )
        if len(train) < 2:
            raise UserError(f"{self.where} has {len(train)} class, {', '.join(map(repr, train))}: expected at least 2")
        names = sorted(train, key=lambda name: (natural_key(name), name))
        for one, other in zip(names, names[1:], strict=False):
            if natural_key(one) == natural_key(
                other
            ):  # timm would number these two by chance, differently in every run
                raise UserError(f"{self.where}: classes {one!r} and {other!r} are one to timm: expected other names")
        return tuple(names)


def counted(counts: Mapping[str, int]) -> str:
    """``80 .gif, 2 .txt``: the most first."""
    return ", ".join(f"{n} {what}" for what, n in sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def walk(root: Path) -> Iterator[tuple[PurePosixPath, Path, int | None]]:
    """(name relative to ``root``, path, bytes or None for a folder) of what is in a data folder; links are followed.

    What is neither in a folder of a split nor in a folder that has one is not looked at: it may be large, or closed.
    Raises UserError for what cannot be read, and for a link to a folder above itself.
    """

    def failed(error: OSError) -> None:
        raise UserError(f"folder {error.filename!r} cannot be read ({error.strerror}): expected one that can")

    splits: dict[str, Path] = {}
    for folder, dirs, files in os.walk(root, onerror=failed, followlinks=True):
        here, real = Path(folder), os.path.realpath(folder)
        dirs[:] = sorted((d for d in dirs if not d.startswith(".")), key=natural_key)
        if here == root:
            dirs[:] = [d for d in dirs if d in SPLITS or any(os.path.isdir(here / d / split) for split in SPLITS)]
        elif here.parent == root and here.name not in SPLITS:
            dirs[:] = [d for d in dirs if d in SPLITS]
        for name in dirs:
            target = os.path.realpath(here / name)
            if real == target or real.startswith(target.rstrip(os.sep) + os.sep):
                raise UserError(f"folder {str(here / name)!r} is a link to a folder above it: expected no such loop")
            if name in SPLITS and len((here / name).relative_to(root).parts) <= 2:
                other = splits.setdefault(target, here / name)
                if other != here / name:
                    raise UserError(f"{str(other)!r} and {str(here / name)!r} are one folder: expected two")
            yield PurePosixPath((here / name).relative_to(root)), here / name, None
        if not SPLITS.keys() & {*here.relative_to(root).parts[:2]}:
            continue
        for name in sorted(files, key=natural_key):
            path = here / name
            is_wanted = not name.startswith(".") and path.suffix.lower() in READ
            if is_wanted and not os.path.isfile(path):
                raise UserError(f"image {str(path)!r} is a broken link, or no file: expected a file")
            yield PurePosixPath(path.relative_to(root)), path, path.stat().st_size if is_wanted else 0


@dataclass(frozen=True)
class Look:
    """What is known of one image file: (height, width), Pillow's mode, what is odd, a digest of its bytes if read."""

    size: tuple[int, int]
    mode: str
    odd: tuple[str, ...]
    digest: bytes


ODD = {
    "frames": "have several frames, of which the first is used",
    "rotation": "have an EXIF rotation, which is not applied (timm does not apply it either)",
    "transparency": "have transparent pixels, which count with the colour that they hide (as in timm)",
}


def to_8_bits(image: Image.Image, mode: str) -> Image.Image:
    """An opened image in mode L or RGB. 16 bits are scaled to 8; transparency is dropped, as timm does it.

    32-bit integers and floats are refused before: no file says their range.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in WITH_16_BITS):  # Pillow would clip them
        values = np.asarray(image, dtype=np.uint32)
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    image.load()  # a whole file, even where nothing is to be converted
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image if image.mode == mode else image.convert(mode)


def decode(path: str, what: str, mode: str) -> Image.Image:
    """The image in a file, in mode L or RGB. Raises UserError, which names it as ``what``."""
    return _opened(path, what, lambda image: to_8_bits(image, mode))


def decode_and_look(content: bytes, what: str, mode: str) -> tuple[Image.Image, Look]:
    """The image in the bytes of a file, in mode L or RGB, and what is known of it. Raises UserError if it is none."""

    def both(image: Image.Image) -> tuple[Image.Image, Look]:
        odd = _of_header(image)
        if (image.mode in ALPHA or "transparency" in image.info) and _is_transparent(image):
            odd.append("transparency")
        digest = hashlib.sha1(content, usedforsecurity=False).digest()
        look = Look((image.height, image.width), image.mode, tuple(odd), digest)
        return to_8_bits(image, mode), look

    return _opened(io.BytesIO(content), what, both)


def look_at_header(path: str, what: str) -> Look:
    """What the header of an image file says. Raises UserError if it is none."""

    def look(image: Image.Image) -> Look:
        return Look((image.height, image.width), image.mode, tuple(_of_header(image)), b"")

    return _opened(path, what, look)


def _of_header(image: Image.Image) -> list[str]:
    """What is odd about an image, by its header. Raises ValueError for pixels whose range no header says."""
    if image.mode == "F" or (image.mode == "I" and image.format not in WITH_16_BITS):
        raise ValueError(f"its pixels are of mode {image.mode!r}, whose range is not known; expected 8 or 16 bits")
    odd = []
    if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:  # MPO: a photograph, and its preview
        odd.append("frames")
    bits = getattr(image, "tag_v2", {}).get(258, (8,))  # of a TIFF: bits of each sample
    if any(b not in (1, 8, 16) for b in ([bits] if isinstance(bits, int) else bits)):
        raise ValueError(f"it has {bits} bits a sample; expected 8 or 16 bits")
    # Pillow applies the rotation of TIFF files itself; that of a PNG is behind its pixels.
    if image.format not in ("TIFF", "PNG") and image.getexif().get(0x0112, 1) not in (0, 1):
        odd.append("rotation")
    return odd


def _is_transparent(image: Image.Image) -> bool:
    least = image.convert("RGBA").getchannel("A").getextrema()[0]
    return int(least) < 255  # type: ignore[arg-type]


def _opened(file: str | io.BytesIO, what: str, use: Callable[[Image.Image], Result]) -> Result:
    """``use(image)`` of the first frame of an opened image; whatever Pillow raises becomes a UserError."""
    try:
        with Image.open(file) as image:
            return use(image)
    except Exception as error:  # on damaged files PIL raises almost anything: OSError, SyntaxError, struct.error
        reason = f" ({error})" if isinstance(error, ValueError) and "expected" in str(error) else ""
        raise UserError(f"{what} cannot be decoded{reason}: expected a whole image file") from error
