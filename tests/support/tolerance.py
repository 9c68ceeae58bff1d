"""How far two correct computations may be apart, derived from what they do."""

from __future__ import annotations

import torch

__all__ = ["fp32_tolerance"]


def fp32_tolerance(expected: torch.Tensor, width: int = 88, depth: int = 9) -> float:
    """Two float32 orders of summation of ``width`` terms differ by about ``eps * sqrt(width)`` of the value.

    ``depth`` GEMMs in a row (four per layer and lm_head) add up in the worst case.
    """
    return float(torch.finfo(torch.float32).eps * width**0.5 * depth * expected.abs().max())
