"""How far a build is, from the nested phases that the builder announces."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["TOTAL", "BuildProgress"]

TOTAL = 1000
"""Parts that a whole build is counted in."""


@dataclass
class _Phase:
    parent: str | None
    steps: int
    done: int = 0


class BuildProgress:
    """Phases in, growing numbers up to ``TOTAL`` out.

    A phase within another counts as a part of the outer one's current step. Later phases may be as long as earlier ones were
    short, so this is an order, not a forecast. May be called from several threads.

    Args:
        report: called with a number whenever it grew.
    """

    def __init__(self, report: Callable[[int], None]) -> None:
        self._report, self._reported = report, 0
        self._open: dict[str, _Phase] = {}
        self._lock = threading.Lock()

    def start(self, name: str, parent: str | None, steps: int) -> None:
        """A phase of ``steps`` steps begins."""
        with self._lock:
            self._open[name] = _Phase(parent, max(1, steps))

    def step(self, name: str, step: int) -> None:
        """Step number ``step``, counted from 0, is done."""
        with self._lock:
            if name in self._open:
                self._open[name].done = step + 1
                self._tell()

    def finish(self, name: str) -> None:
        """A phase ends, whether or not all its steps were announced."""
        with self._lock:
            phase = self._open.get(name)
            if phase is not None:
                phase.done = phase.steps
                self._tell()
                del self._open[name]

    def _tell(self) -> None:
        outermost = [name for name, phase in self._open.items() if phase.parent not in self._open]
        reached = int(TOTAL * max((self._share(name) for name in outermost), default=0.0))
        if reached > self._reported:
            self._reported = reached
            self._report(reached)

    def _share(self, name: str) -> float:
        phase = self._open[name]
        inner = max((self._share(child) for child, other in self._open.items() if other.parent == name), default=0.0)
        return min(1.0, (phase.done + inner) / phase.steps)
