"""Values of the dense network, kept from when its run passes them until the last layer that asks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import torch

from compile_sparse.compiler.execution.calibration import CalibrationStream
from compile_sparse.compiler.execution.layerwise import LayerwiseExecutor
from compile_sparse.compiler.ir.program import Program

__all__ = ["DenseValues"]


class DenseValues:
    """What ``program`` computes on every batch, at places that are known beforehand.

    The program runs as far as somebody asks, and once in all. Parallel branches may ask for a value behind the place of the
    next, so all that were announced are kept as they are passed.

    Args:
        program: the dense program.
        calibration: text it runs on.
        names: node of each value that will be released, once per release. Names of no node are ignored.
    """

    def __init__(self, program: Program, calibration: CalibrationStream, names: Iterable[str]) -> None:
        self._nodes = {node.name: node for node in program.graph.nodes}
        self._awaited = Counter(name for name in names if name in self._nodes)
        self._kept: dict[str, list[torch.Tensor]] = {}
        self._run = LayerwiseExecutor(program, calibration.feeds(program))

    def of(self, name: str) -> Sequence[torch.Tensor]:
        """The value of every batch.

        Raises:
            KeyError: it was not announced, or has been released.
        """
        if name not in self._awaited:
            raise KeyError(f"{name} is no value of the dense network that was announced and not yet released")
        if not self._run.passed(self._nodes[name]):
            watch = {awaited: self._keeper(awaited) for awaited in self._awaited}
            self._run.advance(self._nodes[name], inclusive=True, watch=watch)
        return self._kept[name]

    def release(self, name: str) -> None:
        """Say that one of those who were to ask for ``name`` is done."""
        if name in self._awaited:
            self._awaited[name] -= 1
            if not self._awaited[name]:
                del self._awaited[name]
                self._kept.pop(name, None)

    def _keeper(self, name: str) -> Callable[[int, torch.Tensor], None]:
        values = self._kept.setdefault(name, [])
        return lambda batch, value: values.append(value)
