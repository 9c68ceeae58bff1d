"""Tensors of a safetensors checkpoint: described at once, read one at a time by memory map.

Format: https://github.com/huggingface/safetensors (8-byte little-endian header length, JSON header, data). The header is
checked here before anything is allocated, so that a truncated or hostile file gives a sentence and not a crash.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from compile_sparse.compiler.errors import ModelError

__all__ = ["StoredTensor", "read_checkpoint"]

MAX_HEADER_BYTES = 100 * 1024 * 1024  # the limit of the safetensors library itself
MAX_DIMENSIONS = 8
INDEX_NAME = "model.safetensors.index.json"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}
CODED = frozenset({torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu})
"""Types whose values mean nothing without a scale: they are never converted."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of one file. The file is mapped only while the result of ``load()`` is alive."""

    path: Path
    name: str
    shape: tuple[int, ...]
    stored_dtype: torch.dtype
    dtype: torch.dtype

    def load(self) -> torch.Tensor:
        try:
            with safe_open(str(self.path), framework="pt") as handle:
                value: torch.Tensor = handle.get_tensor(self.name)
        except (SafetensorError, OSError) as error:
            raise ModelError(
                "CS2006",
                f"Tensor {self.name!r} could not be read.",
                where=str(self.path.name),
                why=str(error),
                hint="The file changed or became unreadable during the run; start again with an intact checkpoint.",
            ) from error
        return value.to(self.dtype)


def _bad(path: Path, why: str) -> ModelError:
    return ModelError(
        "CS2004",
        "A weight file is damaged.",
        where=path.name,
        why=why,
        hint="Copy or download the checkpoint again; compare its size with the source.",
    )


def _read_header(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    with path.open("rb") as handle:
        prefix = handle.read(8)
        if len(prefix) < 8:
            raise _bad(path, f"The file has {size} bytes; a safetensors file starts with an 8-byte header length.")
        length = int.from_bytes(prefix, "little")
        if length > MAX_HEADER_BYTES:
            raise _bad(path, f"It declares a header of {length} bytes; the format allows {MAX_HEADER_BYTES}.")
        if 8 + length > size:
            raise _bad(path, f"It declares a header of {length} bytes but has only {size} bytes (truncated).")
        raw = handle.read(length)
    try:
        header = json.loads(raw.decode("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise _bad(path, f"The header is not JSON: {error}.") from error
    if not isinstance(header, dict):
        raise _bad(path, "The header is not a JSON object.")
    header.pop("__metadata__", None)
    end = 0
    for (start, stop), name in sorted((_check_entry(path, name, entry), name) for name, entry in header.items()):
        if start != end:
            raise _bad(
                path, f"The data of tensor {name!r} starts at {start}, where {end} is expected (overlap or hole)."
            )
        end = stop
    if 8 + length + end != size:
        raise _bad(path, f"The header describes {8 + length + end} bytes, the file has {size} (truncated or extended).")
    return header


def _check_entry(path: Path, name: str, entry: Any) -> tuple[int, int]:
    """Validate one header entry; returns the offsets its data lies between."""
    try:
        dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = [*shape, start, stop]
    except (TypeError, KeyError, ValueError) as error:
        raise _bad(path, f"The entry of tensor {name!r} is malformed.") from error
    if not isinstance(dtype, str):
        raise _bad(path, f"The entry of tensor {name!r} is malformed.")
    if dtype not in DTYPES:
        raise ModelError(
            "CS2020",
            f"Weights of the type {dtype!r} are not read by this version.",
            where=f"{path.name}, {name}",
            why=f"It reads {', '.join(DTYPES)}.",
            hint="Convert them with the package that wrote them, and save_pretrained the result.",
        )
    if len(shape) > MAX_DIMENSIONS or any(type(n) is not int or n < 0 for n in numbers):
        raise _bad(path, f"The entry of tensor {name!r} is malformed.")
    expected = prod(shape) * DTYPES[dtype].itemsize
    if stop - start != expected:
        raise _bad(path, f"Tensor {name!r} of shape {shape} needs {expected} bytes, its entry spans {stop - start}.")
    return start, stop


def _shards(folder: Path) -> list[Path]:
    index = folder / INDEX_NAME
    if index.is_file():
        try:
            mapping = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            names = sorted(set(mapping.values()))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise _bad(index, f"The index is malformed: {error}.") from error
        for name in names:
            # An index that points elsewhere is hostile or broken; either way it is not followed.
            if not isinstance(name, str) or Path(name).name != name:
                raise _bad(index, f"The index names a file outside the folder: {name!r}.")
            if not (folder / name).is_file():
                raise _bad(index, f"The index names {name!r}, which is missing.")
        return [folder / name for name in names]
    return sorted(folder.glob("*.safetensors"))


def read_checkpoint(folder: Path, dtype: torch.dtype) -> dict[str, StoredTensor]:
    """Every tensor of the folder's safetensors files; floating-point ones of 16 bits and more are converted to ``dtype`` on load.

    Returns an empty mapping when there is no safetensors file.

    Raises:
        ModelError: CS2003 pickle files only; CS2004 damaged file or index; a tensor in two shards; CS2020 a type that is not
            read.
    """
    shards = _shards(folder)
    if not shards:
        pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in folder.glob(pattern))
        if pickles:
            raise ModelError(
                "CS2003",
                "This model has no safetensors weights.",
                where=str(folder.name),
                why=f"It has {', '.join(pickles[:3])}: pickle files run code when they are opened, so they are never read.",
                hint="Convert once in a place you trust: model.save_pretrained(FOLDER) of transformers writes safetensors.",
            )
        return {}
    found: dict[str, StoredTensor] = {}
    for path in shards:
        for name, entry in _read_header(path).items():
            if name in found:
                raise _bad(path, f"Tensor {name!r} is also in {found[name].path.name}.")
            stored = DTYPES[entry["dtype"]]
            converted = stored.is_floating_point and stored not in CODED
            found[name] = StoredTensor(path, name, tuple(entry["shape"]), stored, dtype if converted else stored)
    return found
