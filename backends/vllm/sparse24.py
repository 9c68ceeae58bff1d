"""2:4 weights as their values and positions, for the method ``compile_sparse_24`` of our vLLM plugin."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from compile_sparse.backends.vllm.sparse24_layout import compress_24
from compile_sparse.compiler.ir.linears import find_linears
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.ir.weights import DerivedTensor, LastComputed, TensorSource

__all__ = ["SPARSE_RUN", "LastCompressed", "SparseTensor", "compressible"]

PATTERN = "2:4"
SPARSE_RUN = 8
"""Inputs whose positions fill a byte."""
LastCompressed = LastComputed[tuple[torch.Tensor, torch.Tensor]]
"""Values and indices of the weight that was compressed last."""


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

    def encoded(self, stem: str, stored: torch.dtype, last: LastCompressed) -> dict[str, TensorSource]:
        """``weight_values [N, K / 2]`` and ``weight_indices`` uint8 ``[N, K / 8]``.

        Args:
            stem: name of the layer.
            stored: type of the values.
            last: of the file that is written, in which the two are neighbours.
        """
        rows, columns = self.shape

        def compressed() -> tuple[torch.Tensor, torch.Tensor]:
            return last.get(stem, lambda: compress_24(self.source.load().to(stored)))

        return {
            f"{stem}.weight_values": DerivedTensor((rows, columns // 2), stored, lambda: compressed()[0]),
            f"{stem}.weight_indices": DerivedTensor((rows, columns // 8), torch.uint8, lambda: compressed()[1]),
        }


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
