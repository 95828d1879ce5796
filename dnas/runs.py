"""The run folder: created whole or not at all, every file written to a temporary name and renamed."""

import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO, Any

import timm
import torch

from dnas import __version__
from dnas.units import UserError


def check_new_folder(path: str | Path) -> Path:
    """``path``, which must not exist yet (or be empty) and must be writable. Creates nothing. Raises UserError."""
    folder = Path(path)
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"--output {str(path)!r} exists already: expected a new or an empty folder")
        parent = next(p for p in (folder, *folder.absolute().parents) if p.exists())
        if not parent.is_dir():
            raise UserError(f"--output {str(path)!r} lies in {str(parent)!r}, which is no folder")
        with tempfile.TemporaryFile(dir=parent):  # asks the file system, which knows more than permission bits
            return folder
    except OSError as error:
        raise UserError(f"--output {str(path)!r} cannot be written: {error.strerror or error}") from None


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that the file is either the old one or the whole new one."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w") as file:
        json.dump(content, file, indent=1, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def append_row(file: IO[str], row: dict) -> None:
    """One line of ``history.jsonl``; floats with six significant digits."""
    file.write(json.dumps(_short(row)) + "\n")
    file.flush()


def _short(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _short(v) for key, v in value.items()}
    return [_short(v) for v in value] if isinstance(value, list) else value


def provenance(device: torch.device) -> dict[str, Any]:
    """Versions, machine and git revision, for ``config.json``."""
    git = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    return {
        "dnas": __version__,
        "revision": git.stdout.strip() or None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
    }


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory so far: of the GPU's allocator, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
