"""Where long work reports. Passes see only this interface; the terminal's bars live in the CLI."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

__all__ = ["Progress", "SilentProgress", "Task"]


class Task(Protocol):
    """One running piece of work."""

    def advance(self, steps: int = 1) -> None:
        """Say that ``steps`` more are done."""
        ...


class Progress(Protocol):
    """Opens tasks; ``total`` is None when the amount is not known."""

    def task(self, label: str, total: int | None = None) -> AbstractContextManager[Task]:
        """A task that ends with the ``with`` block."""
        ...


class _SilentTask:
    def advance(self, steps: int = 1) -> None:
        return None


class SilentProgress:
    """Reports nothing."""

    @contextmanager
    def task(self, label: str, total: int | None = None) -> Iterator[Task]:
        """A task nobody sees."""
        yield _SilentTask()
