"""Alternate several ways of doing the same work and time each, so that a machine's drift hits all of them alike."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol

__all__ = ["Runner", "alternate"]

LEAST_SECONDS = 0.02
MOST_RUNS = 10_000


class Runner(Protocol):
    """One way, ready to run.

    Attributes:
        mode: how it is started, which decides what a time holds; times of different modes are not compared.
    """

    @property
    def mode(self) -> str: ...

    def seconds(self, runs: int) -> float:
        """Run it ``runs`` times in a row, wait for the end, and return seconds per call; positive."""
        ...


def alternate(
    runners: Mapping[str, Runner], *, rounds: int, least_seconds: float = LEAST_SECONDS
) -> dict[str, list[float]]:
    """Seconds per call of each runner, one value per round.

    Each runner first runs once, then for ``least_seconds``, unmeasured: clocks rise and caches fill. The first of these tells
    how many runs make a round of at least ``least_seconds``. Rounds go through the runners forwards and backwards in turn: what
    runs after what changes, and a drift that is linear in time cancels over two rounds.

    Raises:
        ValueError: no rounds.
    """
    if rounds < 1:
        raise ValueError("need at least one round")
    runs: dict[str, int] = {}
    for name, runner in runners.items():
        runner.seconds(1)
        once = runner.seconds(1)
        runs[name] = max(1, min(MOST_RUNS, math.ceil(least_seconds / once)))
        runner.seconds(runs[name])
    found: dict[str, list[float]] = {name: [] for name in runners}
    for turn in range(rounds):
        order = list(runners) if turn % 2 == 0 else list(runners)[::-1]
        for name in order:
            found[name].append(runners[name].seconds(runs[name]))
    return found
