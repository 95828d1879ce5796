"""A command as a process: its exit codes, and one line for whatever goes wrong."""

import ctypes
import errno
import sys
import warnings
from collections.abc import Callable

import torch

from dnas.runtime.checkpoint import Stopped
from dnas.runtime.distributed import processes, rank
from dnas.runtime.progress import console
from dnas.runtime.signals import stop
from dnas.spec.checks import UserError, first_line

# fvcore scripts its helpers when it is imported, which newer torch deprecates: nothing that a user could mend.
warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated")


def keep_freed_memory(most: int = 2**30) -> None:
    """Let glibc keep up to ``most`` bytes that were freed, as torch does on a GPU; nothing happens without glibc.

    Else each step's larger tensors are mapped, zeroed page by page and unmapped again, which took a third of a step of
    `prunet` with 96 images of 32 px on two cores. The numbers are M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for option in (-1, -3):
            mallopt(option, most)


def what_failed(error: Exception) -> str:
    """One line on a machine that fails, and what to do; empty for any other error."""
    text = first_line(error)
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in text:
        return "out of memory: a smaller --batch-size, --img-size or --width-mult, or fewer --paths are needed"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space is left on the disk for {error.filename or 'a file of the run'}"
    if "DataLoader worker" in text:
        return f"a process that reads images has died; --workers 0 does without ({text})"
    return ""


def what_is_kept() -> str:
    """How to go on with a run that fails, if something of it is on disk."""
    folder = stop.kept()
    return f"what was done is kept: --resume {folder} goes on from there" if folder else ""


def run(main: Callable[[], object]) -> None:
    """Call ``main``. A user's mistake is one line on stderr and exit code 2, and so is a machine that fails, with 1.

    SIGTERM ends with 143, Ctrl-C with 130 and a terminal that hangs up with 129.
    """
    keep_freed_memory()
    try:
        with stop.listening(), processes():
            console.quiet = rank() > 0
            main()
    except UserError as error:
        print(f"error: {error.with_flags}", file=sys.stderr)
        sys.exit(2)
    except Stopped as stopped:
        print(f"stopped{stopped}", file=sys.stderr)
        sys.exit(128 + stopped.signal)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        kept = what_is_kept()
        if not (line := what_failed(error)):
            if kept:
                print(kept, file=sys.stderr)
            raise
        print("; ".join(filter(None, (f"error: {line}", kept))), file=sys.stderr)
        sys.exit(1)
