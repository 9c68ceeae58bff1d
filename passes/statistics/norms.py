"""How strongly each input feature of a GEMM is driven on calibration text."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from compile_sparse.compiler.execution.calibration import CalibrationStream
from compile_sparse.compiler.execution.executor import Observer
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.progress import Progress
from compile_sparse.passes.statistics.observation import observe_values

__all__ = ["feature_norms"]

Place = tuple[str, int]


def feature_norms(
    program: Program, places: Iterable[Place], calibration: CalibrationStream, progress: Progress
) -> dict[Place, torch.Tensor]:
    """``||x_k||_2`` over every other dimension and all windows, ``[K]`` float64, by ``(node name, dimension)``.

    One run of the text; memory is that of a run and ``8 K`` bytes per place. Squares are summed in float64. Batches carry no
    padding, so every token counts.

    Args:
        program: what is run.
        places: values, each with the dimension (counted from the end, ``-1`` for the last) whose K features are told apart. A
            place that is named twice is observed once.
        calibration: the text.
        progress: told of every batch.
    """
    wanted = tuple(dict.fromkeys(places))
    names = {name for name, _ in wanted}
    shapes = {node.name: node.meta["val"].shape for node in program.graph.nodes if node.name in names}
    squares = {(name, dim): torch.zeros(int(shapes[name][dim]), dtype=torch.float64) for name, dim in wanted}

    def observer(name: str) -> Observer:
        dims = [dim for node, dim in wanted if node == name]

        def observe(value: torch.Tensor) -> None:
            for dim in dims:
                rows = value.movedim(dim, -1).reshape(-1, value.shape[dim])
                squares[name, dim] += torch.linalg.vector_norm(rows, dim=0, dtype=torch.float64).square()

        return observe

    observers = {name: observer(name) for name in names}
    observe_values(program, observers, calibration, progress, "measure input norms")
    return {place: total.sqrt() for place, total in squares.items()}
