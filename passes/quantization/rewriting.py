"""Put quantize and dequantize nodes into a graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from operator import getitem
from typing import Any, Literal

import torch
from torch import fx

from compile_sparse.compiler.editing import add_weight, fake_mode_of, swept
from compile_sparse.compiler.linears import Linear, makes_logits
from compile_sparse.compiler.ops.quantization import FP4_MAX, FP8_MAX
from compile_sparse.compiler.program import CODES, Binding, Program
from compile_sparse.compiler.schemes import Scheme, WeightFormat
from compile_sparse.compiler.weights import AbsentTensor, DerivedTensor, ResidentTensor, TensorSource
from compile_sparse.passes.quantization.codes import CodeMemory, code_sources

__all__ = ["Rewriter"]

ours = torch.ops.compile_sparse
_TOPS = {"int8-static": 127.0, "fp8-static": FP8_MAX}
NVFP4_TOP = FP8_MAX * FP4_MAX
"""Largest value below the tensor's scale: the largest e4m3 scale times the largest e2m1 value."""


class Rewriter:
    """Edits one graph; one activation quantizer per distinct input.

    Args:
        program: a clone that may be edited.
        scheme: what to.
        linears: all that will be quantized.
        ranges: input node -> ``max|x|``, for static schemes; None while planning.
        per_tensor: run-time activation scales for the whole tensor instead of one per token.
        stored: type of the scales of weight-only schemes.
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
        self._ranges, self._per_tensor, self._stored = ranges, per_tensor, stored
        self._memory = CodeMemory()
        self._together: dict[str, tuple[str, ...]] = {}
        by_input: dict[fx.Node, list[str]] = {}
        for linear in linears:
            by_input.setdefault(linear.input, []).append(linear.tensor)
        for tensors in by_input.values():
            self._together |= dict.fromkeys(tensors, tuple(dict.fromkeys(tensors)))
        self.bindings = dict(program.bindings)
        self.added: dict[str, TensorSource] = {}
        self.inputs: dict[fx.Node, fx.Node] = {}
        self.weights: dict[tuple[str, int], fx.Node] = {}
        self.code_bits = 0

    def quantize(self, linear: Linear) -> None:
        """Rewrite one linear layer."""
        fmt = self.scheme.weights
        if fmt.kind == "int" and fmt.bits == 4 and makes_logits(self.program, linear.node):
            fmt = WeightFormat("int", 8, fmt.group)
        linear.node.replace_input_with(linear.weight, self._dequantized(linear, fmt))
        if self.scheme.activations:
            linear.node.replace_input_with(linear.input, self._activation(linear))

    def finish(self) -> Program:
        """The program with the new weights, without what nobody reads any more."""
        program = replace(self.program, weights=self.program.weights.updated(self.added), bindings=self.bindings)
        return swept(program)

    # -- weights

    def _dequantized(self, linear: Linear, fmt: WeightFormat) -> fx.Node:
        """The dequantize node of a weight, made once per tensor, before its first linear."""
        key = (linear.tensor, linear.axis)
        if key in self.weights:
            return self.weights[key]
        source = self.program.weights[linear.tensor]
        divisor = self._global_scale(linear) if fmt.kind == "fp4" else None
        made = code_sources(source, linear.axis, fmt, self._stored, self._memory, divisor)
        stem = linear.weight.name
        codes = self._placeholder(f"{stem}_codes", linear.tensor + CODES, "parameter", made["codes"])
        scale = self._placeholder(f"{stem}_scale", linear.tensor + ".scale", "buffer", made["scale"])
        if fmt.kind == "fp4":
            assert divisor is not None
            whole = self._placeholder(f"{stem}_global_scale", linear.tensor + ".global_scale", "buffer", divisor)
            node = self._call(linear, ours.dequantize_nvfp4.default, codes, scale, whole)
        elif fmt.block:
            node = self._call(linear, ours.dequantize_block.default, codes, scale, fmt.block)
        elif fmt.symmetric:
            node = self._call(linear, ours.dequantize_weight.default, codes, scale, linear.axis, fmt.group, fmt.bits)
        else:
            zero = self._placeholder(f"{stem}_zero_point", linear.tensor + ".zero_point", "buffer", made["zero_point"])
            node = self._call(
                linear, ours.dequantize_weight.default, codes, scale, linear.axis, fmt.group, fmt.bits, zero
            )
        self.code_bits += source.shape[0] * source.shape[1] * (8 if fmt.bits == 7 else fmt.bits)
        self.weights[key] = node
        return node

    def _global_scale(self, linear: Linear) -> TensorSource:
        """NVFP4's divisor. Weights that share an input share it: runtimes fuse them and keep one per fused matrix."""
        sources = [self.program.weights[tensor] for tensor in self._together[linear.tensor]]
        if any(isinstance(source, AbsentTensor) for source in sources):
            return AbsentTensor((1,), torch.float32, linear.tensor)

        def compute() -> torch.Tensor:
            peak = max(float(source.load().abs().max()) for source in sources)
            return torch.tensor([NVFP4_TOP / peak if peak else 1.0])

        return DerivedTensor((1,), torch.float32, compute)

    # -- activations

    def _activation(self, linear: Linear) -> fx.Node:
        """The coded and restored input, made once per value, before its first linear."""
        if linear.input not in self.inputs:
            if self.scheme.activations == "int8" and self._per_tensor:
                self.inputs[linear.input] = self._dynamic_per_tensor(linear)
            else:
                scale = (self._input_scale(linear),) if self.scheme.static else ()
                self.inputs[linear.input] = self._call(
                    linear, ours.fake_quantize.default, linear.input, self.scheme.activations, *scale
                )
        return self.inputs[linear.input]

    def _dynamic_per_tensor(self, linear: Linear) -> fx.Node:
        packed = self._call(linear, ours.quantize_dynamic.default, linear.input)
        parts = tuple(self._call(linear, getitem, packed, index) for index in range(3))
        return self._call(linear, ours.dequantize_activation.default, *parts)

    def _input_scale(self, linear: Linear) -> fx.Node:
        name = linear.input.name
        source: TensorSource = AbsentTensor((1,), torch.float32, name)
        if self._ranges is not None:
            peak = self._ranges[name] or 1.0
            fp4 = self.scheme.activations == "fp4"
            value = NVFP4_TOP / peak if fp4 else peak / _TOPS[self.scheme.activations]
            source = ResidentTensor(torch.tensor([value], dtype=torch.float32))
        return self._placeholder(f"{name}_input_scale", f"{linear.tensor}.input_scale", "buffer", source)

    # -- editing

    def _placeholder(
        self, name: str, tensor: str, kind: Literal["parameter", "buffer"], source: TensorSource
    ) -> fx.Node:
        self.added[tensor] = source
        return add_weight(self.program, self.bindings, name, Binding(tensor, kind), source)

    def _call(self, linear: Linear, target: Any, *args: Any) -> fx.Node:
        """A node before ``linear``, with its value on fake tensors recorded."""
        with self.program.graph.inserting_before(linear.node):
            node = self.program.graph.call_function(target, args)
        given = fx.node.map_arg(node.args, lambda n: n.meta["val"])
        with fake_mode_of(self.program):
            node.meta["val"] = target(*given)
        return node
