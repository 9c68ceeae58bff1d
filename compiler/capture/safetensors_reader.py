"""Tensors of a safetensors checkpoint: described at once, read one at a time by memory map.

Format: https://github.com/huggingface/safetensors (8-byte little-endian header length, JSON header, data). The header is
checked here before anything is allocated, so that a truncated or hostile file gives a sentence and not a crash.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from compile_sparse.compiler.capture.weight_files import damaged
from compile_sparse.compiler.errors import ModelError

__all__ = ["StoredTensor", "read_checkpoint"]

MAX_HEADER_BYTES = 100 * 1024 * 1024  # the limit of the safetensors library itself
MAX_DIMENSIONS = 8
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
    seen_finite: set[str] = field(default_factory=set, compare=False, repr=False)
    """Names of the checkpoint's tensors that were read and found finite: each is looked at once."""

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
        if self.name not in self.seen_finite:
            _require_finite(self.path, self.name, value)
            self.seen_finite.add(self.name)
        return value.to(self.dtype)


def _require_finite(path: Path, name: str, value: torch.Tensor) -> None:
    """Refuse NaN and infinity where they enter: later they become scales of NaN, and the runtime is blamed."""
    if not value.is_floating_point() or not value.numel() or _all_finite(value):
        return
    wrong = ~torch.isfinite(value)
    first = [int(place) for place in wrong.nonzero()[0]]
    raise ModelError(
        "CS2013",
        f"Tensor {name!r} has values that are not finite.",
        where=path.name,
        why=f"{int(wrong.sum()):,} of {value.numel():,} are NaN or infinite, the first at {first}: {float(value[tuple(first)])}.",
        hint="The checkpoint is damaged, or training diverged; use an earlier one.",
    )


def _all_finite(value: torch.Tensor) -> bool:
    """One pass without a mask: a minimum or maximum of anything with NaN is NaN."""
    low, high = torch.aminmax(value.float() if value.dtype.itemsize == 1 else value)
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _read_header(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    with path.open("rb") as handle:
        prefix = handle.read(8)
        if len(prefix) < 8:
            raise damaged(path, f"The file has {size} bytes; a safetensors file starts with an 8-byte header length.")
        length = int.from_bytes(prefix, "little")
        if length > MAX_HEADER_BYTES:
            raise damaged(path, f"It declares a header of {length} bytes; the format allows {MAX_HEADER_BYTES}.")
        if 8 + length > size:
            raise damaged(path, f"It declares a header of {length} bytes but has only {size} bytes (truncated).")
        raw = handle.read(length)
    try:
        header = json.loads(raw.decode("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise damaged(path, f"The header is not JSON: {error}.") from error
    if not isinstance(header, dict):
        raise damaged(path, "The header is not a JSON object.")
    header.pop("__metadata__", None)
    end = 0
    for (start, stop), name in sorted((_check_entry(path, name, entry), name) for name, entry in header.items()):
        if start != end:
            raise damaged(
                path, f"The data of tensor {name!r} starts at {start}, where {end} is expected (overlap or hole)."
            )
        end = stop
    if 8 + length + end != size:
        raise damaged(
            path, f"The header describes {8 + length + end} bytes, the file has {size} (truncated or extended)."
        )
    return header


def _check_entry(path: Path, name: str, entry: Any) -> tuple[int, int]:
    """Validate one header entry; returns the offsets its data lies between."""
    try:
        dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = [*shape, start, stop]
    except (TypeError, KeyError, ValueError) as error:
        raise damaged(path, f"The entry of tensor {name!r} is malformed.") from error
    if not isinstance(dtype, str):
        raise damaged(path, f"The entry of tensor {name!r} is malformed.")
    if dtype not in DTYPES:
        raise ModelError(
            "CS2020",
            f"Weights of the type {dtype!r} are not read by this version.",
            where=f"{path.name}, {name}",
            why=f"It reads {', '.join(DTYPES)}.",
            hint="Convert them with the package that wrote them, and save_pretrained the result.",
        )
    if len(shape) > MAX_DIMENSIONS or any(type(n) is not int or n < 0 for n in numbers):
        raise damaged(path, f"The entry of tensor {name!r} is malformed.")
    expected = prod(shape) * DTYPES[dtype].itemsize
    if stop - start != expected:
        raise damaged(path, f"Tensor {name!r} of shape {shape} needs {expected} bytes, its entry spans {stop - start}.")
    return start, stop


def read_checkpoint(files: Sequence[Path], dtype: torch.dtype) -> dict[str, StoredTensor]:
    """Every tensor of safetensors files; floating-point ones are converted to ``dtype`` on load.

    Args:
        files: see ``weight_files``.
        dtype: floating-point.

    Types of 8 bits mean nothing without a scale and are left as they are.

    Raises:
        ModelError: CS2004 a damaged file; a tensor in two shards; CS2020 a type that is not read.
    """
    found: dict[str, StoredTensor] = {}
    seen: set[str] = set()
    for path in files:
        for name, entry in _read_header(path).items():
            if name in found:
                raise damaged(path, f"Tensor {name!r} is also in {found[name].path.name}.")
            stored = DTYPES[entry["dtype"]]
            converted = stored.is_floating_point and stored not in CODED
            found[name] = StoredTensor(path, name, tuple(entry["shape"]), stored, dtype if converted else stored, seen)
    return found
