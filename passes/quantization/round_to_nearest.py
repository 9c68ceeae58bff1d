"""Round-to-nearest coding of weight rows, one function per kind of code. All take ``rows: [N, K]`` float32."""

from __future__ import annotations

import torch

from compile_sparse.compiler.ir.ops.quantization import FP4_MAX, FP8_MAX, to_fp4_codes, to_fp8

__all__ = [
    "as_stored",
    "quantize_channels",
    "quantize_fp8_blocks",
    "quantize_fp8_channels",
    "quantize_fp8_tensor",
    "quantize_groups",
    "quantize_groups_with_zero_points",
    "quantize_nvfp4",
    "scale_shape",
]


def scale_shape(channels: int, depth: int, group: int) -> tuple[int, ...]:
    """Shape of the scales of a ``[channels, depth]`` weight."""
    return (channels, -(-depth // group)) if group else (channels,)


def quantize_channels(
    rows: torch.Tensor, bits: int, stored: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(codes int8 [N, K], scale float32 [N])``; codes use ``[-(2^(bits-1) - 1), 2^(bits-1) - 1]``, so that -q is a code too.

    ``stored``: the type scales will be stored in; they are rounded to it before codes are chosen.
    """
    top = 2 ** (bits - 1) - 1
    scale = as_stored(rows.abs().amax(dim=1) / top, stored)
    codes = torch.round(rows / scale[:, None]).clamp_(-top, top)
    return codes.to(torch.int8), scale


def quantize_groups(
    rows: torch.Tensor, bits: int, group: int, stored: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(codes int8 [N, K], scale float32 [N, ceil(K / group)])``; a short last group is quantized on its own.

    The element of largest magnitude maps to ``-2^(bits-1)``, which uses the whole code range; its scale is then negative when
    that element is positive. With 4 bits this is one level in sixteen more than a range symmetric around zero.
    """
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    padded = _grouped(rows, group)
    peak = padded.gather(2, padded.abs().argmax(dim=2, keepdim=True))
    scale = as_stored(peak / low, stored)
    codes = torch.round(padded / scale).clamp_(low, high)
    return _ungrouped(codes, rows).to(torch.int8), scale.squeeze(2)


def quantize_groups_with_zero_points(
    rows: torch.Tensor, bits: int, group: int, stored: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``(codes int8 [N, K], scale float32 [N, G], zero_point int8 [N, G])``, codes in ``[0, 2^bits - 1]``.

    The range always contains zero, so that stored zeros stay exactly zero (arXiv:1712.05877, section 2.1).
    """
    top = 2**bits - 1
    padded = _grouped(rows, group)
    low, high = padded.amin(2, keepdim=True).clamp_max(0), padded.amax(2, keepdim=True).clamp_min(0)
    scale = as_stored((high - low) / top, stored)
    zero = torch.round(-low / scale).clamp_(0, top)
    codes = torch.round(padded / scale).add_(zero).clamp_(0, top)
    return _ungrouped(codes, rows).to(torch.int8), scale.squeeze(2), zero.squeeze(2).to(torch.int8)


def quantize_fp8_channels(rows: torch.Tensor, stored: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """``(codes float8_e4m3fn [N, K], scale float32 [N])``: the largest magnitude of a row maps to 448 (arXiv:2209.05433)."""
    scale = as_stored(rows.abs().amax(dim=1) / FP8_MAX, stored)
    return to_fp8(rows / scale[:, None]), scale


def quantize_fp8_tensor(
    rows: torch.Tensor, peak: torch.Tensor, stored: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(codes float8_e4m3fn [N, K], scale float32 [N])``: ``peak``, float32 ``[1]``, maps to 448; every row has that scale."""
    scale = as_stored(peak / FP8_MAX, stored)
    return to_fp8(rows / scale), scale.repeat(rows.shape[0])


def quantize_fp8_blocks(rows: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``(codes float8_e4m3fn [N, K], scale float32 [ceil(N / block), ceil(K / block)])``: one scale per square block
    (arXiv:2412.19437, section 3.3).
    """
    channels, depth = rows.shape
    padded = torch.nn.functional.pad(rows, (0, -depth % block, 0, -channels % block))
    squares = padded.unflatten(1, (-1, block)).unflatten(0, (-1, block))
    scale = as_stored(squares.abs().amax((1, 3)) / FP8_MAX, torch.float32)
    codes = (squares / scale[:, None, :, None]).flatten(2, 3).flatten(0, 1)[:channels, :depth]
    return to_fp8(codes).contiguous(), scale


def quantize_nvfp4(rows: torch.Tensor, group: int, global_scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``(codes int8 [N, K] of e2m1, scale float8_e4m3fn [N, ceil(K / group)])`` below a divisor for the tensor
    (arXiv:2509.25149).

    Args:
        rows: a short last group is quantized on its own.
        group: 16.
        global_scale: float32 ``[1]``, ``448 * 6 / max|W|``.
    """
    groups = _grouped(rows, group)
    scale = to_fp8(groups.abs().amax(2, keepdim=True) / FP4_MAX * global_scale)
    step = scale.to(torch.float32) / global_scale
    codes = to_fp4_codes(groups / torch.where(step == 0, torch.ones_like(step), step))
    return _ungrouped(codes, rows), scale.squeeze(2)


def as_stored(scale: torch.Tensor, stored: torch.dtype) -> torch.Tensor:
    """Scales as float32 values that ``stored`` can hold; 1 where that is zero."""
    rounded = scale.to(stored).to(torch.float32)
    return torch.where(rounded == 0, torch.ones_like(rounded), rounded)


def _grouped(rows: torch.Tensor, group: int) -> torch.Tensor:
    channels, depth = rows.shape
    groups = -(-depth // group)
    return torch.nn.functional.pad(rows, (0, groups * group - depth)).view(channels, groups, group)


def _ungrouped(codes: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return codes.reshape(like.shape[0], -1)[:, : like.shape[1]].contiguous()
