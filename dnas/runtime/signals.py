"""Signals that ask a run to stop: it stops between two steps, with a checkpoint."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from dnas.runtime.checkpoint import WORTH_KEEPING, Journal, Stopped


class Stop:
    """What SIGTERM, Ctrl-C and a terminal that hangs up do: `Stopped`, at once, or when a journal has written."""

    def __init__(self) -> None:
        self._signal, self._waits = 0, False
        self._folder: Path | None = None
        self._resumed: Path | None = None

    def asked(self) -> int:
        """The number of the signal that has come; 0 if none has."""
        return self._signal

    @contextmanager
    def between_steps(self) -> Iterator[None]:
        """Inside, a first signal waits for `dnas.runtime.checkpoint.Journal.step`; a second one does not."""
        self._waits = True
        try:
            yield
        finally:
            self._waits = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, signals come here."""
        kinds = [signal.SIGTERM, signal.SIGINT]
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # not under nohup
            kinds.append(signal.SIGHUP)
        before = [signal.signal(kind, self._take) for kind in kinds]
        self._signal, self._folder = 0, None
        try:
            yield
        finally:
            for kind, handler in zip(kinds, before, strict=True):
                signal.signal(kind, signal.SIG_DFL if handler is None else handler)  # None: it was not Python's
            self._signal = 0

    def kept(self) -> Path | None:
        """What ``--resume`` takes to go on with the run that was under way, if it can."""
        folder = self._folder
        return self._resumed if folder and any((folder / name).exists() for name in WORTH_KEEPING) else None

    def _take(self, number: int, frame: object) -> None:
        if self._signal or not self._waits:
            raise Stopped(number, self.kept())
        self._signal = number

    def journal(self, folder: Path, device: torch.device, every_s: float, resumed: Path | None = None) -> Journal:
        """The journal of the run in ``folder``: what stops this process from here on says how to go on, if it can."""
        self._folder, self._resumed = folder, resumed or folder
        return Journal(folder, device, every_s, self.asked, resumed)


stop = Stop()
