"""Ridge regression of a linear layer on streamed activations."""

from __future__ import annotations

import torch

__all__ = ["Regression"]


class Regression:
    """Least-squares correction ``D`` of a weight: ``min_D  sum_t |r_t - D x_t|^2 + damp * |D|^2``.

    ``x_t: [K]`` is what the layer receives, ``r_t: [N]`` what its output lacks. The correction is shrunk towards zero, so a
    direction the calibration text never excites keeps its old weight. One Cholesky factorisation of ``C = sum x x^T [K, K]``
    serves all ``N`` rows (ridge regression; as layer-wise reconstruction: arXiv:2208.11580).

    Args:
        inputs, outputs: ``K`` and ``N``.
        intercept: also fit a shift of the output; it is not shrunk.
    """

    def __init__(self, inputs: int, outputs: int, *, intercept: bool) -> None:
        self._intercept = intercept
        size = inputs + int(intercept)
        self._second = torch.zeros(size, size, dtype=torch.float64)
        self._cross = torch.zeros(size, outputs, dtype=torch.float64)
        self._missing = 0.0

    def add(self, x: torch.Tensor, missing: torch.Tensor) -> None:
        """Accumulate rows ``x: [T, K]`` and ``missing: [T, N]``. Products in float32, sums in float64."""
        x, missing = x.float(), missing.float()
        if self._intercept:
            x = torch.cat([x, x.new_ones(x.shape[0], 1)], dim=1)
        self._second += (x.t() @ x).double()
        self._cross += (x.t() @ missing).double()
        self._missing += float(missing.double().square().sum())

    def mean_shift(self) -> tuple[torch.Tensor, float]:
        """The intercept alone, ``mean r: [N]`` float64, and the share of ``sum |r|^2`` that is left. Needs ``intercept``."""
        shift = self._cross[-1] / self._second[-1, -1]
        removed = float(shift.square().sum() * self._second[-1, -1])
        return shift, 1.0 - removed / self._missing if self._missing else 1.0

    def solve(self, damping: float) -> tuple[torch.Tensor, torch.Tensor | None, float]:
        """The correction.

        Args:
            damping: ridge penalty as a share of the mean diagonal of ``C``.

        Returns:
            ``D: [N, K]`` float64, the intercept ``[N]`` or None, and the share of ``sum |r|^2`` that is left (0 to 1).
        """
        second = self._second.clone()
        inputs = second.shape[0] - int(self._intercept)
        scale = float(second.diagonal()[:inputs].mean()) or 1.0
        penalty = torch.zeros(second.shape[0], dtype=torch.float64)
        penalty[:inputs] = damping * scale
        second += torch.diag(penalty)
        if self._intercept:
            second[-1, -1] += 1e-9 * float(second[-1, -1])
        factor, failed = torch.linalg.cholesky_ex(second)
        while int(failed) and damping < 1.0:  # rank-deficient beyond what the ridge covers
            damping = max(damping * 10.0, 1e-8)
            second.diagonal()[:inputs] += damping * scale
            factor, failed = torch.linalg.cholesky_ex(second)
        solution = torch.cholesky_solve(self._cross, factor)
        explained = 2.0 * float((solution * self._cross).sum()) - float((solution * (self._second @ solution)).sum())
        left = 1.0 - explained / self._missing if self._missing else 1.0
        if not self._intercept:
            return solution.t(), None, left
        return solution[:-1].t(), solution[-1], left
