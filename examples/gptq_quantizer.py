"""GPTQ (arXiv:2210.17323) as a quantizer of another package: this file, and two lines in its ``pyproject.toml``.

    [project.entry-points."compile_sparse.quantizers"]
    gptq = "gptq_quantizer:Gptq"

Installed beside compile-sparse, it is one more value of ``--quantizer``:

    compile-sparse compile MODEL --target ort-cpu --quantize w4a16 --quantizer gptq --calibration text.jsonl --out ARTIFACT

One input feature after the other is quantized, and the features that are still in floating point make up for its error as far as
inputs on calibration text tell: with ``H = E[x x^T]`` and ``U^T U = H^-1``, ``U`` upper triangular,

    e = (w_j - dequantize(q_j)) / U_jj,    w_k <- w_k - e U_jk  for k > j

so that the error of the layer's output, not of its weights, ends up small. Plain: features in their own order, every layer with
the inputs it has in the dense model.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from compile_sparse.compiler.extension.quantizer_contract import Quantizer
from compile_sparse.compiler.ir.quantization_grid import QuantizationGrid

DAMPING = 0.01
"""Added to the diagonal of H, as a share of its mean: features the text hardly drives must not take everything over."""
BLOCK = 128
"""Features after which the others are updated; within a block only the block is."""


class Gptq(Quantizer):
    """Any format that has a grid: integers per channel or in groups, with zero points or without, fp8, nvfp4."""

    name: ClassVar[str] = "gptq"
    needs_statistics: ClassVar[bool] = True

    def quantize(
        self,
        rows: torch.Tensor,
        grid: QuantizationGrid,
        *,
        statistics: torch.Tensor | None,
        zeros: torch.Tensor | None,
    ) -> tuple[torch.Tensor, QuantizationGrid]:
        assert statistics is not None  # needs_statistics
        upper, weight, codes = _inverse_root(statistics), rows.double(), grid.codes(rows)
        features = weight.shape[1]
        for start in range(0, features, BLOCK):
            stop = min(start + BLOCK, features)
            errors = torch.empty_like(weight[:, start:stop])
            for j in range(start, stop):
                here, wanted = slice(j, j + 1), weight[:, j : j + 1].float()
                if zeros is not None:
                    wanted = wanted.masked_fill(zeros[:, here], 0.0)
                codes[:, here] = grid.codes(wanted, here)
                error = (weight[:, here] - grid.values(codes[:, here], here)) / upper[j, j]
                weight[:, j:stop] -= error * upper[j, j:stop]
                errors[:, j - start] = error[:, 0]
            weight[:, stop:] -= errors @ upper[start:stop, stop:]
        return codes, grid


def _inverse_root(moment: torch.Tensor) -> torch.Tensor:
    """Upper triangular ``U`` with ``U^T U = (H + damping)^-1``."""
    mean = float(moment.diagonal().mean()) or 1.0
    damped = moment + DAMPING * mean * torch.eye(len(moment), dtype=moment.dtype)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True)
