"""The run folder: created whole or not at all, every file written to a temporary name and renamed."""

import json
import math
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import IO, Any

import timm
import torch

from dnas import __version__
from dnas.spec.checks import UserError

if sys.platform != "win32":
    import fcntl


def check_new_folder(path: str | Path) -> Path:
    """``path``, which must not exist yet (or be empty) and must be writable. Creates nothing. Raises UserError."""
    folder = Path(path)
    try:
        if folder.exists() and (not folder.is_dir() or {*folder.iterdir()} - {*_half_written(folder)}):
            raise UserError(
                f"--output {str(path)!r} exists already: expected a new or an empty folder, or --resume of that run"
            )
        parent = next(p for p in (folder, *folder.absolute().parents) if p.exists())
        if not parent.is_dir():
            raise UserError(f"--output {str(path)!r} lies in {str(parent)!r}, which is no folder")
        with tempfile.TemporaryFile(dir=parent):  # asks the file system, which knows more than permission bits
            return folder
    except OSError as error:
        raise UserError(f"--output {str(path)!r} cannot be written: {error.strerror or error}") from None


def _half_written(folder: Path) -> Iterator[Path]:
    """What a process that was killed in `write_whole` has left."""
    return folder.glob(".*.tmp")


@contextmanager
def run_folder(folder: Path, keep_if: Sequence[str] = ()) -> Iterator[None]:
    """Create ``folder`` for what follows, which alone writes in it: UserError if another process does.

    If what follows fails, Ctrl-C included, the folder and the parents made for it go; it stays if it was there before,
    or if one of the files ``keep_if`` is in it by then. What a killed process has left half-written goes at once.
    """
    missing = [p for p in (folder, *folder.parents) if not p.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        for path in _half_written(folder):
            path.unlink()
        try:
            yield
        except BaseException:
            if missing and not any((folder / name).exists() for name in keep_if):
                shutil.rmtree(folder)
                for parent in missing[1:]:
                    if any(parent.iterdir()):  # another run has begun in it
                        break
                    parent.rmdir()
            raise


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """The lock is on the folder itself, so that no file is left, and the system takes it from a process that dies."""
    if sys.platform == "win32":  # folders cannot be locked there
        yield
        return
    lock = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{str(folder)!r} is being written by another process: only one may") from None
        yield
    finally:
        os.close(lock)


def write_whole(path: Path, content: bytes) -> None:
    """Replace ``path`` by ``content``, or leave it as it was."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write strict JSON, whole or not at all. ValueError for NaN and infinity."""
    write_whole(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


def append_row(file: IO[str], row: dict) -> None:
    """One line of ``history.jsonl``; floats with six significant digits."""
    file.write(json.dumps(_short(row)) + "\n")
    file.flush()


def write_rows(path: Path, rows: Sequence[dict]) -> None:
    """A history of these rows, whole or not at all."""
    write_whole(path, "".join(json.dumps(_short(row)) + "\n" for row in rows).encode())


def read_rows(path: Path, count: int) -> list[dict]:
    """The first ``count`` rows of a history. Raises UserError if it has fewer."""
    try:
        with open(path) as file:
            rows = [json.loads(line) for line in islice(file, count)]
    except (OSError, ValueError):
        rows = []
    if len(rows) < count:
        raise UserError(f"{str(path)!r} is not the history that its checkpoint knows: {count} whole rows are expected")
    return rows


def _short(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None  # of a step that was skipped; JSON has no NaN
    if isinstance(value, dict):
        return {key: _short(v) for key, v in value.items()}
    return [_short(v) for v in value] if isinstance(value, list) else value


def provenance(device: torch.device) -> dict[str, Any]:
    """Versions, machine and git revision, for ``config.json``."""
    return {
        "dnas": __version__,
        "revision": _revision(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
    }


def _processor() -> str:
    """The processor's name where Linux tells it, otherwise its kind."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _revision() -> str | None:
    """The git revision of a checkout; None for an installed package, or without git."""
    package = Path(__file__).resolve().parents[1]
    command = ["git", "-C", str(package), "rev-parse", "--show-toplevel", "HEAD"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
    except OSError:  # no git on this machine
        return None
    return lines[1] if len(lines) == 2 and Path(lines[0]) == package.parent else None


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory so far: of the GPU's allocator, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    if status.exists():  # Linux's ru_maxrss starts at the peak of the process that started this one
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
