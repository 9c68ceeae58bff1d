"""Put quantizers on the inputs and outputs of linear layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import fx

from compile_sparse.compiler.ir.graph_edits import Edits
from compile_sparse.compiler.ir.linears import Linear
from compile_sparse.compiler.ir.ops.quantization import FP8_MAX
from compile_sparse.compiler.ir.quantization_schemes import ActivationFormat
from compile_sparse.compiler.ir.weights import AbsentTensor, ResidentTensor, TensorSource
from compile_sparse.passes.quantization.scales import as_stored
from compile_sparse.passes.quantization.weights import NVFP4_TOP

__all__ = ["OUTPUT_FORMAT", "ActivationQuantizer"]

ours = torch.ops.compile_sparse
_TOPS = {"int8-static": 127.0, "fp8-static": FP8_MAX}
OUTPUT_FORMAT: ActivationFormat = "int8-static"
"""How outputs are quantized, where they are."""


class ActivationQuantizer:
    """One quantizer per distinct input, and one per output that is asked for.

    Args:
        edits: of the graph.
        form: how inputs are quantized.
        ranges: node -> magnitude that the largest code stands for, for static formats; None while planning.
        stored: type that fixed scales are stored in.
    """

    def __init__(
        self,
        edits: Edits,
        form: ActivationFormat,
        *,
        ranges: Mapping[str, float] | None,
        stored: torch.dtype,
    ) -> None:
        self._edits, self._form, self._stored = edits, form, stored
        self._ranges = ranges
        self._inputs: dict[fx.Node, fx.Node] = {}

    def quantize_input(self, linear: Linear) -> None:
        """Give the layer the quantize-dequantized value; it is made once, before the first layer that reads it."""
        source = linear.input
        if source not in self._inputs:
            scale = () if self._form not in (*_TOPS, "fp4") else (self._scale(source, linear.tensor, "input"),)
            self._inputs[source] = self._edits.before(
                linear.node, ours.fake_quantize.default, source, self._form, *scale
            )
        linear.node.replace_input_with(source, self._inputs[source])

    def quantize_output(self, linear: Linear) -> None:
        """Give everybody who reads the layer's output (its bias included, where the operator adds one) the quantize-dequantized
        value. To be called when all inputs are quantized: what is read by another layer then has both quantizers, output first.
        """
        users = list(linear.node.users)
        scale = self._scale(linear.node, linear.tensor, "output")
        quantized = self._edits.after(linear.node, ours.fake_quantize.default, linear.node, OUTPUT_FORMAT, scale)
        for user in users:
            user.replace_input_with(linear.node, quantized)

    def _scale(self, value: fx.Node, tensor: str, side: Literal["input", "output"]) -> fx.Node:
        source: TensorSource = AbsentTensor((1,), torch.float32, value.name)
        if self._ranges is not None:
            peak = self._ranges[value.name] or 1.0
            form = self._form if side == "input" else OUTPUT_FORMAT
            scale = NVFP4_TOP / peak if form == "fp4" else peak / _TOPS[form]
            fixed = torch.tensor([scale], dtype=torch.float32)
            source = ResidentTensor(fixed if form == "fp4" else as_stored(fixed, self._stored))
        return self._edits.placeholder(f"{value.name}_{side}_scale", f"{tensor}.{side}_scale", source)
