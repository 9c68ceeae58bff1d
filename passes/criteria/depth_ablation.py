"""Ablation: what the model loses on calibration text when a unit is gone, one unit at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from compile_sparse.compiler.execution.calibration import CalibrationStream
from compile_sparse.compiler.execution.executor import Executor
from compile_sparse.compiler.execution.training import language_loss
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.progress import Progress
from compile_sparse.compiler.residual.remove import drop_branches
from compile_sparse.compiler.residual.units import Unit

__all__ = ["MAX_WINDOWS", "greedy_ablation", "loss_measure"]

MAX_WINDOWS = 32
"""Windows of calibration text a candidate is judged on: all see the same ones, so few are enough to rank them."""

Measure = Callable[[Program], float]


def greedy_ablation(
    program: Program, units: Sequence[Unit], count: int, calibration: CalibrationStream, progress: Progress
) -> tuple[list[Unit], list[float]]:
    """Remove ``count`` units one after the other, each time the one without which the loss is lowest.

    The loss is next-token cross-entropy in nats for decoders. Other models have no labels, so it is the squared distance of
    their outputs to those of ``program``, relative to their size. ``n + (n - 1) + ...`` evaluations of at most ``MAX_WINDOWS``
    windows: far more than block influence needs, for a better choice. Source: SLEB (arXiv:2402.09025).

    Returns:
        Units in the order of removal, and the loss after each.
    """
    measure = loss_measure(program, calibration)
    left, removed, losses = list(units), [], []  # type: ignore[var-annotated]
    with progress.task("score layers by ablation", total=sum(len(units) - i for i in range(count))) as task:
        for _ in range(count):
            trials = []
            for unit in left:
                branches = [branch for gone in (*removed, unit) for branch in gone.branches]
                trials.append(measure(drop_branches(program, branches).program))
                task.advance()
            best = min(range(len(left)), key=trials.__getitem__)
            removed.append(left.pop(best))
            losses.append(trials[best])
    return removed, losses


def loss_measure(program: Program, calibration: CalibrationStream) -> Measure:
    """What candidates for the place of ``program`` lose on a sample of the text; see ``greedy_ablation``."""
    text = _sample(calibration)
    return _cross_entropy(text) if program.kind == "decoder" else _distance(program, text)


def _sample(calibration: CalibrationStream) -> CalibrationStream:
    """At most ``MAX_WINDOWS`` windows, spread evenly."""
    windows = calibration.windows
    if len(windows) <= MAX_WINDOWS:
        return calibration
    return replace(calibration, windows=tuple(windows[i * len(windows) // MAX_WINDOWS] for i in range(MAX_WINDOWS)))


def _cross_entropy(text: CalibrationStream) -> Measure:
    def measure(candidate: Program) -> float:
        executor, total, predicted = Executor(candidate), 0.0, 0
        for inputs in text.feeds(candidate):
            ids = inputs["input_ids"]
            count = ids.shape[0] * (ids.shape[1] - 1)
            total += float(language_loss(candidate, executor.run(inputs), inputs)) * count
            predicted += count
        return total / predicted

    return measure


def _distance(dense: Program, text: CalibrationStream) -> Measure:
    executor = Executor(dense)
    wanted = [executor.run(inputs) for inputs in text.feeds(dense)]
    size = sum(float(value.double().square().sum()) for outputs in wanted for value in outputs.values())

    def measure(candidate: Program) -> float:
        executor, error = Executor(candidate), 0.0
        for inputs, expected in zip(text.feeds(candidate), wanted, strict=True):
            got = executor.run(inputs)
            error += sum(float((got[name] - value).double().square().sum()) for name, value in expected.items())
        return error / size

    return measure
