"""Magnitude: how large the weights of a position are, over everything it couples."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from compile_sparse.compiler.axes.algebra import Axis
from compile_sparse.compiler.axes.analysis import Analysis
from compile_sparse.compiler.axes.groups import Group
from compile_sparse.compiler.progress import Progress
from compile_sparse.passes.criteria.positions import add_positions, coupled_parameters, zeros

__all__ = ["magnitude_scores"]


def magnitude_scores(analysis: Analysis, groups: Sequence[Group], progress: Progress) -> dict[Axis, torch.Tensor]:
    """``score[p] = sqrt(sum over coupled tensors of sum of w^2 in the slices of position p)``, float64, by leaf.

    Parameters only; buffers and integer codes do not count. Tensors are read one at a time, each once.
    Source: group-wise L2 norm as in DepGraph (arXiv:2301.12900).
    """
    squares = zeros(groups)
    reading = coupled_parameters(analysis, squares)
    with progress.task("score by weight magnitude", total=len(reading)) as task:
        for tensor, dims in reading.items():
            value = analysis.program.weights.load(tensor)
            for dim, axis in dims:
                others = [other for other in range(value.ndim) if other != dim]
                norms = torch.linalg.vector_norm(value, dim=others, dtype=torch.float64) if others else value.double()
                add_positions(squares, axis, norms.square())
            del value
            task.advance()
    return {leaf: total.sqrt() for leaf, total in squares.items()}
