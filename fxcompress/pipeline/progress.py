"""A progress bar for long work: silent when standard error is not a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from fxcompress import processes


@contextmanager
def progress_bar(enabled: bool | None = None) -> Iterator[Callable[[str, int, int | None], None]]:
    """Yield a function progress(description, done, total) that draws one bar per description.

    Args:
        enabled: True or False to force it; None: only on a terminal. Of several processes only the first one draws.
    """
    if not (sys.stderr.isatty() if enabled is None else enabled) or not processes.is_main():
        yield lambda description, done, total: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"),
               TimeElapsedColumn())  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[int | None, TaskID] = {}

        def show(description: str, done: int, total: int | None) -> None:
            if total not in tasks:
                tasks[total] = bars.add_task(description, total=total)
            bars.update(tasks[total], description=description[:60], completed=done)

        yield show
