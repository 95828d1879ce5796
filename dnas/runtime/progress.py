"""The console, and a progress bar on it."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console(highlight=False, markup=False)  # names of classes may have brackets


EVERY_S = 60.0  # between two lines on progress in a log


@contextmanager
def progress_bar(text: str, total: int) -> Iterator[Callable[..., None]]:
    """A bar with the time that remains: ``advance(note, steps, total)``.

    It is drawn on a terminal, and in a notebook that has ipywidgets; elsewhere there is a line a minute.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    can_draw = console.is_terminal or (console.is_jupyter and find_spec("ipywidgets"))
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not can_draw) as bar:
        bar.add_task(text, total=total)
        task, told = bar.tasks[0], time.monotonic()

        def advance(note: str = "", steps: int = 1, total: int | None = None) -> None:
            nonlocal told
            bar.update(task.id, advance=steps, total=total, description=f"{text} {note}".rstrip())
            if bar.disable and time.monotonic() - told >= EVERY_S:
                told = time.monotonic()
                console.print(f"{task.description}: {task.completed:.0f} of {task.total:.0f}", soft_wrap=True)

        yield advance
