"""A progress bar for what takes longer than a moment, and nothing for what does not."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

__all__ = ["progress"]

SECONDS = 2.0
"""After which the bar is shown."""


@contextlib.contextmanager
def progress(text: str, console: Console | None = None) -> Iterator[None]:
    """A bar with the seconds so far, on the terminal, if there is one; it is gone when the work is done.

    How long a search takes is not known before, so the bar moves to and fro.
    """
    console = console or Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    bar = Progress(TextColumn(text), BarColumn(), TimeElapsedColumn(), console=console, transient=True)
    bar.add_task(text, total=None)
    timer = threading.Timer(SECONDS, bar.start)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
        bar.stop()
