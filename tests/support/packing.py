"""Codes packed one by one, in plain numpy, as the descriptions of the formats say."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["AWQ_COLUMNS", "awq_words", "nibble_pairs", "words"]

Array = NDArray[np.generic]

AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)
"""Column of the code in bits 0-3, 4-7, ... of a word."""


def words(codes: Array, bits: int, axis: int) -> Array:
    """int32, ``32 // bits`` codes to a word along ``axis``, the first in the lowest bits."""
    moved = np.moveaxis(np.asarray(codes, np.uint64), axis, -1)
    count = 32 // bits
    padded = np.zeros((*moved.shape[:-1], -(-moved.shape[-1] // count) * count), np.uint64)
    padded[..., : moved.shape[-1]] = moved
    made = np.zeros((*moved.shape[:-1], padded.shape[-1] // count), np.uint64)
    for place in range(padded.shape[-1]):
        made[..., place // count] |= padded[..., place] << np.uint64(bits * (place % count))
    return np.ascontiguousarray(np.moveaxis(made.astype(np.uint32).view(np.int32), -1, axis))


def awq_words(codes: Array) -> Array:
    """int32, eight 4-bit codes to a word along the last axis, in AWQ's order."""
    wide = np.asarray(codes, np.uint64)
    made = np.zeros((wide.shape[0], wide.shape[1] // 8), np.uint64)
    for word in range(made.shape[1]):
        for place, column in enumerate(AWQ_COLUMNS):
            made[:, word] |= wide[:, 8 * word + column] << np.uint64(4 * place)
    return made.astype(np.uint32).view(np.int32)


def nibble_pairs(codes: Array, axis: int = -1) -> Array:
    """uint8, two 4-bit codes to a byte along ``axis``, the first in the low half."""
    moved = np.moveaxis(np.asarray(codes, np.uint8) & 15, axis, -1)
    made = moved[..., 0::2] | (moved[..., 1::2] << 4)
    return np.ascontiguousarray(np.moveaxis(made, -1, axis))
