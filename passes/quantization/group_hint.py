"""Say when smaller groups would store a model's weights much more exactly."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch

from compile_sparse.compiler.diagnostics import Diagnostic
from compile_sparse.compiler.ir.quantization_schemes import SCHEMES, WeightFormat
from compile_sparse.passes.quantization.scale_search import squared_errors
from compile_sparse.passes.quantization.scales import fitted_grid
from compile_sparse.passes.quantization.weights import Weight

__all__ = ["OUTLIERS", "group_hint"]

OUTLIERS = 2.0
"""Least ratio of squared errors that is worth a word. Groups of 32 instead of 128 leave 1.44 times less of normally distributed
weights, in any model; Student's t with 4 degrees of freedom gives 2.2. Twice means that single outliers decide the scales."""
WEIGHTS = 16
CHANNELS = 32
"""How many weights are looked at, and how many channels of each, evenly spread: most of what it costs is reading them."""


def group_hint(
    weights: Mapping[tuple[str, int], Weight], scheme: str, offered: Collection[str]
) -> tuple[Diagnostic, ...]:
    """A note when the scheme with groups of 32 would leave less than half of the weights' squared error.

    Args:
        weights: those that are quantized; their values are read.
        scheme: how. Only one in groups of 128 that has a twin in groups of 32 is looked at.
        offered: schemes that the target runs; no other is recommended.
    """
    twin = next((name for name in offered if _is_twin(SCHEMES[name].weights, SCHEMES[scheme].weights)), None)
    if twin is None or SCHEMES[twin].activations != SCHEMES[scheme].activations:
        return ()
    keys, here, there = list(weights), 0.0, 0.0
    for place in sorted({index * len(keys) // WEIGHTS for index in range(WEIGHTS)}):
        weight = weights[keys[place]]
        rows = _some_channels(weight)
        energy = max(float(rows.square().sum()), torch.finfo(torch.float32).tiny)
        here += _error(rows, SCHEMES[scheme].weights) / energy
        there += _error(rows, SCHEMES[twin].weights) / energy
    if here < OUTLIERS * there:
        return ()
    why = (
        f"Groups of 128 leave {here / there:.1f} times the squared error of the weights that groups of 32 would: single large "
        f"weights decide the scales of their groups (1.4 times is usual)."
    )
    return (Diagnostic("quantize.scheme", "CS2211", why, f"Choose {twin} for better quality.", severity="note"),)


def _is_twin(small: WeightFormat, large: WeightFormat) -> bool:
    same = (small.kind, small.bits, small.symmetric) == (large.kind, large.bits, large.symmetric)
    return same and (small.group, large.group) == (32, 128)


def _some_channels(weight: Weight) -> torch.Tensor:
    value = weight.source.load()
    rows = value if weight.axis == 1 else value.t()
    return rows[:: max(1, rows.shape[0] // CHANNELS)].float()


def _error(rows: torch.Tensor, fmt: WeightFormat) -> float:
    grid = fitted_grid(rows, fmt, torch.float32)
    return float(squared_errors(rows, grid, rows.new_ones(rows.shape[1])).sum())
