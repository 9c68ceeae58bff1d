"""Block influence: how much a unit turns the residual stream."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from compile_sparse.compiler.execution.calibration import CalibrationStream
from compile_sparse.compiler.execution.executor import Executor
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.progress import Progress
from compile_sparse.compiler.residual.units import Unit

__all__ = ["block_influence"]


def block_influence(
    program: Program, units: Sequence[Unit], calibration: CalibrationStream, progress: Progress
) -> list[float]:
    """``1 - cos(x, y)``, averaged over tokens, for the stream ``x`` before and ``y`` after each unit; lowest goes first.

    One run of the calibration text. A unit without ``end`` is a branch: ``y = x + f(x)``. Source: ShortGPT
    (arXiv:2403.03853).
    """
    totals = [0.0] * len(units)
    rows = 0
    executor = Executor(program)
    with progress.task("score layers by block influence", total=len(calibration)) as task:
        for inputs in calibration.feeds(program):
            seen: dict[str, torch.Tensor] = {}
            executor.run(inputs, observe=_keep(units, seen))
            for index, unit in enumerate(units):
                before = seen[unit.start].flatten(0, -2)
                after = before + seen[unit.branches[0].output].flatten(0, -2) if unit.end is None else seen[unit.end]
                cosine = torch.cosine_similarity(before.double(), after.flatten(0, -2).double(), dim=-1)
                totals[index] += float((1.0 - cosine).sum())
            rows += before.shape[0]
            task.advance()
    return [total / rows for total in totals]


def _keep(units: Sequence[Unit], seen: dict[str, torch.Tensor]) -> dict[str, Callable[[torch.Tensor], None]]:
    names = {name for unit in units for name in (unit.start, unit.end or unit.branches[0].output)}
    return {name: lambda value, name=name: seen.__setitem__(name, value) for name in names}  # type: ignore[misc]
