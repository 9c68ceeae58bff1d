"""Tensors a pass computed, kept on disk until they are written into the artifact.

A closed-form repair changes every weight once, front to back. Holding the results in memory would make memory follow the
model; here each goes to a file of its own in a temporary folder and is mapped when it is needed again.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from compile_sparse.compiler.errors import EnvironmentFailure
from compile_sparse.compiler.ir.weights import ResidentTensor, TensorSource

__all__ = ["Scratch"]

SMALL_BYTES = 1 << 16
"""Smaller tensors (biases) stay in memory."""
_KEY = "value"


class Scratch:
    """A temporary folder that lives as long as any tensor kept in it."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="compile-sparse-")
        self._count = 0

    def keep(self, value: torch.Tensor) -> TensorSource:
        """A source for ``value``, which the caller may then drop.

        Raises:
            EnvironmentFailure: CS5011 when the temporary folder cannot be written, most often because it is full.
        """
        value = value.detach().contiguous()
        if value.nbytes <= SMALL_BYTES:
            return ResidentTensor(value)
        path = Path(self._folder.name) / f"{self._count}.safetensors"
        self._count += 1
        try:
            save_file({_KEY: value}, path)
        except (OSError, SafetensorError) as error:
            raise EnvironmentFailure(
                "CS5011",
                "A repaired weight could not be written to the temporary folder.",
                where=str(path.parent),
                why=str(error),
                hint="Free space there, or set TMPDIR to a folder that has it.",
            ) from error
        return _Kept(path, tuple(value.shape), value.dtype, self._folder)


@dataclass(frozen=True)
class _Kept:
    path: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    folder: tempfile.TemporaryDirectory[str]  # removed with the last tensor in it

    def load(self) -> torch.Tensor:
        with safe_open(str(self.path), framework="pt") as handle:
            value: torch.Tensor = handle.get_tensor(_KEY)
        return value
