"""Element types of ONNX tensors, and how the ones numpy does not know are stored."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

__all__ = ["PACKED", "element_type", "kind_of", "raw_values", "storage_type"]

# ONNX TensorProto.DataType numbers; part of the file format, so they never change.
_ELEMENT_TYPES = {
    "float32": 1,
    "uint8": 2,
    "int8": 3,
    "int32": 6,
    "int64": 7,
    "bool": 9,
    "float16": 10,
    "float64": 11,
    "bfloat16": 16,
    "float8_e4m3fn": 17,
    "int4": 22,
    "float4_e2m1": 23,
}
_STORAGE = {"bfloat16": "uint16", "float8_e4m3fn": "uint8", "int4": "uint8", "float4_e2m1": "uint8"}
PACKED = frozenset({"int4", "float4_e2m1"})
"""Kinds with two elements per byte, the first in the low half; an odd last one has an empty high half."""


def kind_of(dtype: torch.dtype | np.dtype[Any] | str) -> str:
    """Name of an element type, as torch and numpy spell it."""
    return str(dtype).removeprefix("torch.")


def element_type(dtype: torch.dtype | np.dtype[Any] | str) -> int:
    """ONNX element type of a torch or numpy dtype or kind; KeyError for one the writer does not know."""
    return _ELEMENT_TYPES[kind_of(dtype)]


def storage_type(kind: str) -> np.dtype[Any]:
    """The numpy dtype whose bytes hold elements of a kind."""
    return np.dtype(_STORAGE.get(kind, kind))


def raw_values(values: torch.Tensor) -> np.ndarray[Any, Any]:
    """A tensor's elements as numpy holds them: unsigned bits for types it does not know."""
    values = values.detach().contiguous()
    kind = kind_of(values.dtype)
    if kind not in _STORAGE:
        return np.asarray(values.numpy())
    bits = {1: torch.uint8, 2: torch.int16}[values.element_size()]
    return np.asarray(values.view(bits).numpy()).view(_STORAGE[kind])
