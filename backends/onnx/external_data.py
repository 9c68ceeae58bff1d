"""The file that holds the weights: written once, front to back, hashed on the way.

A tensor is handed over, written and forgotten, so memory follows the largest tensor and never the model.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import TracebackType

import numpy as np

__all__ = ["DATA_FILE", "MODEL_FILE", "Extent", "ExternalData", "Sink"]

MODEL_FILE = "model.onnx"
DATA_FILE = "model.onnx.data"

Extent = tuple[int, int]

# ONNX Runtime maps a tensor from the file instead of copying it when it starts on a page.
_PAGE_BYTES = 4096
_SMALL_ALIGNMENT_BYTES = 64
_CHUNK_BYTES = 16 << 20


class Sink:
    """Where tensors go when nothing is written: planning needs sizes, not values."""

    stores = False

    def append(self, values: np.ndarray) -> Extent:
        """Offset and length in bytes."""
        return 0, values.nbytes


class ExternalData(Sink):
    """An open weight file. Use as a context manager; ``sha256`` is final after it is closed."""

    stores = True

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("wb")
        self._hash = hashlib.sha256()
        self._position = 0

    def __enter__(self) -> ExternalData:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def append(self, values: np.ndarray) -> Extent:
        """Write one tensor at an aligned offset; returns where it is."""
        alignment = _PAGE_BYTES if values.nbytes >= _PAGE_BYTES else _SMALL_ALIGNMENT_BYTES
        self._write(memoryview(bytes(-self._position % alignment)))
        offset = self._position
        raw = np.ascontiguousarray(values).reshape(-1).data.cast("B") if values.nbytes else memoryview(b"")
        for start in range(0, len(raw), _CHUNK_BYTES):
            self._write(raw[start : start + _CHUNK_BYTES])
        return offset, len(raw)

    def _write(self, raw: memoryview) -> None:
        self._file.write(raw)
        self._hash.update(raw)
        self._position += len(raw)

    @property
    def sha256(self) -> str:
        """Digest of everything written, padding included."""
        return self._hash.hexdigest()
