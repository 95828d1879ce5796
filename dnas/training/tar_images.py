"""Reading a tar of images without unpacking it: whole files, or an error that says what is damaged."""

import gzip
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from dnas.spec.checks import UserError


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
