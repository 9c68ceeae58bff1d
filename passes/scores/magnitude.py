"""Magnitude: how large the weights of a position are, over everything it couples."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from compile_sparse.compiler.axes.algebra import Axis, coords, leaves
from compile_sparse.compiler.axes.analysis import Analysis
from compile_sparse.compiler.axes.groups import Group
from compile_sparse.compiler.progress import Progress

__all__ = ["magnitude_scores"]


def magnitude_scores(analysis: Analysis, groups: Sequence[Group], progress: Progress) -> dict[Axis, torch.Tensor]:
    """``score[p] = sqrt(sum over coupled tensors of sum of w^2 in the slices of position p)``, float64, by leaf.

    Parameters only; buffers and integer codes do not count. Tensors are read one at a time, each once.
    Source: group-wise L2 norm as in DepGraph (arXiv:2301.12900).
    """
    program = analysis.program
    squares = {group.leaf: torch.zeros(group.size, dtype=torch.float64) for group in groups}
    reading = [
        (name, binding.tensor)
        for name, binding in program.bindings.items()
        if binding.kind == "parameter"
        and program.weights[binding.tensor].dtype.is_floating_point
        and any(leaf in squares for axis in analysis.labels[name] if isinstance(axis, Axis) for leaf in leaves(axis))
    ]
    with progress.task("score channels by weight magnitude", total=len(reading)) as task:
        for name, tensor in reading:
            value = program.weights.load(tensor)
            for dim, axis in enumerate(analysis.labels[name]):
                if not isinstance(axis, Axis) or not any(leaf in squares for leaf in leaves(axis)):
                    continue
                others = [other for other in range(value.ndim) if other != dim]
                norms = torch.linalg.vector_norm(value, dim=others, dtype=torch.float64) if others else value.double()
                for leaf, index in coords(axis):
                    if leaf in squares:
                        present = index >= 0
                        squares[leaf].index_add_(0, index[present], norms[present].square())
            del value
            task.advance()
    return {leaf: total.sqrt() for leaf, total in squares.items()}
