"""Explicit quantize and dequantize operators; running them in torch is the artifact's reference semantics.

Integer weights: scales along the contraction dimension.
    q: int8, same shape as the weight (4-bit codes are stored one per byte).
    scale: float32. ``group_size == 0``: one scale per output channel, shape ``[N]``.
           ``group_size == g``: shape ``[N, ceil(K / g)]``; the last group may be shorter than g.
    zero_point: int8 of the scale's shape, or None where codes are symmetric.
FP8 weights (e4m3, arXiv:2209.05433): as integers with one scale per channel, or one scale per square block.
NVFP4 weights: e2m1 values in groups of 16 with an e4m3 scale each, and one float32 scale for the tensor.
Activations: ``fake_quantize``, quantize-dequantize (QDQ), with scales found at run time or fixed ahead.
"""

from __future__ import annotations

import torch
from torch.library import custom_op

__all__ = [
    "FAKE_QUANTIZE_GROUPS",
    "FP4_MAX",
    "FP4_VALUES",
    "FP8_MAX",
    "LEAST_PEAK",
    "NVFP4_GROUP",
    "WEIGHT_DEQUANTIZERS",
    "dequantize_block",
    "dequantize_nvfp4",
    "dequantize_weight",
    "fake_quantize",
    "to_fp4_codes",
    "to_fp8",
]

FP8_MAX = 448.0
"""Largest finite e4m3 value."""
FP4_MAX = 6.0
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes of e2m1 codes 0 to 7; codes 8 to 15 are their negatives."""
NVFP4_GROUP = 16
WEIGHT_DEQUANTIZERS = frozenset({"dequantize_weight", "dequantize_block", "dequantize_nvfp4"})
"""Operators that make a float weight of stored codes, the first argument of each."""
FAKE_QUANTIZE_GROUPS = {"fp8-group": 128, "fp4": NVFP4_GROUP}
"""Activation format -> elements of a row that share a scale; one scale for a row, or for everything, in the others."""
LEAST_PEAK = 1e-30
"""Run-time int8 scales are those of ``max(|x|, this)``: a row of zeros has one too, and its reciprocal is finite."""
_ACTIVATION_FORMATS = ("int8", "int8-static", "fp8", "fp8-static", "fp8-group", "fp4")


def to_fp8(x: torch.Tensor) -> torch.Tensor:
    """Nearest e4m3 values; out of range saturates (a plain cast makes NaN)."""
    return x.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


def to_fp4_codes(x: torch.Tensor) -> torch.Tensor:
    """Nearest e2m1 code (int8, 0 to 15) of every element, ties to the even code; out of range saturates."""
    values = torch.tensor(FP4_VALUES, dtype=x.dtype)
    middles = (values[1:] + values[:-1]) / 2
    magnitude = x.abs().contiguous()
    upper, lower = torch.bucketize(magnitude, middles, right=True), torch.bucketize(magnitude, middles)
    # The two differ on a tie only: there the even one is taken.
    code = torch.where(upper % 2 == 0, upper, lower)
    return (code + 8 * (x < 0)).to(torch.int8)


@custom_op("compile_sparse::dequantize_weight", mutates_args=())
def dequantize_weight(
    q: torch.Tensor,
    scale: torch.Tensor,
    axis: int,
    group_size: int,
    bits: int = 8,
    zero_point: torch.Tensor | None = None,
) -> torch.Tensor:
    """Float weight ``(q - zero_point) * scale``.

    Args:
        q: int8 or float8, 2-D.
        scale: float32, ``[N]`` or ``[N, groups]``.
        axis: contraction dimension of q (1 for ``[N, K]`` linear weights, 0 for ``[K, N]``).
        group_size: elements per scale along ``axis``; 0 for one scale per output channel.
        bits: 4 or 8; symmetric codes lie in ``[-2^(bits-1), 2^(bits-1) - 1]``, others in ``[0, 2^bits - 1]``. Only storage
            depends on it.
        zero_point: int8 of the scale's shape, or None.
    """

    def spread(value: torch.Tensor) -> torch.Tensor:
        rows = value.repeat_interleave(group_size, dim=1)[:, : q.shape[axis]] if group_size else value[:, None]
        return rows if axis == 1 else rows.t()

    codes = q.to(scale.dtype)
    return (codes if zero_point is None else codes - spread(zero_point).to(scale.dtype)) * spread(scale)


@dequantize_weight.register_fake
def _(
    q: torch.Tensor,
    scale: torch.Tensor,
    axis: int,
    group_size: int,
    bits: int = 8,
    zero_point: torch.Tensor | None = None,
) -> torch.Tensor:
    return q.new_empty(q.shape, dtype=scale.dtype)


@custom_op("compile_sparse::dequantize_block", mutates_args=())
def dequantize_block(q: torch.Tensor, scale: torch.Tensor, block: int, axis: int = 1) -> torch.Tensor:
    """Float weight ``q * scale[n // block, k // block]``, of the shape of ``q``.

    Args:
        q: float8, 2-D.
        scale: float32 ``[ceil(N / block), ceil(K / block)]``.
        block: side of the squares.
        axis: contraction dimension of q (1 for ``[N, K]``, 0 for ``[K, N]``).
    """
    rows = q if axis == 1 else q.t()
    spread = scale.repeat_interleave(block, 0)[: rows.shape[0]].repeat_interleave(block, 1)[:, : rows.shape[1]]
    return q.to(scale.dtype) * (spread if axis == 1 else spread.t())


@dequantize_block.register_fake
def _(q: torch.Tensor, scale: torch.Tensor, block: int, axis: int = 1) -> torch.Tensor:
    return q.new_empty(q.shape, dtype=scale.dtype)


@custom_op("compile_sparse::dequantize_nvfp4", mutates_args=())
def dequantize_nvfp4(
    codes: torch.Tensor, scale: torch.Tensor, global_scale: torch.Tensor, axis: int = 1
) -> torch.Tensor:
    """Float weight ``e2m1(code) * (scale / global_scale)``, of the shape of ``codes``; in this order, as compressed-tensors.

    Args:
        codes: int8, 0 to 15, 2-D.
        scale: float8 ``[N, ceil(K / 16)]``.
        global_scale: float32 ``[1]``, a divisor.
        axis: contraction dimension of codes (1 for ``[N, K]``, 0 for ``[K, N]``).
    """
    values = torch.tensor((*FP4_VALUES, *(-v for v in FP4_VALUES)), dtype=torch.float32)
    steps = scale.to(torch.float32) / global_scale
    spread = steps.repeat_interleave(NVFP4_GROUP, 1)[:, : codes.shape[axis]]
    return values[codes.long()] * (spread if axis == 1 else spread.t())


@dequantize_nvfp4.register_fake
def _(codes: torch.Tensor, scale: torch.Tensor, global_scale: torch.Tensor, axis: int = 1) -> torch.Tensor:
    return codes.new_empty(codes.shape, dtype=torch.float32)


@custom_op("compile_sparse::fake_quantize", mutates_args=())
def fake_quantize(x: torch.Tensor, format: str, scale: torch.Tensor | None = None) -> torch.Tensor:
    """``x`` after quantize-dequantize (QDQ), in the dtype of ``x``.

    Args:
        x: ``[..., K]``.
        format: ``int8``: one symmetric scale per token (row of K), ``s = max|x| / 127``, and codes ``round(x * (1 / s))``, half
            to even, all float32, in this order: runtimes compute so, bit for bit;
            ``fp8``: the same with ``max|x| / 448`` and ``x / s``;
            ``int8-static``, ``fp8-static``: ``scale``, float32 ``[1]``, for everything;
            ``fp8-group``: one scale per 128 elements of a row (the last may be shorter);
            ``fp4``: e2m1 with an e4m3 scale per 16 elements, below the divisor ``scale``, float32 ``[1]``.

    Raises:
        ValueError: an unknown format, or a static one without its scale.
    """
    if format not in _ACTIVATION_FORMATS:
        raise ValueError(f"there is no activation format {format!r}")
    value = x.to(torch.float32)
    kind, _, granularity = format.partition("-")
    if kind == "fp4" or granularity == "static":
        if scale is None:
            raise ValueError(f"{format} needs a scale")
        result = _qdq_fp4(value, scale) if kind == "fp4" else _qdq(value, scale, kind)
        return result.to(x.dtype)
    if format == "int8":
        return _qdq_int8_rows(value).to(x.dtype)
    group = FAKE_QUANTIZE_GROUPS.get(format)
    rows = _grouped(value, group) if group else value
    result = _qdq(rows, _row_scale(rows, FP8_MAX), kind)
    return (_ungrouped(result, value) if group else result).to(x.dtype)


@fake_quantize.register_fake
def _(x: torch.Tensor, format: str, scale: torch.Tensor | None = None) -> torch.Tensor:
    return torch.empty_like(x)


def _qdq_int8_rows(value: torch.Tensor) -> torch.Tensor:
    """No clamp: ``|x| * (1 / s)`` is at most 127 and a rounding error."""
    scale = value.abs().amax(-1, keepdim=True).clamp_min(LEAST_PEAK) / 127.0
    return torch.round(value * (1.0 / scale)) * scale


def _row_scale(value: torch.Tensor, top: float) -> torch.Tensor:
    scale = value.abs().amax(-1, keepdim=True) / top
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def _qdq(value: torch.Tensor, scale: torch.Tensor, kind: str) -> torch.Tensor:
    if kind == "fp8":
        return to_fp8(value / scale).to(torch.float32) * scale
    return torch.round(value / scale).clamp_(-128, 127) * scale


def _grouped(value: torch.Tensor, group: int) -> torch.Tensor:
    padded = torch.nn.functional.pad(value, (0, -value.shape[-1] % group))
    return padded.unflatten(-1, (-1, group))


def _ungrouped(rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return rows.flatten(-2)[..., : like.shape[-1]].contiguous()


def _qdq_fp4(value: torch.Tensor, global_scale: torch.Tensor) -> torch.Tensor:
    rows = _grouped(value, NVFP4_GROUP)
    scale = to_fp8(rows.abs().amax(-1, keepdim=True) / FP4_MAX * global_scale).to(torch.float32) / global_scale
    safe = torch.where(scale == 0, torch.ones_like(scale), scale)
    table = torch.tensor((*FP4_VALUES, *(-v for v in FP4_VALUES)), dtype=torch.float32)
    return _ungrouped(table[to_fp4_codes(rows / safe).long()] * scale, value)
