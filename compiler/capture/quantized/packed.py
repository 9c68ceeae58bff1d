"""Codes of a few bits in integers that are wider: taken apart."""

from __future__ import annotations

import torch

__all__ = ["AWQ_ORDER", "fp4_codes", "signed_nibbles", "unpacked"]

WORD_BITS = 32
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Place in an int32 of AWQ's "gemm" layout -> of columns 0 to 7, four bits each."""


def unpacked(words: torch.Tensor, bits: int, dim: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """Unsigned codes, uint8, along ``dim``; the first is in the lowest bits, and bits that no code fills are left over.

    Args:
        words: int32.
        bits: per code, 1 to 8.
        dim: that becomes ``32 // bits`` times longer.
        order: place in the word of each code, where that is not its number.
    """
    count = WORD_BITS // bits
    places = torch.tensor(order or tuple(range(count)), dtype=torch.int32) * bits
    codes = (words.movedim(dim, -1).unsqueeze(-1) >> places) & (2**bits - 1)
    return codes.to(torch.uint8).flatten(-2).movedim(-1, dim).contiguous()


def fp4_codes(pairs: torch.Tensor) -> torch.Tensor:
    """int8 codes 0 to 15 of bytes that hold two along the last dimension, the first in the low half."""
    return torch.stack((pairs & 15, pairs >> 4), -1).flatten(-2).to(torch.int8)


def signed_nibbles(pairs: torch.Tensor) -> torch.Tensor:
    """int8 codes -8 to 7 of bytes that hold two along the first dimension, the even one in the low half."""
    codes = torch.stack((pairs & 15, pairs >> 4), 1).flatten(0, 1).to(torch.int8)
    return torch.where(codes > 7, codes - 16, codes)
