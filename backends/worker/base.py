"""What every measuring process has: loaded models by name, a greeting, the machine's bandwidth, and turns."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

from compile_sparse.backends.worker.errors import RequestError
from compile_sparse.backends.worker.machine import read_bandwidth
from compile_sparse.compiler.runtimes.messages import (
    PROTOCOL,
    Bandwidth,
    Benchmark,
    Greeting,
    Hello,
    ReadSpeed,
    Round,
    Rounds,
    Runtime,
)
from compile_sparse.compiler.runtimes.wire import Handler, Report

__all__ = ["Worker", "in_turns", "time_rounds"]

M = TypeVar("M")
T = TypeVar("T")


class Worker(ABC, Generic[M]):
    """State between requests, and a method for each operation."""

    def __init__(self) -> None:
        self._models: dict[str, M] = {}

    @abstractmethod
    def runtime(self) -> Runtime:
        """Name, version and device."""

    def handlers(self) -> list[Handler]:
        """What ``serve`` answers requests with."""
        return [Hello.handled_by(self.hello), Bandwidth.handled_by(self.bandwidth)]

    def model(self, name: str) -> M:
        """The model loaded under ``name``.

        Raises:
            RequestError: there is none.
        """
        if name not in self._models:
            raise RequestError(f"no model is loaded under the name {name!r}; loaded: {sorted(self._models)}")
        return self._models[name]

    def hello(self, request: Hello, report: Report) -> Greeting:
        """See the request, as for every operation."""
        return Greeting(PROTOCOL, self.runtime(), os.getpid())

    def bandwidth(self, request: Bandwidth, report: Report) -> ReadSpeed:
        return ReadSpeed(read_bandwidth(request.threads))


def in_turns(names: Sequence[str], warmup: int, rounds: int) -> Iterator[tuple[bool, Sequence[str]]]:
    """For each round, whether it counts and the order of the models in it: forth, back, forth, ..."""
    for turn in range(warmup + rounds):
        yield turn >= warmup, names if turn % 2 == 0 else names[::-1]


def time_rounds(
    request: Benchmark, tokens: Callable[[], T], generate: Callable[[str, T], Round], report: Report
) -> Rounds:
    """Every round of a benchmark: all models in turn, on the same tokens.

    Args:
        request: names, rounds and warm-up.
        tokens: those of the next round.
        generate: one generation of the model called so.
        report: told of every generation.
    """
    times: dict[str, list[Round]] = {name: [] for name in request.names}
    total, done = (request.warmup + request.rounds) * len(request.names), 0
    for counts, order in in_turns(request.names, request.warmup, request.rounds):
        drawn = tokens()
        for name in order:
            measured = generate(name, drawn)
            if counts:
                times[name].append(measured)
            done += 1
            report(done, total)
    return Rounds(times)
