"""Put quantize and dequantize nodes into a graph."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import fx

from compile_sparse.compiler.ir.dequantizing import add_dequantized
from compile_sparse.compiler.ir.graph_edits import Edits
from compile_sparse.compiler.ir.linears import Linear
from compile_sparse.compiler.ir.program import CODES, Program, SparsityMask
from compile_sparse.compiler.ir.weights import TensorSource
from compile_sparse.passes.quantization.activations import ActivationQuantizer
from compile_sparse.passes.quantization.weights import Weight

__all__ = ["Rewriter"]


class Rewriter:
    """Edits one graph; the mask of a weight moves to its codes.

    Args:
        edits: of the graph.
        activations: the quantizers of activations; None where all stay in floating point.
    """

    def __init__(self, edits: Edits, activations: ActivationQuantizer | None) -> None:
        self._edits, self._activations = edits, activations
        self._weights: dict[tuple[str, int], fx.Node] = {}
        self._masks: dict[str, SparsityMask] = {}
        self.code_bits = 0

    def quantize(self, linear: Linear, weight: Weight, made: Mapping[str, TensorSource], *, rounds_input: bool) -> None:
        """Rewrite one linear layer.

        Args:
            linear: of the graph.
            weight: its weight.
            made: the tensors it is stored as.
            rounds_input: quantize its input too.
        """
        linear.node.replace_input_with(linear.weight, self._dequantized(linear, weight, made))
        if rounds_input:
            assert self._activations is not None
            self._activations.quantize_input(linear)

    def finish(self, outputs: Collection[Linear] = ()) -> Program:
        """The program with the new weights, without what nobody reads any more.

        Args:
            outputs: layers whose outputs are quantized as well.
        """
        for linear in outputs:
            assert self._activations is not None
            self._activations.quantize_output(linear)
        return self._edits.applied(self._masks)

    def _dequantized(self, linear: Linear, weight: Weight, made: Mapping[str, TensorSource]) -> fx.Node:
        """The dequantize node of a weight, made once per tensor, before its first linear."""
        key = (weight.tensor, weight.axis)
        if key in self._weights:
            return self._weights[key]
        edits, tensor, fmt = self._edits, weight.tensor, weight.format
        node = add_dequantized(edits, linear.node, linear.weight, tensor, fmt, weight.axis, made)
        self.code_bits += weight.source.shape[0] * weight.source.shape[1] * fmt.bits
        if tensor in edits.program.masks:  # every format keeps zeros: symmetric, or with the zero point a code
            self._masks[tensor + CODES] = edits.program.masks[tensor]
        self._weights[key] = node
        return node
