"""Put quantize and dequantize nodes into a graph."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import fx

from compile_sparse.compiler.ir.linears import Linear, is_lm_head
from compile_sparse.compiler.ir.program import CODES, Program, SparsityMask
from compile_sparse.compiler.ir.quantization_schemes import Scheme, WeightFormat
from compile_sparse.compiler.ir.weights import AbsentTensor, DerivedTensor, TensorSource
from compile_sparse.passes.quantization.activations import NVFP4_TOP, ActivationQuantizer
from compile_sparse.passes.quantization.codes import CodeMemory, code_sources
from compile_sparse.passes.quantization.edits import Edits

__all__ = ["Rewriter"]

ours = torch.ops.compile_sparse


class Rewriter:
    """Edits one graph; the mask of a weight moves to its codes.

    Args:
        program: a clone that may be edited.
        scheme: what to.
        linears: all that will be quantized.
        ranges: node -> magnitude that the largest code stands for, for static schemes; None while planning.
        per_tensor: run-time activation scales for the whole tensor instead of one per token.
        stored: type that scales are stored in.
    """

    def __init__(
        self,
        program: Program,
        scheme: Scheme,
        linears: Sequence[Linear],
        *,
        ranges: Mapping[str, float] | None,
        per_tensor: bool,
        stored: torch.dtype,
    ) -> None:
        self.program, self.scheme = program, scheme
        self._linears, self._stored = linears, stored
        self._edits = Edits(program)
        self._activations = ActivationQuantizer(
            self._edits, scheme.activations, ranges=ranges, per_tensor=per_tensor, stored=stored
        )
        self._memory = CodeMemory()
        self._together: dict[str, tuple[str, ...]] = {}
        by_input: dict[fx.Node, list[str]] = {}
        for linear in linears:
            by_input.setdefault(linear.input, []).append(linear.tensor)
        for tensors in by_input.values():
            self._together |= dict.fromkeys(tensors, tuple(dict.fromkeys(tensors)))
        self._weights: dict[tuple[str, int], fx.Node] = {}
        self._masks: dict[str, SparsityMask] = {}
        self.code_bits = 0

    def quantize(self, linear: Linear) -> None:
        """Rewrite one linear layer."""
        fmt = self.scheme.weights
        if fmt.kind == "int" and fmt.bits == 4 and is_lm_head(self.program, linear.node):
            fmt = WeightFormat("int", 8, fmt.group)
        linear.node.replace_input_with(linear.weight, self._dequantized(linear, fmt))
        if self.scheme.activations:
            self._activations.code_input(linear)

    def finish(self, outputs: Collection[Linear] = ()) -> Program:
        """The program with the new weights, without what nobody reads any more.

        Args:
            outputs: layers whose outputs are coded as well.
        """
        for linear in outputs:
            self._activations.code_output(linear)
        return self._edits.applied(self._masks)

    def _dequantized(self, linear: Linear, fmt: WeightFormat) -> fx.Node:
        """The dequantize node of a weight, made once per tensor, before its first linear."""
        key = (linear.tensor, linear.axis)
        if key in self._weights:
            return self._weights[key]
        source, edits, place = self.program.weights[linear.tensor], self._edits, linear.node
        shared = self._shared(linear, fmt)
        made = code_sources(source, linear.axis, fmt, self._stored, self._memory, shared)
        stem, tensor = linear.weight.name, linear.tensor
        codes = edits.placeholder(f"{stem}_codes", tensor + CODES, made["codes"], "parameter")
        scale = edits.placeholder(f"{stem}_scale", tensor + ".scale", made["scale"])
        transposed = () if linear.axis == 1 else (linear.axis,)
        if fmt.kind == "fp4":
            assert shared is not None
            whole = edits.placeholder(f"{stem}_global_scale", tensor + ".global_scale", shared)
            node = edits.before(place, ours.dequantize_nvfp4.default, codes, scale, whole, *transposed)
        elif fmt.block:
            node = edits.before(place, ours.dequantize_block.default, codes, scale, fmt.block, *transposed)
        else:
            zero = (
                ()
                if fmt.symmetric
                else (edits.placeholder(f"{stem}_zero_point", tensor + ".zero_point", made["zero_point"]),)
            )
            node = edits.before(
                place, ours.dequantize_weight.default, codes, scale, linear.axis, fmt.group, fmt.bits, *zero
            )
        self.code_bits += source.shape[0] * source.shape[1] * (8 if fmt.bits == 7 else fmt.bits)
        if tensor in self.program.masks:  # every format keeps zeros: symmetric, or with the zero point a code
            self._masks[tensor + CODES] = self.program.masks[tensor]
        self._weights[key] = node
        return node

    def _shared(self, linear: Linear, fmt: WeightFormat) -> TensorSource | None:
        """NVFP4's divisor, or the largest magnitude that a whole tensor's scale stands for. Weights that share an input share it:
        runtimes fuse them and keep one per fused matrix.
        """
        if fmt.kind != "fp4" and not fmt.whole:
            return None
        sources = [self.program.weights[tensor] for tensor in self._together[linear.tensor]]
        if any(isinstance(source, AbsentTensor) for source in sources):
            return AbsentTensor((1,), torch.float32, linear.tensor)

        def compute() -> torch.Tensor:
            peak = max(float(source.load().abs().max()) for source in sources)
            if fmt.whole:
                return torch.tensor([peak])
            return torch.tensor([NVFP4_TOP / peak if peak else 1.0])

        return DerivedTensor((1,), torch.float32, compute)
