"""Check that a form computes the GEMM before it is timed: a kernel that does less is no gain."""

from __future__ import annotations

import torch

from compile_sparse.compiler.microbench.gemm_forms import Prepared

__all__ = ["relative_error"]

ROWS, COLUMNS = 64, 256


def relative_error(prepared: Prepared) -> float:
    """``|got - wanted| / |wanted|`` in the Frobenius norm, over up to 64 rows and 256 columns spread over the result.

    ``wanted`` is the GEMM of the same factors in 64-bit floating point, so quantization errors of the factors do not count. Every
    call is checked; the worst counts. Not a number, or a wrong shape, is infinite.
    """
    rows = _spread(prepared.left.shape[0], ROWS, prepared.left.device)
    columns = _spread(prepared.right.shape[0], COLUMNS, prepared.right.device)
    wanted = _wide(prepared.left, rows) @ _wide(prepared.right, columns).T
    worst = 0.0
    for call in prepared.calls:
        result = call()
        got = result.t() if prepared.transposed else result
        if got.shape != (prepared.left.shape[0], prepared.right.shape[0]):
            return float("inf")
        difference = got[rows][:, columns].to(torch.float64) - wanted
        error = float(difference.norm() / wanted.norm())
        worst = max(worst, error if error == error else float("inf"))
    return worst


def _spread(size: int, most: int, device: torch.device) -> torch.Tensor:
    """Up to ``most`` indices from first to last."""
    return torch.linspace(0, size - 1, min(size, most), device=device).round().long()


def _wide(values: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    # Indexing is not defined for fp8, whose bytes are moved instead.
    if values.dtype == torch.float8_e4m3fn:
        return values.view(torch.uint8)[rows].view(values.dtype).to(torch.float64)
    return values[rows].to(torch.float64)
