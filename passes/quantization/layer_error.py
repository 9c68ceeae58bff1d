"""How far a scheme puts the output of one linear layer off."""

from __future__ import annotations

import torch

from compile_sparse.compiler.ir.quantization_schemes import Scheme
from compile_sparse.passes.quantization.scales import as_stored, fitted_grid

__all__ = ["layer_error"]

ours = torch.ops.compile_sparse
SMALL_ROW = 0.1
"""Rows below this share of the median length are measured against it: attention makes nearly nothing of some tokens' values, and
nobody reads how exact that is."""


def layer_error(
    x: torch.Tensor,
    rows: torch.Tensor,
    scheme: Scheme,
    *,
    peak: float | None = None,
    rounds_groups: bool = False,
    differences: bool = False,
    bias: torch.Tensor | None = None,
    output_peak: float | None = None,
) -> float:
    """Mean over tokens of ``|y' - y| / |y|``, with ``y = x W^T`` and ``y'`` of the rounded input and weight; 0 is exact.

    The mean over tokens and not the ratio of sums: one token with huge activations would be all of a sum, while it is the others
    that a shared scale destroys. The weight is rounded to nearest on fitted scales, whatever quantizer will choose its codes.

    Args:
        x: ``[tokens, K]`` float32.
        rows: ``W``, ``[N, K]`` float32.
        scheme: of both. Integer weights; activations in floating point, or ``int8`` and ``int8-static``.
        peak: magnitude that the largest code of a fixed scale stands for.
        rounds_groups: kernels for weights alone round their inputs to 8 bits, one scale per group of weights.
        differences: only differences between the outputs of a token matter, as of logits.
        bias: ``[N]``, part of ``y`` and not rounded.
        output_peak: ``y'`` is rounded to int8 as well, with a fixed scale whose largest code stands for this magnitude.
    """
    grid = fitted_grid(rows, scheme.weights, torch.float32)
    rounded = grid.values(grid.codes(rows))
    exact, found = x @ rows.t(), _rounded(x, scheme, peak, rounds_groups) @ rounded.t()
    if bias is not None:
        exact, found = exact + bias, found + bias
    if output_peak is not None:
        found = ours.fake_quantize(found, "int8-static", _fixed(output_peak))
    if differences:
        exact, found = (y - y.mean(1, keepdim=True) for y in (exact, found))
    length = exact.norm(dim=1)
    floor = SMALL_ROW * length.median()
    away = (found - exact).norm(dim=1) / torch.maximum(length, floor).clamp_min(torch.finfo(torch.float32).tiny)
    return float(away.mean())


def _fixed(peak: float) -> torch.Tensor:
    return as_stored(torch.tensor([(peak or 1.0) / 127.0]))


def _rounded(x: torch.Tensor, scheme: Scheme, peak: float | None, rounds_groups: bool) -> torch.Tensor:
    if scheme.static:
        return ours.fake_quantize(x, scheme.activations, _fixed(peak or 0.0))  # type: ignore[no-any-return]
    if scheme.activations:
        return ours.fake_quantize(x, scheme.activations)  # type: ignore[no-any-return]
    group = scheme.weights.group
    if not rounds_groups or not group:
        return x
    padded = torch.nn.functional.pad(x, (0, -x.shape[1] % group)).unflatten(1, (-1, group))
    return ours.fake_quantize(padded, "int8").flatten(1)[:, : x.shape[1]]  # type: ignore[no-any-return]
