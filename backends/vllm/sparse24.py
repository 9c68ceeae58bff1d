"""2:4 weights as their values and positions, for the method ``compile_sparse_24`` of our vLLM plugin."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from compile_sparse.backends.vllm.sparse24_layout import compress_24
from compile_sparse.compiler.ir.linears import find_linears
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.ir.weights import DerivedTensor, TensorSource

__all__ = ["SPARSE_RUN", "SparseTensor", "compressible"]

PATTERN = "2:4"
SPARSE_RUN = 8
"""Inputs whose positions fill a byte."""


@dataclass(frozen=True)
class SparseTensor:
    """A weight ``[N, K]`` of which at most two in every run of four along K are not zero."""

    source: TensorSource

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.source.dtype

    def load(self) -> torch.Tensor:
        return self.source.load()

    def encoded(self, stem: str, stored: torch.dtype) -> dict[str, TensorSource]:
        """``weight_values [N, K / 2]`` and ``weight_indices`` uint8 ``[N, K / 8]``."""
        rows, columns = self.shape
        once = _Compression(self.source, stored)
        return {
            f"{stem}.weight_values": DerivedTensor((rows, columns // 2), stored, once.values),
            f"{stem}.weight_indices": DerivedTensor((rows, columns // 8), torch.uint8, once.indices),
        }


class _Compression:
    """Values and indices of one weight, computed together.

    A file's writer asks for one right after the other: what was not asked for yet is kept, and gone once it was.
    """

    def __init__(self, source: TensorSource, stored: torch.dtype) -> None:
        self._source, self._stored = source, stored
        self._left: dict[str, torch.Tensor] = {}

    def values(self) -> torch.Tensor:
        return self._taken("values")

    def indices(self) -> torch.Tensor:
        return self._taken("indices")

    def _taken(self, part: str) -> torch.Tensor:
        if part not in self._left:
            values, indices = compress_24(self._source.load().to(self._stored))
            self._left = {"values": values, "indices": indices}
        return self._left.pop(part)


def compressible(program: Program) -> dict[str, SparseTensor]:
    """Masked weights by name. vLLM joins layers that share an input: all of them are masked, or none is taken."""
    by_input: dict[str, set[str]] = {}
    for linear in find_linears(program)[0]:
        by_input.setdefault(linear.input.name, set()).add(linear.tensor if linear.axis == 1 else "")
    found: dict[str, SparseTensor] = {}
    for tensors in by_input.values():
        masks = [program.masks.get(tensor) for tensor in tensors]
        if all(m is not None and m.pattern == PATTERN and m.axis == 1 for m in masks) and all(
            program.weights[tensor].shape[1] % SPARSE_RUN == 0 for tensor in tensors
        ):
            found |= {tensor: SparseTensor(program.weights[tensor]) for tensor in sorted(tensors)}
    return found
