"""Numbers with honest error bars. Pure functions of measurements; nothing here runs a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Estimate", "percentiles", "perplexity_ratio", "ratio_of_rounds", "t_quantile_975"]

# Two-sided 95 % quantiles of Student's t by degrees of freedom (any table); beyond 30 the expansion below is exact to 1e-3.
_T_975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
_Z_975 = 1.959964


@dataclass(frozen=True)
class Estimate:
    """A ratio, compiled over baseline, and its 95 % confidence interval."""

    value: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float | list[float]]:
        """``{"value", "ci95"}`` as in ``report.json``."""
        return {"value": self.value, "ci95": [self.low, self.high]}


def t_quantile_975(degrees: int) -> float:
    """97.5 % quantile of Student's t (Cornish-Fisher expansion beyond 30 degrees of freedom)."""
    if degrees < 1:
        raise ValueError("a confidence interval needs at least two values")
    if degrees <= len(_T_975):
        return _T_975[degrees - 1]
    z = _Z_975
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)


def ratio_of_rounds(baseline: Sequence[float], compiled: Sequence[float]) -> Estimate:
    """Ratio compiled / baseline of a positive quantity measured in alternating rounds.

    Round ``i`` of one was measured next to round ``i`` of the other, so slow drift of the machine cancels in
    ``log(compiled_i / baseline_i)``. The interval is Student's t on these logarithms: ``exp(mean +- t s / sqrt(n))``. Valid
    for rates (tokens/s) and for times or sizes alike.

    Raises:
        ValueError: fewer than two rounds, unequal numbers of rounds, or a value that is not positive.
    """
    a, b = np.asarray(baseline, dtype=np.float64), np.asarray(compiled, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1 or a.size < 2:
        raise ValueError(f"need at least two paired rounds, got {a.size} and {b.size}")
    if not (np.all(a > 0) and np.all(b > 0) and np.all(np.isfinite(a)) and np.all(np.isfinite(b))):
        raise ValueError("every round must be positive and finite")
    logs = np.log(b / a)
    mean = float(logs.mean())
    half = t_quantile_975(logs.size - 1) * float(logs.std(ddof=1)) / float(np.sqrt(logs.size))
    return Estimate(float(np.exp(mean)), float(np.exp(mean - half)), float(np.exp(mean + half)))


def perplexity_ratio(
    baseline_nll: Sequence[float],
    compiled_nll: Sequence[float],
    tokens: Sequence[int],
    *,
    resamples: int = 2_000,
    seed: int = 0,
) -> Estimate:
    """Perplexity compiled / baseline over windows that both models saw.

    ``value = exp(sum_w (compiled_w - baseline_w) / sum_w tokens_w)``: token weighted, so a short window does not count as
    much as a long one. The interval is a paired percentile bootstrap over windows (windows, not tokens, are independent).

    Args:
        baseline_nll, compiled_nll: summed negative log-likelihood per window, in nats.
        tokens: predicted tokens per window, positive.
        resamples: bootstrap draws.
        seed: of the draws.

    Raises:
        ValueError: no windows, unequal lengths, or a window without tokens.
    """
    if not len(baseline_nll) == len(compiled_nll) == len(tokens) > 0:
        raise ValueError("need the same, positive number of windows for both models")
    difference = np.asarray(compiled_nll, dtype=np.float64) - np.asarray(baseline_nll, dtype=np.float64)
    weight = np.asarray(tokens, dtype=np.float64)
    if not np.all(weight > 0):
        raise ValueError("every window must predict at least one token")
    draws = np.random.default_rng(seed).integers(0, difference.size, size=(resamples, difference.size))
    means = difference[draws].sum(axis=1) / weight[draws].sum(axis=1)
    low, high = np.exp(np.quantile(means, [0.025, 0.975]))
    return Estimate(float(np.exp(difference.sum() / weight.sum())), float(low), float(high))


def percentiles(values: Sequence[float]) -> Mapping[str, float]:
    """``p50``, ``p95`` and ``p99`` by linear interpolation.

    Raises:
        ValueError: no values.
    """
    if len(values) == 0:
        raise ValueError("percentiles of nothing")
    p50, p95, p99 = np.percentile(np.asarray(values, dtype=np.float64), [50, 95, 99])
    return {"p50": float(p50), "p95": float(p95), "p99": float(p99)}
