"""The best two thin matrices in place of one, in the metric of what goes in and what comes out."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from compile_sparse.compiler.errors import ModelError

__all__ = ["DAMPING", "Factors", "factor"]

DAMPING = 1e-6
"""Added to the diagonal of a metric, as a share of its mean: directions the text never took keep a little weight."""

_MAX_DAMPING = 1.0


@dataclass(frozen=True)
class Factors:
    """``outer @ inner`` approximates ``W: [N, K]``, components in order of importance.

    Attributes:
        inner: ``[R, K]``, applied first.
        outer: ``[N, R]``.
        energies: ``[min(N, K)]``, descending: what the approximation of rank ``r`` misses is the sum of ``energies[r:]``.
    """

    inner: torch.Tensor
    outer: torch.Tensor
    energies: torch.Tensor

    def truncated(self, rank: int) -> Factors:
        """The first ``rank`` components, copied so that the others can be freed."""
        return Factors(self.inner[:rank].clone(), self.outer[:, :rank].clone(), self.energies)

    def to(self, dtype: torch.dtype) -> Factors:
        """The same with both factors rounded to ``dtype``."""
        return Factors(self.inner.to(dtype), self.outer.to(dtype), self.energies)


def factor(
    weight: torch.Tensor,
    *,
    input_metric: torch.Tensor | None = None,
    output_metric: torch.Tensor | None = None,
    where: str = "",
) -> Factors:
    """Factors of all ranks at once: cutting both at ``r`` gives the minimum over matrices of rank ``r`` of

        tr(G (W - outer inner) C (W - outer inner)^T)

    With ``G = L_G L_G^T`` and ``C = L_C L_C^T`` that is the truncated singular value decomposition of ``L_G^T W L_C``, read
    back through the inverse of one of the two roots; it is taken from the eigenvectors on its shorter side. Each component is
    split evenly, so that inner products have a standard deviation of ``energy^(1/4)`` and neither factor is hard to quantize.

    With no metric this is the plain decomposition (Eckart-Young); with ``C = E[x x^T]`` the error is that of the outputs
    (SVD-LLM, arXiv:2403.07378); with ``G = E[g g^T]`` too, ``g`` the gradient of the loss at the outputs, half of it is the
    loss added, to second order and one layer at a time, under the Kronecker-factored Fisher matrix (arXiv:1503.05671).

    Args:
        weight: ``W: [N, K]``.
        input_metric: ``C: [K, K]``; the identity when None.
        output_metric: ``G: [N, N]``; the identity when None.
        where: named in errors.

    Returns:
        Factors of rank ``min(N, K)``, float64.

    Raises:
        ModelError: CS2503 when the weight or a metric is not finite.
    """
    matrix = weight.double()
    if not bool(matrix.isfinite().all()):
        raise _not_finite("The weight", where)
    output_root = None if output_metric is None else _root(output_metric, "The outputs' Fisher matrix", where)
    input_root = None if input_metric is None else _root(input_metric, "The inputs' Gram matrix", where)
    left = matrix if output_root is None else output_root.T @ matrix
    whitened = left if input_root is None else left @ input_root
    if matrix.shape[0] <= matrix.shape[1]:
        energies, basis = _eigen(whitened @ whitened.T)
        scale = _scale(energies)
        inner = basis.T @ left
        outer = basis if output_root is None else torch.linalg.solve_triangular(output_root.T, basis, upper=True)
        return Factors(inner / scale[:, None], outer * scale, energies)
    energies, basis = _eigen(whitened.T @ whitened)
    scale = _scale(energies)
    inner = basis if input_root is None else torch.linalg.solve_triangular(input_root.T, basis, upper=True)
    outer = matrix @ (basis if input_root is None else input_root @ basis)
    return Factors(inner.T * scale[:, None], outer / scale, energies)


def _scale(energies: torch.Tensor) -> torch.Tensor:
    """``energy^(1/4)``, kept away from zero."""
    largest = float(energies[0])
    return energies.clamp_min(1e-12 * largest if largest > 0.0 else 1.0).pow(0.25)


def _eigen(product: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues in descending order, at least 0, and the eigenvectors as columns."""
    values, vectors = torch.linalg.eigh(product)
    return values.flip(0).clamp_min(0.0), vectors.flip(1)


def _root(metric: torch.Tensor, what: str, where: str) -> torch.Tensor:
    """Lower triangular ``L`` with ``L L^T = metric + damping``; damped more where rounding made the metric indefinite."""
    metric = metric.double()
    if not bool(metric.isfinite().all()):
        raise _not_finite(what, where)
    mean = float(metric.diagonal().mean())
    unit = torch.eye(len(metric), dtype=torch.float64)
    if mean <= 0.0:  # never used by the text: nothing is known, every direction counts alike
        return unit
    damping = DAMPING
    while damping <= _MAX_DAMPING:
        root, failed = torch.linalg.cholesky_ex(metric + damping * mean * unit)
        if not int(failed):
            return root
        damping *= 10.0
    return unit * mean**0.5


def _not_finite(what: str, where: str) -> ModelError:
    return ModelError(
        "CS2503",
        f"{what} of a linear layer is not finite.",
        where=where,
        why="It holds infinities or NaNs, so no decomposition of it exists.",
        hint="Check the checkpoint, and that the model reads the calibration text without overflow.",
    )
