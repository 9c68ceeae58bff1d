"""Two 4-bit codes per byte, as ONNX stores INT4 and FLOAT4E2M1."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["pack_nibbles"]


def pack_nibbles(codes: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Codes (int8, ``[-8, 7]`` or ``[0, 15]``) in row-major order, the first of each pair in the low half; uint8, flat."""
    flat = np.ascontiguousarray(codes).reshape(-1).view(np.uint8) & 15
    if flat.size % 2:
        flat = np.append(flat, np.uint8(0))
    return np.asarray(flat[0::2] | (flat[1::2] << 4))
