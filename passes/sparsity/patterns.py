"""Set the weights of lowest score to zero in a pattern. Ties keep the first in memory order at zero."""

from __future__ import annotations

import torch

from compile_sparse.compiler.ir.sparsity_pattern import SparsityPattern

__all__ = ["apply_pattern"]


def apply_pattern(
    weight: torch.Tensor, pattern: SparsityPattern, axis: int, feature_norms: torch.Tensor | None = None
) -> torch.Tensor:
    """A copy of ``weight`` with the pattern's zeros.

    Args:
        weight: ``[N, K]``, ``[K, N]`` or ``[N, K, *kernel]``, of a shape that the pattern fits.
        pattern: which zeros.
        axis: the contraction dimension, of size K.
        feature_norms: ``[K]``; with it the score is ``|W| * norm`` and an unstructured share is taken of every output row
            (arXiv:2306.11695), without it the score is ``|W|`` and the share is taken of the whole tensor.
    """
    rows = weight.movedim(axis, -1)
    scores = rows.abs() if feature_norms is None else rows.abs() * feature_norms.to(weight.dtype)
    if pattern.run:
        kept = _lowest_zeroed(
            rows.reshape(-1, pattern.run), scores.reshape(-1, pattern.run), pattern.run - pattern.kept
        )
    elif pattern.rows:
        return _lowest_blocks_zeroed(weight, scores.movedim(-1, axis), pattern)
    elif feature_norms is None:  # in the order of memory, which decides between equal magnitudes
        count = round(weight.numel() * pattern.zero_fraction)
        return _lowest_zeroed(weight.reshape(1, -1), weight.abs().reshape(1, -1), count).view(weight.shape)
    else:
        kept = _lowest_zeroed(rows, scores, round(rows.shape[-1] * pattern.zero_fraction))
    return kept.reshape(rows.shape).movedim(-1, axis).contiguous()


def _lowest_zeroed(rows: torch.Tensor, scores: torch.Tensor, count: int) -> torch.Tensor:
    """``rows [R, C]`` with the ``count`` elements of lowest score of every row at zero."""
    return rows.scatter(1, scores.argsort(dim=1, stable=True)[:, :count], 0.0)


def _lowest_blocks_zeroed(weight: torch.Tensor, scores: torch.Tensor, pattern: SparsityPattern) -> torch.Tensor:
    def blocks(matrix: torch.Tensor) -> torch.Tensor:
        return matrix.unflatten(1, (-1, pattern.columns)).unflatten(0, (-1, pattern.rows))

    size = blocks(scores).sum((1, 3))
    keep = torch.ones(size.numel(), dtype=torch.bool)
    keep[size.flatten().argsort(stable=True)[: round(size.numel() * pattern.zero_fraction)]] = False
    return (blocks(weight) * keep.view(size.shape)[:, None, :, None]).view(weight.shape)
