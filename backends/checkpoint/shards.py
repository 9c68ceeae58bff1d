"""Weight files: one, or several with an index, none larger than a limit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path

from compile_sparse.compiler.ir.safetensors_stream import write_safetensors
from compile_sparse.compiler.ir.weights import TensorSource

__all__ = ["SHARD_BYTES", "write_shards"]

SHARD_BYTES = 5_000_000_000
_INDEX = "model.safetensors.index.json"


def write_shards(
    out: Path,
    tensors: Mapping[str, TensorSource],
    *,
    shard_bytes: int = SHARD_BYTES,
    on_tensor: Callable[[], object] = lambda: None,
) -> dict[str, str]:
    """Write ``tensors`` in their order; a tensor larger than the limit gets a file of its own.

    Returns:
        File name -> SHA-256.
    """
    groups: list[dict[str, TensorSource]] = [{}]
    filled = 0
    for name, source in tensors.items():
        size = _bytes(source)
        if groups[-1] and filled + size > shard_bytes:
            groups.append({})
            filled = 0
        groups[-1][name] = source
        filled += size
    files: dict[str, str] = {}
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups, 1):
        name = f"model-{number:05d}-of-{len(groups):05d}.safetensors" if len(groups) > 1 else "model.safetensors"
        files[name] = write_safetensors(out / name, group, metadata={"format": "pt"}, on_tensor=on_tensor)
        weight_map.update(dict.fromkeys(group, name))
    if len(groups) > 1:
        index = {
            "metadata": {"total_size": sum(map(_bytes, tensors.values()))},
            "weight_map": dict(sorted(weight_map.items())),
        }
        text = (json.dumps(index, indent=2) + "\n").encode()
        (out / _INDEX).write_bytes(text)
        files[_INDEX] = hashlib.sha256(text).hexdigest()
    return files


def _bytes(source: TensorSource) -> int:
    return prod(source.shape) * source.dtype.itemsize
