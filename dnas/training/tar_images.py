"""Reading a tar of images without unpacking it: whole files, or an error that says what is damaged."""

import gzip
import io
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dnas.spec.checks import UserError

MODES = {1: "L", 3: "RGB"}  # Pillow's, by number of channels


def members(path: Path) -> Iterator[tuple[PurePosixPath, bytes | None]]:
    """(name, content) of every file and (name, None) of every folder; any damage is a `UserError`."""
    where, opened = repr(str(path)), gzip.open if path.name.lower().endswith("gz") else open
    try:
        with opened(path, "rb") as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            for member in tar:
                name = PurePosixPath(member.name)
                if name.is_absolute() or ".." in name.parts or not (member.isfile() or member.isdir()):
                    raise UserError(f"{where}: member {member.name!r} is refused: expected files and folders within")
                file = tar.extractfile(member)
                yield name, file.read() if file else None
            # tarfile takes a damaged header for the end and stops there: see that the end mark and the checksum follow.
            stream.seek(tar.offset)
            if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("the end mark is missing")
            while stream.read(1 << 20):
                pass
    except UserError:
        raise
    except (tarfile.TarError, zlib.error, EOFError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{where} is no tar archive, or a damaged one: expected a whole one ({reason})") from error


def decode(content: bytes, what: str, in_chans: int) -> Tensor:
    """A JPEG or PNG as uint8 [in_chans, H, W], decoded as timm does it with files."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            pixels = np.array(image if image.mode == MODES[in_chans] else image.convert(MODES[in_chans]))
            return torch.from_numpy(pixels).view(*pixels.shape[:2], in_chans).permute(2, 0, 1)
    except Exception as error:  # on damaged files PIL raises almost anything: OSError, SyntaxError, struct.error
        raise UserError(f"{what} cannot be decoded: expected a whole JPEG or PNG file") from error
