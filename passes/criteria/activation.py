"""Activation: how strongly a position is driven on calibration text."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from compile_sparse.compiler.axes.algebra import Axis
from compile_sparse.compiler.axes.analysis import Analysis
from compile_sparse.compiler.axes.groups import Group
from compile_sparse.compiler.execution.calibration import CalibrationStream
from compile_sparse.compiler.progress import Progress
from compile_sparse.passes.criteria.consumers import contacts_of, input_power
from compile_sparse.passes.criteria.positions import add_positions, zeros

__all__ = ["activation_scores"]


def activation_scores(
    analysis: Analysis, groups: Sequence[Group], calibration: CalibrationStream, progress: Progress
) -> dict[Axis, torch.Tensor]:
    """``score[p] = sqrt(mean over tokens and consumers of x[p]^2)`` at the input of every consumer, float64, by leaf.

    ``x`` is the operand that is contracted over the axis (for an MLP, the input of the down projection); a value that several
    consumers read counts once. Source: Minitron's activation-based width importance (arXiv:2407.14679), with the root mean
    square as the aggregate.

    Raises:
        UsageError: CS1126 when no weight contracts a group.
    """
    contacts = contacts_of(groups, "activation")
    squares, counts = zeros(groups), zeros(groups)
    for power in input_power(analysis, contacts, calibration, progress, "score by activation").values():
        add_positions(squares, power.axis, power.squares)
        add_positions(counts, power.axis, torch.full_like(power.squares, power.rows))
    return {leaf: (squares[leaf] / counts[leaf].clamp_min(1.0)).sqrt() for leaf in squares}
