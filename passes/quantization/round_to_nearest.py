"""The quantizer ``rtn``: every weight becomes the nearest value that its format has."""

from __future__ import annotations

from typing import ClassVar

import torch

from compile_sparse.compiler.extension.quantizer_contract import Quantizer
from compile_sparse.compiler.ir.quantization_grid import QuantizationGrid

__all__ = ["RoundToNearest"]


class RoundToNearest(Quantizer):
    """``q = round(W / s)`` (arXiv:2004.09602), on the scales that reach just as far as the weights."""

    name: ClassVar[str] = "rtn"
    needs_statistics: ClassVar[bool] = False

    def quantize(
        self,
        rows: torch.Tensor,
        grid: QuantizationGrid,
        *,
        statistics: torch.Tensor | None,
        zeros: torch.Tensor | None,
    ) -> tuple[torch.Tensor, QuantizationGrid]:
        return grid.codes(rows), grid
