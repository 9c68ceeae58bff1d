"""Progress on stderr: bars on a terminal, one plain line per finished task elsewhere (logs, pipelines)."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Self, TextIO

from compile_sparse.compiler.progress import Task

if TYPE_CHECKING:
    from rich.progress import Progress as Bars

__all__ = ["TerminalProgress"]

_PLAIN_INTERVAL_S = 10.0


class _PlainTask:
    """Prints a line now and then, so that a log shows that long work is alive."""

    def __init__(self, label: str, total: int | None, stream: TextIO) -> None:
        self._label, self._total, self._stream = label, total, stream
        self._done, self._started = 0, time.monotonic()
        self._last = self._started

    def advance(self, steps: int = 1) -> None:
        self._done += steps
        now = time.monotonic()
        if now - self._last >= _PLAIN_INTERVAL_S:
            self._last = now
            left = self._left(now - self._started)
            self._say(f"{self._done} of {self._total}, about {left}" if self._total else f"{self._done}")

    def _left(self, elapsed: float) -> str:
        """How long the rest takes at the pace so far."""
        seconds = elapsed * (max(self._total or 0, self._done) - self._done) / max(self._done, 1)
        return f"{seconds:.0f} s left" if seconds < 120 else f"{seconds / 60:.0f} min left"

    def finish(self, word: str) -> None:
        self._say(f"{word} in {time.monotonic() - self._started:.1f} s")

    def _say(self, text: str) -> None:
        self._stream.write(f"{self._label}: {text}\n")
        self._stream.flush()


class _BarTask:
    def __init__(self, bars: Bars, label: str, total: int | None) -> None:
        self._bars = bars
        self._id = bars.add_task(label, total=total)

    def advance(self, steps: int = 1) -> None:
        self._bars.advance(self._id, steps)

    def finish(self) -> None:
        """Fill the bar also when the total was unknown or an estimate."""
        done = self._bars.tasks[self._id].completed or 1
        self._bars.update(self._id, total=done, completed=done)


class TerminalProgress:
    """``Progress`` for people. A context manager: the bars own the last lines of the terminal while it is open."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._bars: Bars | None = None

    def __enter__(self) -> Self:
        if self._stream.isatty():
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                Progress,
                TextColumn,
                TimeElapsedColumn,
                TimeRemainingColumn,
            )

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            )
            self._bars = Progress(*columns, console=Console(file=self._stream))
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    @contextmanager
    def task(self, label: str, total: int | None = None) -> Iterator[Task]:
        """Open a task; it is marked done, or stopped when the block raises."""
        if self._bars is not None:
            bar = _BarTask(self._bars, label, total)
            yield bar
            bar.finish()
            return
        plain = _PlainTask(label, total, self._stream)
        finished = False
        try:
            yield plain
            finished = True
        finally:
            plain.finish("done" if finished else "stopped")
