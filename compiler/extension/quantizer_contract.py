"""What a quantizer promises. Third parties register theirs in the entry-point group ``compile_sparse.quantizers``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    import torch

    from compile_sparse.compiler.ir.quantization_grid import QuantizationGrid

__all__ = ["Quantizer"]


class Quantizer(ABC):
    """How the codes of a weight are chosen. The pass ``quantize`` uses one by name, on one weight at a time.

    The entry is a class without constructor arguments, checked when it is loaded.

    Attributes:
        name: that of its entry point.
        needs_statistics: whether it looks at the inputs of each layer on calibration text; a compilation without text is then
            refused. Others run when the weight is written.
        weighs_inputs: of one without that need: whether it is told, where there is text, how large each input is.
    """

    name: ClassVar[str]
    needs_statistics: ClassVar[bool]
    weighs_inputs: ClassVar[bool] = False

    @abstractmethod
    def quantize(
        self,
        rows: torch.Tensor,
        grid: QuantizationGrid,
        *,
        statistics: torch.Tensor | None,
        zeros: torch.Tensor | None,
    ) -> tuple[torch.Tensor, QuantizationGrid]:
        """Codes of one weight, and the grid that they are on.

        Args:
            rows: the weight, ``[N, K]`` float32; not to be changed.
            grid: of the weight's format, with the scales that round-to-nearest takes. Another one of the same format may be
                returned; its scales must be values of the type ``grid.stored`` (``grid.scaled`` gives such).
            statistics: of the inputs on calibration text, float64: ``E[x x^T]``, ``[K, K]``, where they are needed;
                ``E[x_j^2]``, ``[K]``, for ``weighs_inputs``; None otherwise, and without text.
            zeros: ``[N, K]`` bool, weights that must stay exactly zero; None where there is no sparsity pattern.

        Returns:
            ``(codes, grid)``, codes ``[N, K]`` int8, or float8_e4m3fn where the format is ``fp8``.
        """
