"""Progress of long work, on stderr: a bar where someone watches, a few plain lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Any, Protocol

FIRST_LINE = 2.0
"""Seconds before plain lines begin: short work says nothing."""

BETWEEN_LINES = 5.0
"""Least seconds from one plain line to the next."""


class Bar(Protocol):
    """What ``with progress(...)`` gives."""

    def advance(self, step: float = 1, text: str = "") -> None:
        """Count `step` more of the total as done; `text` says what is going on, if not empty."""


@contextlib.contextmanager
def progress(description: str, total: float) -> Iterator[Bar]:
    """Show how much of `total` is done while the ``with`` block runs.

    With rich installed and stderr a terminal, a bar that stays up to date; otherwise lines, the
    first after two seconds and then one in five. stdout is left to the command's own output.

    Examples
    --------
    >>> with progress("compiling", total=2) as bar:
    ...     bar.advance(text="forward")
    ...     bar.advance(text="backward")
    """
    rich_bar = _rich_bar(description, total) if sys.stderr.isatty() else None
    if rich_bar is not None:
        with rich_bar as bar:
            yield bar
        return
    lines = _Lines(description, total)
    yield lines
    lines.close()


@contextlib.contextmanager
def _shown(display: Any, description: str, total: float) -> Iterator[Bar]:
    with display:
        yield _RichBar(display, display.add_task(description, total=total, text=""))


def _rich_bar(description: str, total: float) -> contextlib.AbstractContextManager[Bar] | None:
    try:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )
    except ImportError:
        return None
    # redirect_stdout would send what the command prints, perhaps into a pipe, to stderr
    display = Progress(
        TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(),
        TimeRemainingColumn(), TextColumn("{task.fields[text]}", markup=False),
        console=Console(stderr=True), redirect_stdout=False)
    return _shown(display, description, total)


class _RichBar:
    def __init__(self, display: Any, task: Any) -> None:
        self._display = display
        self._task = task

    def advance(self, step: float = 1, text: str = "") -> None:
        fields = {"text": text} if text else {}
        self._display.update(self._task, advance=step, **fields)


class _Lines:
    def __init__(self, description: str, total: float) -> None:
        self._description = description
        self._total = total
        self._done: float = 0
        self._text = ""
        self._next = time.monotonic() + FIRST_LINE
        self._began = False

    def advance(self, step: float = 1, text: str = "") -> None:
        self._done += step
        self._text = text or self._text
        if time.monotonic() >= self._next:
            self._print()

    def close(self) -> None:
        """End a story that was begun with a line that says where it ended."""
        if self._began:
            self._print()

    def _print(self) -> None:
        self._began = True
        self._next = time.monotonic() + BETWEEN_LINES
        line = f"{self._description}: {self._done:g}/{self._total:g} {self._text}".rstrip()
        print(line, file=sys.stderr, flush=True)
