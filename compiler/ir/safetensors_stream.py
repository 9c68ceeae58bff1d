"""Write a safetensors file one tensor at a time.

``safetensors.torch.save_file`` wants every tensor in memory. The format does not: a header whose offsets follow from shapes and
dtypes alone, then the bytes (https://huggingface.co/docs/safetensors, "Format").
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from compile_sparse.compiler.ir.weights import TensorSource

__all__ = ["write_safetensors"]

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_safetensors(
    path: Path,
    weights: Mapping[str, TensorSource],
    *,
    metadata: Mapping[str, str] | None = None,
    on_tensor: Callable[[], object] = lambda: None,
) -> str:
    """Write all tensors in the order given and return the file's sha256.

    Args:
        path: file to create.
        weights: sources; each is loaded once and released before the next.
        metadata: for the header, such as ``{"format": "pt"}``.
        on_tensor: called after every tensor.

    Raises:
        KeyError: a dtype the format does not have.
    """
    header: dict[str, dict[str, Any]] = {}
    offset = 0
    for name, source in weights.items():
        end = offset + torch.Size(source.shape).numel() * source.dtype.itemsize
        header[name] = {"dtype": _DTYPES[source.dtype], "shape": list(source.shape), "data_offsets": [offset, end]}
        offset = end
    described = {"__metadata__": dict(metadata), **header} if metadata else header
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for part in (len(text).to_bytes(8, "little"), text):
            file.write(part)
            digest.update(part)
        for name in header:
            # The byte view has no copy; numpy has no bfloat16, so the cast happens on torch's side.
            data = weights[name].load().detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
            file.write(data)
            digest.update(data)
            on_tensor()
    return digest.hexdigest()
