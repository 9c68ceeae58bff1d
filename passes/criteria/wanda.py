"""Wanda for structures: weights times how strongly their inputs are driven, at every consumer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from compile_sparse.compiler.axes.algebra import Axis
from compile_sparse.compiler.axes.analysis import Analysis
from compile_sparse.compiler.axes.groups import Group
from compile_sparse.compiler.execution.calibration import CalibrationStream
from compile_sparse.compiler.progress import Progress
from compile_sparse.passes.criteria.consumers import contacts_of, contracted_dim, input_power
from compile_sparse.passes.criteria.positions import add_positions, zeros

__all__ = ["fasp_scores", "wanda_scores"]


def wanda_scores(
    analysis: Analysis, groups: Sequence[Group], calibration: CalibrationStream, progress: Progress
) -> dict[Axis, torch.Tensor]:
    """``score[p] = sqrt(sum over consumers, k in p and n of (|W[n, k]| rms(x[k]))^2)``, float64, by leaf.

    ``k`` runs over the contracted columns that position ``p`` owns (all columns of a head), ``x`` over the consumer's input on
    calibration text. ``|W| ||x||`` is Wanda's score of one weight (arXiv:2306.11695), the root of the squared output error
    of losing it; squared errors of a column add up, hence the sum of squares. Correlation between columns is ignored.
    Weights are read one at a time.

    Raises:
        UsageError: CS1126 when no weight contracts a group.
    """
    squares = zeros(groups)
    for axis, weight, rms in _columns(analysis, groups, calibration, progress, "wanda"):
        add_positions(squares, axis, (_column_norm(weight, 2) * rms).square())
    return {leaf: total.sqrt() for leaf, total in squares.items()}


def fasp_scores(
    analysis: Analysis, groups: Sequence[Group], calibration: CalibrationStream, progress: Progress
) -> dict[Axis, torch.Tensor]:
    """``score[p] = sum over consumers and k in p of ||W[:, k]||_1 rms(x[k])``, float64, by leaf.

    Wanda's scores summed over each column of the consumer, as in FASP (arXiv:2501.09412) and FLAP's Wanda-sp
    (arXiv:2312.11983): an upper bound on the mean absolute change of the outputs, where ``wanda`` is their energy.

    Raises:
        UsageError: CS1126 when no weight contracts a group.
    """
    sums = zeros(groups)
    for axis, weight, rms in _columns(analysis, groups, calibration, progress, "fasp"):
        add_positions(sums, axis, _column_norm(weight, 1) * rms)
    return sums


def _columns(
    analysis: Analysis,
    groups: Sequence[Group],
    calibration: CalibrationStream,
    progress: Progress,
    criterion: str,
) -> Iterator[tuple[Axis, torch.Tensor, torch.Tensor]]:
    """For every consumer its contracted axis (``K`` positions), its weight as ``[K, others]``, and ``rms(x)`` as ``[K]``."""
    contacts = contacts_of(groups, criterion)
    power = input_power(analysis, contacts, calibration, progress, f"score by {criterion}")
    for contact in contacts:
        driven = power[contact.operand, contact.dim]
        weight = analysis.program.weights.load(contact.weight)
        yield driven.axis, weight.movedim(contracted_dim(analysis, contact), 0).flatten(1), driven.rms


def _column_norm(columns: torch.Tensor, order: int) -> torch.Tensor:
    """Norm of the given order of every row of ``[K, others]``, float64."""
    return torch.linalg.vector_norm(columns, ord=order, dim=1, dtype=torch.float64)
