"""The quantizer ``rtn``: every weight becomes the nearest value that its format has."""

from __future__ import annotations

from typing import ClassVar

import torch

from compile_sparse.compiler.extension.quantizer_contract import Quantizer
from compile_sparse.compiler.ir.quantization_grid import QuantizationGrid
from compile_sparse.passes.quantization.scale_search import searched_grid

__all__ = ["RoundToNearest"]


class RoundToNearest(Quantizer):
    """``q = round(W / s)`` (arXiv:2004.09602).

    With calibration text, scales are searched for (``scale_search.py``): they may be too short for the largest weights where the
    inputs say that this costs less. Without, they reach just as far as the weights: a search that counts every input alike
    shortens, in trained decoders, the very weights that the few large activations hang on.
    """

    name: ClassVar[str] = "rtn"
    needs_statistics: ClassVar[bool] = False
    weighs_inputs: ClassVar[bool] = True

    def quantize(
        self,
        rows: torch.Tensor,
        grid: QuantizationGrid,
        *,
        statistics: torch.Tensor | None,
        zeros: torch.Tensor | None,
    ) -> tuple[torch.Tensor, QuantizationGrid]:
        if statistics is not None:
            power = statistics if statistics.ndim == 1 else statistics.diagonal()
            grid = searched_grid(rows, grid, power)
        return grid.codes(rows), grid
