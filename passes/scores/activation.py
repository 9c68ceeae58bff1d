"""Activation: how strongly a position is driven on calibration text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from compile_sparse.compiler.axes.algebra import Axis, coords
from compile_sparse.compiler.axes.analysis import Analysis
from compile_sparse.compiler.axes.groups import Group
from compile_sparse.compiler.calibration import CalibrationStream
from compile_sparse.compiler.execute import Executor
from compile_sparse.compiler.progress import Progress

__all__ = ["activation_scores"]


def activation_scores(
    analysis: Analysis, groups: Sequence[Group], calibration: CalibrationStream, progress: Progress
) -> dict[Axis, torch.Tensor]:
    """``score[p] = sqrt(mean over tokens and consumers of x[p]^2)`` at the input of every consumer, float64, by leaf.

    ``x`` is the operand that is contracted over the axis (for an MLP, the input of the down projection). Batches carry no
    padding, so every token counts. Source: Minitron's activation-based width importance (arXiv:2407.14679), with the root
    mean square as the aggregate.
    """
    squares = {group.leaf: torch.zeros(group.size, dtype=torch.float64) for group in groups}
    counts = {group.leaf: torch.zeros(group.size, dtype=torch.float64) for group in groups}
    observers = _observers(analysis, groups, squares, counts)
    executor = Executor(analysis.program)
    with progress.task("score channels on calibration text", total=len(calibration)) as task:
        for inputs in calibration.feeds(analysis.program):
            executor.run(inputs, observe=observers)
            task.advance()
    return {leaf: (squares[leaf] / counts[leaf].clamp_min(1.0)).sqrt() for leaf in squares}


def _observers(
    analysis: Analysis, groups: Sequence[Group], squares: dict[Axis, torch.Tensor], counts: dict[Axis, torch.Tensor]
) -> dict[str, Callable[[torch.Tensor], None]]:
    """One callback per observed node; a node may feed several consumers and carry several groups, and is counted once each."""
    watched: dict[str, dict[int, None]] = {}
    for group in groups:
        for contact in group.consumers:
            watched.setdefault(contact.operand, {})[contact.dim] = None

    def observer(node: str, dims: Sequence[int]) -> Callable[[torch.Tensor], None]:
        label = analysis.labels[node]
        columns = [(dim, coords(axis)) for dim, axis in enumerate(label) if dim in dims and isinstance(axis, Axis)]

        def observe(value: torch.Tensor) -> None:
            for dim, found in columns:
                others = [other for other in range(value.ndim) if other != dim]
                norms = torch.linalg.vector_norm(value, dim=others, dtype=torch.float64) if others else value.double()
                rows = value.numel() / value.shape[dim]
                for leaf, index in found:
                    if leaf in squares:
                        present = index >= 0
                        squares[leaf].index_add_(0, index[present], norms[present].square())
                        counts[leaf].index_add_(0, index[present], torch.full_like(norms[present], rows))

        return observe

    return {node: observer(node, list(dims)) for node, dims in watched.items()}
