"""From values along a dimension to values along the leaves it is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from compile_sparse.compiler.axes.algebra import Axis, coords, leaves
from compile_sparse.compiler.axes.analysis import Analysis
from compile_sparse.compiler.axes.groups import Group

__all__ = ["add_positions", "axis_of", "coupled_dims", "coupled_parameters", "zeros"]


def zeros(groups: Sequence[Group]) -> dict[Axis, torch.Tensor]:
    """A float64 zero per position of every group, by leaf."""
    return {group.leaf: torch.zeros(group.size, dtype=torch.float64) for group in groups}


def add_positions(totals: Mapping[Axis, torch.Tensor], axis: Axis, values: torch.Tensor) -> None:
    """Add ``values [n]``, one per position of a dimension labelled ``axis``, to each leaf of ``totals`` that is in it.

    ``totals[leaf][p]`` gains the sum of the values at the positions whose coordinate along the leaf is ``p``.
    """
    for leaf, index in coords(axis):
        if leaf in totals:
            present = index >= 0
            totals[leaf].index_add_(0, index[present], values[present].to(totals[leaf].dtype))


def axis_of(analysis: Analysis, node: str, dim: int) -> Axis:
    """Label of one dimension of a single-valued node."""
    axis = analysis.labels[node][dim]
    if not isinstance(axis, Axis):
        raise TypeError(f"{node} has several values")
    return axis


def coupled_dims(analysis: Analysis, node: str, wanted: Mapping[Axis, torch.Tensor]) -> list[tuple[int, Axis]]:
    """``(dimension, axis)`` of a single-valued node for the dimensions that contain a leaf of ``wanted``."""
    return [
        (dim, axis)
        for dim, axis in enumerate(analysis.labels[node])
        if isinstance(axis, Axis) and any(leaf in wanted for leaf in leaves(axis))
    ]


def coupled_parameters(analysis: Analysis, wanted: Mapping[Axis, torch.Tensor]) -> dict[str, list[tuple[int, Axis]]]:
    """Stored floating-point parameters that a leaf of ``wanted`` runs through, each once, with ``coupled_dims``."""
    program, found = analysis.program, dict[str, list[tuple[int, Axis]]]()
    for name, binding in program.bindings.items():
        if binding.kind == "parameter" and program.weights[binding.tensor].dtype.is_floating_point:
            dims = coupled_dims(analysis, name, wanted)
            if dims:
                found.setdefault(binding.tensor, dims)
    return found
