"""Data for models that read no text: arrays of their own inputs, from a NumPy archive."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from compile_sparse.compiler.errors import UsageError

__all__ = ["read_arrays"]

_LARGEST_BYTES = 4 << 30
"""All arrays are in memory at once, and a small archive may unpack to anything."""


def read_arrays(path: Path, samples: int) -> dict[str, np.ndarray[Any, Any]]:
    """Inputs by name, such as ``pixel_values [N, channels, height, width]``; at most ``samples`` of them, evenly spaced.

    Raises:
        UsageError: CS1048 when the file is not an archive of arrays with one number of samples, at least 1.
    """
    try:
        with zipfile.ZipFile(path) as members:
            unpacked = sum(member.file_size for member in members.infolist())
        if unpacked > _LARGEST_BYTES:
            raise _wrong(path, f"It unpacks to {unpacked:,} bytes; {_LARGEST_BYTES:,} are allowed.")
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, zipfile.BadZipFile, AttributeError) as error:
        raise _wrong(path, f"{error}.".replace("..", ".")) from error
    counts = {array.shape[0] if array.ndim else 0 for array in arrays.values()}
    if len(counts) != 1 or not min(counts):
        raise _wrong(path, "Its arrays must have samples in their first dimension, the same number in each.")
    count = counts.pop()
    chosen = np.arange(count) if count <= samples else np.arange(samples) * count // samples
    return {name: array[chosen] for name, array in arrays.items()}


def _wrong(path: Path, why: str) -> UsageError:
    return UsageError(
        "CS1048",
        "The file holds no inputs of this model.",
        where=path.name,
        why=why,
        hint="For a model that reads no text, write numpy.savez('FILE.npz', pixel_values=array) with an array of "
        "preprocessed samples for every input.",
    )
