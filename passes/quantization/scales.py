"""The scales of a weight that reach just as far as its elements: largest magnitude to largest code."""

from __future__ import annotations

import torch

from compile_sparse.compiler.ir.ops.quantization import FP4_MAX, FP8_MAX, to_fp8
from compile_sparse.compiler.ir.quantization_grid import QuantizationGrid, as_stored
from compile_sparse.compiler.ir.quantization_schemes import WeightFormat

__all__ = ["as_stored", "fitted_grid"]


def fitted_grid(
    rows: torch.Tensor, fmt: WeightFormat, stored: torch.dtype, shared: torch.Tensor | None = None
) -> QuantizationGrid:
    """The grid of ``rows [N, K]`` float32.

    Integers per channel: the largest magnitude maps to the largest code. In groups: to the lowest, ``-2^(bits-1)``, which uses
    the whole code range; the scale is negative when that element is positive. With 4 bits this is one level in sixteen more
    than a range symmetric around zero. With a zero point: lowest and highest element map to the ends of the range, which always
    contains zero, so that stored zeros stay exactly zero (arXiv:1712.05877, section 2.1).

    fp8: the largest magnitude maps to 448, per channel (arXiv:2209.05433), per square block (arXiv:2412.19437, section 3.3) or,
    ``per_tensor``, that of all weights which share an input. fp4: e4m3 scales below a divisor for the tensor (arXiv:2509.25149).

    A short last group or block is fitted on its own.

    Args:
        rows: the weight.
        fmt: how it is quantized.
        stored: the type scales will be stored in; they are rounded to it before codes are chosen. Blocks and fp4 have their own.
        shared: float32 ``[1]``: for fp4 the divisor, ``448 * 6 / max|W|``; for ``per_tensor`` the largest magnitude.
    """
    shape = (rows.shape[0], rows.shape[1])
    bits = fmt.bits - fmt.reduced_range
    if fmt.kind == "fp4":
        assert shared is not None
        scale = to_fp8(_grouped(rows, fmt.group).abs().amax(2) / FP4_MAX * shared)
        return QuantizationGrid(fmt, shape, scale, global_scale=shared)
    if fmt.block:
        return QuantizationGrid(fmt, shape, as_stored(_squares(rows, fmt.block).abs().amax((1, 3)) / FP8_MAX))
    if fmt.kind == "fp8" and fmt.per_tensor:
        assert shared is not None
        return QuantizationGrid(fmt, shape, as_stored(shared / FP8_MAX, stored).repeat(shape[0]), stored=stored)
    if fmt.kind == "fp8" or not fmt.group:
        top = FP8_MAX if fmt.kind == "fp8" else 2 ** (bits - 1) - 1
        return QuantizationGrid(fmt, shape, as_stored(rows.abs().amax(dim=1) / top, stored), stored=stored)
    groups = _grouped(rows, fmt.group)
    if fmt.symmetric:
        peak = groups.gather(2, groups.abs().argmax(dim=2, keepdim=True)).squeeze(2)
        return QuantizationGrid(fmt, shape, as_stored(peak / -(2 ** (bits - 1)), stored), stored=stored)
    top = 2**bits - 1
    low, high = groups.amin(2).clamp_max(0), groups.amax(2).clamp_min(0)
    scale = as_stored((high - low) / top, stored)
    zero_point = torch.round(-low / scale).clamp_(0, top).to(torch.int8)
    return QuantizationGrid(fmt, shape, scale, zero_point, stored=stored)


def _grouped(rows: torch.Tensor, group: int) -> torch.Tensor:
    return torch.nn.functional.pad(rows, (0, -rows.shape[1] % group)).unflatten(1, (-1, group))


def _squares(rows: torch.Tensor, block: int) -> torch.Tensor:
    padded = torch.nn.functional.pad(rows, (0, -rows.shape[1] % block, 0, -rows.shape[0] % block))
    return padded.unflatten(1, (-1, block)).unflatten(0, (-1, block))
