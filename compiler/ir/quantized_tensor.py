"""A quantized weight as one tensor: its codes and scales, and on ``load`` the values they stand for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from compile_sparse.compiler.ir.quantization_schemes import Scheme
from compile_sparse.compiler.ir.weights import TensorSource

__all__ = ["QuantizedTensor"]

ours = torch.ops.compile_sparse


@dataclass(frozen=True)
class QuantizedTensor:
    """A weight that is stored as codes. ``load`` gives the float values they stand for.

    Attributes:
        scheme: of the weight, and of the input of the linear layers that read it.
        parts: ``codes``, ``scale`` and, where there are any, ``zero_point``, ``global_scale``, ``input_scale``.
        shape: ``[N, K]``.
        dtype: of the float values.
    """

    scheme: Scheme
    parts: Mapping[str, TensorSource]
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32

    def load(self) -> torch.Tensor:
        values = {name: source.load() for name, source in self.parts.items() if name != "input_scale"}
        weights = self.scheme.weights
        if weights.kind == "fp4":
            made = ours.dequantize_nvfp4(values["codes"], values["scale"], values["global_scale"])
        elif weights.block:
            made = ours.dequantize_block(values["codes"], values["scale"], weights.block)
        else:
            zero = values.get("zero_point")
            made = ours.dequantize_weight(values["codes"], values["scale"], 1, weights.group, weights.bits, zero)
        return made.to(self.dtype)  # type: ignore[no-any-return]
