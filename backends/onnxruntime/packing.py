"""Bytes of a MatMulNBits weight.

Codes are unsigned with an implicit zero point in the middle of their range (8 for 4 bits, 128 for 8), in blocks along the
contraction; the last block is padded with the zero point. ``B: [N, ceil(K / block), block * bits / 8]``; with 4 bits the even
position is the low half of a byte.
"""

from __future__ import annotations

import numpy as np

__all__ = ["pack_blocks", "packed_shape", "pad_scales"]


def packed_shape(out_features: int, in_features: int, bits: int, block: int) -> tuple[int, int, int]:
    """Shape of the packed bytes."""
    return out_features, -(-in_features // block), block * bits // 8


def pack_blocks(codes: np.ndarray, bits: int, block: int) -> np.ndarray:
    """Pack signed ``codes [N, K]`` (int8, in ``[-2^(bits-1), 2^(bits-1) - 1]``)."""
    out_features, in_features = codes.shape
    shape = packed_shape(out_features, in_features, bits, block)
    middle = 1 << (bits - 1)
    padded = np.full((out_features, shape[1] * block), middle, np.uint8)
    # The sum fits in 8 bits, so wrapping arithmetic gives the exact code.
    padded[:, :in_features] = np.ascontiguousarray(codes).view(np.uint8) + np.uint8(middle)
    packed = padded if bits == 8 else padded[:, 0::2] | (padded[:, 1::2] << np.uint8(4))
    return packed.reshape(shape)


def pad_scales(scales: np.ndarray, out_features: int, groups: int) -> np.ndarray:
    """Scales as contiguous float32 ``[N, groups]``."""
    return np.ascontiguousarray(scales.reshape(out_features, groups), dtype=np.float32)
