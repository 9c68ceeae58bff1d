"""Run a program on all of the calibration text and show values on the way."""

from __future__ import annotations

from collections.abc import Mapping

from compile_sparse.compiler.execution.calibration import CalibrationStream
from compile_sparse.compiler.execution.executor import Executor, Observer
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.progress import Progress

__all__ = ["observe_values"]


def observe_values(
    program: Program,
    observers: Mapping[str, Observer],
    calibration: CalibrationStream,
    progress: Progress,
    label: str,
) -> None:
    """Call each node's observer with its value on every batch, batches in order.

    One run of the text, one batch after the other: for accumulators that are small together. Memory is that of one batch's run
    and of the weights ``Executor`` keeps. Where accumulators are large, ``LayerwiseExecutor`` finishes one before the next.

    Args:
        program: what is run.
        observers: by node name.
        calibration: the text. Batches carry no padding, so every token counts.
        progress: one step per batch.
        label: what people are told.
    """
    executor = Executor(program)
    with progress.task(label, total=len(calibration)) as task:
        for inputs in calibration.feeds(program):
            executor.run(inputs, observe=observers)
            task.advance()
