"""How much of a difference rounding explains: one rule for layers, outputs and predictions.

A program is run twice in torch, once as it is and once with every value off by a random share as large as the runtime's rounding
(``compiler/execution/disturbed.py``). What that changes is the noise. A runtime may differ by a few times as much.
"""

from __future__ import annotations

__all__ = ["LEAST_NATS", "LEAST_RELATIVE", "NOISE_FACTOR", "rounding_of"]

NOISE_FACTOR = 3.0
"""How many times the noise a right runtime may differ: kernels round at more and other places than the imitation does."""
LEAST_RELATIVE = 2e-4
"""Relative difference of values that is never held against a runtime: sums of some thousand float32 products in another order."""
LEAST_NATS = 1e-3
"""Mean difference of log-probabilities that is never held against a runtime."""
_FLOAT32 = 2e-5
"""Relative error that imitates float32: some hundred roundings of 2^-24, so that activations on the border of two codes move as
often as in any order of summation, and the few that do in one run stand for those of another."""
_UNIT_ROUNDOFF = {"fp32": _FLOAT32, "fp16": 2.0**-11, "bf16": 2.0**-9}


def rounding_of(precision: str) -> float:
    """Largest relative error of a value in a runtime that computes in ``precision``: ``fp32``, ``fp16`` or ``bf16``."""
    return _UNIT_ROUNDOFF[precision]
