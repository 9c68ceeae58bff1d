"""Explicit quantize and dequantize operators; running them in torch is the artifact's reference semantics.

Weights: symmetric integers with scales along the contraction dimension.
    q: int8, same shape as the weight (4-bit codes are stored one per byte, in [-8, 7]).
    scale: float32. ``group_size == 0``: one scale per output channel, shape ``[N]``.
           ``group_size == g``: shape ``[N, ceil(K / g)]``; the last group may be shorter than g.
Activations: 8-bit unsigned, one scale and zero point for the whole tensor, chosen at run time. This is ONNX
``DynamicQuantizeLinear`` (opset 11): the range always contains zero and the zero point is rounded half to even.
"""

from __future__ import annotations

import torch
from torch.library import custom_op

__all__ = ["dequantize_activation", "dequantize_weight", "quantize_dynamic"]


@custom_op("compile_sparse::dequantize_weight", mutates_args=())
def dequantize_weight(q: torch.Tensor, scale: torch.Tensor, axis: int, group_size: int, bits: int = 8) -> torch.Tensor:
    """Float weight ``q * scale``.

    Args:
        q: int8, 2-D.
        scale: float32, ``[N]`` or ``[N, groups]``.
        axis: contraction dimension of q (1 for ``[N, K]`` linear weights, 0 for ``[K, N]``).
        group_size: elements per scale along ``axis``; 0 for one scale per output channel.
        bits: 4 or 8; codes lie in ``[-2^(bits-1), 2^(bits-1) - 1]``. Only storage depends on it.
    """
    spread = scale.repeat_interleave(group_size, dim=1)[:, : q.shape[axis]] if group_size else scale[:, None]
    return q.to(scale.dtype) * (spread if axis == 1 else spread.t())


@dequantize_weight.register_fake
def _(q: torch.Tensor, scale: torch.Tensor, axis: int, group_size: int, bits: int = 8) -> torch.Tensor:
    return q.new_empty(q.shape, dtype=scale.dtype)


@custom_op("compile_sparse::quantize_dynamic", mutates_args=())
def quantize_dynamic(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``(codes uint8, scale float32 [], zero_point uint8 [])`` of the whole tensor."""
    low = torch.clamp(x.min(), max=0.0)
    high = torch.clamp(x.max(), min=0.0)
    scale = (high - low) / 255.0
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    zero_point = torch.clamp(torch.round(-low / scale), 0, 255)
    codes = torch.clamp(torch.round(x / scale) + zero_point, 0, 255)
    return codes.to(torch.uint8), scale.clone(), zero_point.to(torch.uint8)


@quantize_dynamic.register_fake
def _(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape, dtype=torch.uint8), x.new_empty(()), x.new_empty((), dtype=torch.uint8)


@custom_op("compile_sparse::dequantize_activation", mutates_args=())
def dequantize_activation(codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
    """``(codes - zero_point) * scale``."""
    return (codes.to(scale.dtype) - zero_point.to(scale.dtype)) * scale


@dequantize_activation.register_fake
def _(codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
    return codes.new_empty(codes.shape, dtype=scale.dtype)
