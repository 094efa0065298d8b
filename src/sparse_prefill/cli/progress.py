"""Progress of a command, on stderr."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any


class Progress:
    """Steps of a command: a bar if stderr is a terminal and rich is installed, else a line for each step.

    Call ``progress(done, total, text)`` when a step begins and ``done`` of ``total`` steps are finished.

    Example:
        >>> with Progress() as progress:
        ...     progress(0, 2, "read")
        ...     progress(1, 2, "write")
    """

    def __enter__(self) -> Progress:
        self.bar, self.task = _bar(), None
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.stop()

    def __call__(self, done: int, total: int, text: str) -> None:
        if self.bar is None:
            print(f"[{done}/{total}] {text}" if total else text, file=sys.stderr, flush=True)
            return
        if self.task is None:
            self.task = self.bar.add_task("")
        self.bar.update(self.task, description=text, completed=done, total=total or None)


def _bar() -> Any:
    """rich's bar, or None."""
    if not sys.stderr.isatty():
        return None
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as RichProgress
    except ModuleNotFoundError:
        return None
    columns = (TextColumn("{task.description:40}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return RichProgress(*columns, console=Console(stderr=True), transient=True)
