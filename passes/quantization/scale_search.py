"""Scales that are a little too short for the largest elements, where that leaves less error in all."""

from __future__ import annotations

from dataclasses import replace

import torch

from compile_sparse.compiler.ir.quantization_grid import QuantizationGrid

__all__ = ["FACTORS", "searched_grid", "squared_errors"]

FACTORS = tuple(1.0 - 0.8 * step / 19 for step in range(20))
"""What scales are multiplied by: 1.0 to 0.2, as in GPTQ's and AWQ's implementations. At 1.0 nothing saturates."""
ELEMENTS_AT_ONCE = 1 << 18
"""Of the weight: the search's temporaries then stay in a processor's cache."""


def searched_grid(rows: torch.Tensor, grid: QuantizationGrid, power: torch.Tensor) -> QuantizationGrid:
    """``grid`` with every scale shortened by the one of ``FACTORS`` that leaves least error, each on its own.

    A shorter scale rounds most elements better and lets the largest saturate. How much an element's error counts is its input's
    mean square: ``sum_j H_jj (W_ij - q_ij s)^2`` estimates the squared error of the layer's output, and keeps exact what large
    activations are multiplied with. Zero points stay: the range shrinks towards zero from both ends.

    Integers only. The steps of fp8 are relative, so that a shorter scale gains nothing and saturates; fp4 is left as it is.

    Args:
        rows: ``[N, K]`` float32.
        grid: the scales that reach as far as the weight; none of them gets worse.
        power: ``E[x_j^2]``, ``[K]``.
    """
    if grid.format.kind != "int":
        return grid
    size = max(1, ELEMENTS_AT_ONCE // max(rows.shape[1], 1))
    weights, scales = power.to(torch.float32), []
    for start in range(0, rows.shape[0], size):
        part, here = rows[start : start + size], grid.of_channels(slice(start, start + size))
        best, least = here.scale.clone(), squared_errors(part, here, weights)
        for factor in FACTORS[1:]:
            shorter = here.scaled(factor)
            errors = squared_errors(part, shorter, weights)
            better = errors < least
            best, least = torch.where(better, shorter.scale, best), torch.where(better, errors, least)
        scales.append(best)
    return replace(grid, scale=torch.cat(scales)) if scales else grid


def squared_errors(rows: torch.Tensor, grid: QuantizationGrid, power: torch.Tensor) -> torch.Tensor:
    """``sum_j power_j (W_ij - q_ij s)^2`` below each scale of ``grid``, of the scale's shape, float32. Not for blocks.

    Args:
        rows: ``[N, K]`` float32.
        grid: of integers.
        power: ``[K]`` float32.
    """
    errors = grid.values(grid.codes(rows)).sub_(rows).square_().mul_(power)
    if not (group := grid.format.group):
        return errors.sum(1)
    return torch.nn.functional.pad(errors, (0, -rows.shape[1] % group)).unflatten(1, (-1, group)).sum(2)
