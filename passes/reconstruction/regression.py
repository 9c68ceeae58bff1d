"""Ridge regression of a linear layer on streamed activations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from compile_sparse.compiler.errors import ModelError

__all__ = ["DAMPINGS", "Correction", "Regression"]

DAMPINGS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Ridge penalties tried, as shares of each input's own mean square: the scale that an input happens to have does not matter."""
FLOOR = 1e-9
"""Added to every penalty, as a share of the mean over inputs: those that the text never drives keep their weights."""
HELD_OUT = 5
"""One row in this many only judges the penalties."""


@dataclass(frozen=True)
class Correction:
    """What a layer should change.

    Attributes:
        weight: ``D: [N, K]`` float64; None to leave the weight alone.
        bias: ``[N]`` float64; None without an intercept.
        missing, left: ``sum w |r|^2`` over all rows, before and after.
    """

    weight: torch.Tensor | None
    bias: torch.Tensor | None
    missing: float
    left: float


class _Sums:
    """``sum x x^T``, ``sum x r^T`` and ``sum |r|^2`` over rows, float64."""

    def __init__(self, inputs: int, outputs: int) -> None:
        self.second = torch.zeros(inputs, inputs, dtype=torch.float64)
        self.cross = torch.zeros(inputs, outputs, dtype=torch.float64)
        self.missing = 0.0

    def add(self, x: torch.Tensor, missing: torch.Tensor) -> None:
        self.second += (x.t() @ x).double()
        self.cross += (x.t() @ missing).double()
        self.missing += float(missing.double().square().sum())

    def left(self, solution: torch.Tensor) -> float:
        """``sum |r - D x|^2`` for ``D^T = solution: [K, N]``."""
        explained = 2.0 * float((solution * self.cross).sum()) - float((solution * (self.second @ solution)).sum())
        return self.missing - explained


class Regression:
    """Least-squares correction ``D`` of a weight: ``min_D  sum_t w_t |r_t - D x_t|^2 + damp sum_j C_jj |D_j|^2``.

    ``x_t: [K]`` is what the layer receives, ``r_t: [N]`` what its output lacks. The correction is shrunk towards zero, so a
    direction the calibration text never excites keeps its old weight. How much, the text itself says: a fifth of every batch is
    held out, the penalty that repairs it best is taken, and the final fit uses all rows. Where no penalty repairs what was held
    out, there is too little text for this layer and its weight stays. One Cholesky factorisation of ``C = sum w x x^T [K, K]``
    per penalty serves all ``N`` rows (layer-wise reconstruction: arXiv:2208.11580).

    Args:
        inputs, outputs: ``K`` and ``N``.
        intercept: also fit a shift of the output; it is not shrunk.
    """

    def __init__(self, inputs: int, outputs: int, *, intercept: bool) -> None:
        self._inputs, self._intercept = inputs, intercept
        size = inputs + int(intercept)
        self._fitted, self._held = _Sums(size, outputs), _Sums(size, outputs)

    def add(self, x: torch.Tensor, missing: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Accumulate rows ``x: [T, K]`` and ``missing: [T, N]``, which count by ``weights: [T, 1]``. GEMMs in float32, sums in
        float64.
        """
        x, missing = x.float(), missing.float()
        if self._intercept:
            x = torch.cat([x, x.new_ones(x.shape[0], 1)], dim=1)
        if weights is not None:
            x, missing = x * weights.sqrt(), missing * weights.sqrt()
        # Neighbouring rows are one text: a contiguous part, not every fifth. The tail, because first tokens are special.
        fitted = x.shape[0] - x.shape[0] // HELD_OUT
        self._fitted.add(x[:fitted], missing[:fitted])
        self._held.add(x[fitted:], missing[fitted:])

    def solve(self, dampings: Sequence[float] = DAMPINGS) -> Correction:
        """The correction with the penalty that is best on held-out rows.

        Raises:
            ModelError: CS2503 when the activations are not finite.
        """
        missing = self._fitted.missing + self._held.missing
        if not (math.isfinite(missing) and bool(torch.isfinite(self._fitted.second).all())):
            raise ModelError(
                "CS2503",
                "A layer cannot be refitted.",
                why="Activations on the calibration text are not finite.",
                hint="Check the model's weights, or set compensation: none.",
            )
        errors = {damping: self._held.left(self._solution([self._fitted], damping)) for damping in dampings}
        best = min(errors, key=errors.__getitem__)
        if errors[best] >= self._held.missing:
            return Correction(None, None, missing, missing)
        both = [self._fitted, self._held]
        solution = self._solution(both, best)
        left = self._left(solution)
        if not self._intercept:
            return Correction(solution.t(), None, missing, left)
        return Correction(solution[:-1].t(), solution[-1], missing, left)

    def mean_shift(self) -> Correction:
        """The intercept alone, the (weighted) mean of ``r``. Needs ``intercept``."""
        solution = torch.zeros_like(self._fitted.cross)
        count = self._fitted.second[-1, -1] + self._held.second[-1, -1]
        solution[-1] = (self._fitted.cross[-1] + self._held.cross[-1]) / count
        return Correction(None, solution[-1], self._fitted.missing + self._held.missing, self._left(solution))

    def _left(self, solution: torch.Tensor) -> float:
        return self._fitted.left(solution) + self._held.left(solution)

    def _solution(self, parts: Sequence[_Sums], damping: float) -> torch.Tensor:
        """``(C + damp)^-1 sum x r^T: [K, N]``."""
        second = torch.stack([part.second for part in parts]).sum(0)
        cross = torch.stack([part.cross for part in parts]).sum(0)
        diagonal = second.diagonal()
        scale = float(diagonal[: self._inputs].mean()) or 1.0
        diagonal[: self._inputs] += damping * diagonal[: self._inputs] + FLOOR * scale
        diagonal[self._inputs :] *= 1.0 + 1e-9
        factor, failed = torch.linalg.cholesky_ex(second)
        while int(failed):  # rank-deficient beyond what the penalty covers
            damping = max(10.0 * damping, 10.0 * FLOOR)
            diagonal[: self._inputs] += damping * scale
            factor, failed = torch.linalg.cholesky_ex(second)
        return torch.cholesky_solve(cross, factor)
