"""Quantize the weights (and for w8a8 the inputs) of linear layers, as explicit nodes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from operator import getitem
from typing import ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import fx

from compile_sparse.compiler.contract import PassContext, PassResult
from compile_sparse.compiler.editing import add_weight, fake_mode_of, swept
from compile_sparse.compiler.errors import ModelError, Refusal
from compile_sparse.compiler.linears import Linear, find_linears, makes_logits
from compile_sparse.compiler.program import CODES, Binding, Program
from compile_sparse.compiler.weights import AbsentTensor, DerivedTensor, TensorSource
from compile_sparse.passes.round_to_nearest import quantize_channels, quantize_groups, scale_shape

__all__ = ["Quantize"]

ours = torch.ops.compile_sparse


@dataclass(frozen=True)
class _Format:
    """Bits per code, elements per scale (0: whole channel), and whether activations are quantized too."""

    bits: int
    group: int
    activations: bool = False


SCHEMES: Mapping[str, _Format] = {
    "w8a8": _Format(8, 0, activations=True),
    "w8a16": _Format(8, 128),
    "w4a16": _Format(4, 128),
    "w4a16-g32": _Format(4, 32),
}


class Quantize(BaseModel):
    """Replace ``linear(x, W)`` by ``linear(x', dequantize(q, s))``, with ``x' = dequantize(quantize(x))`` for w8a8.

    ``q = round(W / s)``, symmetric, so stored zeros stay zero (arXiv:2004.09602). Scales run along the contraction dimension:
    per output channel for w8a8, per group of 128 or 32 elements otherwise. The projection that makes the logits is kept at
    8 bits where the scheme says 4: it is read once per token like every other layer but decides every token.

    Leaves alone: embeddings, convolutions, and any linear whose weight is not a stored two-dimensional parameter.

    Shapes: ``W [N, K]`` (linear) or ``[K, N]`` (addmm); ``q`` int8 of the same shape; ``s`` float32 ``[N]`` or
    ``[N, ceil(K / group)]``.

    Raises:
        Refusal: CS4102, the target has no kernel for the scheme.
        ModelError: CS2201, there is nothing to quantize.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: ClassVar[str] = "quantize"
    stage: ClassVar[str] = "quantization"

    scheme: Literal["w8a8", "w8a16", "w4a16", "w4a16-g32"] = Field(
        description="w8a8: int8 weights and run-time int8 activations; w8a16, w4a16: weights only, groups of 128; -g32: of 32"
    )
    quantizer: Literal["rtn"] = Field(default="rtn", description="how codes are chosen; rtn: round to nearest")

    @property
    def contraction_multiple(self) -> int:
        """Contraction sizes that whole groups divide; earlier passes keep to it."""
        return SCHEMES[self.scheme].group or 1

    def run(self, program: Program, context: PassContext) -> PassResult:
        if self.scheme not in context.target.schemes:
            raise Refusal(
                "CS4102",
                f"{context.target.name} cannot run {self.scheme}.",
                where="--quantize",
                why=f"It executes {', '.join(context.target.schemes) or 'no quantized weights'}.",
                hint="Choose one of those schemes, or another target.",
            )
        edited = program.clone()
        linears, skips = find_linears(edited)
        if not linears:
            raise ModelError(
                "CS2201",
                "There is nothing to quantize.",
                where="quantize",
                why=skips[0].why if skips else "The model has no linear layer with a stored weight.",
            )
        work = _Rewriter(edited, SCHEMES[self.scheme])
        with context.progress.task("quantize", total=len(linears)) as task:
            for linear in linears:
                work.quantize(linear)
                task.advance()
        before = sum(program.weights.elements(linear.tensor) for linear in linears)
        result = work.finish()
        return PassResult(
            program=result,
            modified=True,
            requested={"scheme": self.scheme, "quantizer": self.quantizer},
            achieved={
                "linears": len(linears),
                "elements": before,
                "bits_per_weight": round(work.code_bits / before, 3),
            },
            skips=skips,
        )


class _Rewriter:
    """Edits one graph; one activation quantizer per distinct input."""

    def __init__(self, program: Program, fmt: _Format) -> None:
        self.program, self.format = program, fmt
        self.bindings = dict(program.bindings)
        self.added: dict[str, TensorSource] = {}
        self.inputs: dict[fx.Node, fx.Node] = {}
        self.weights: dict[tuple[str, int], fx.Node] = {}
        self.code_bits = 0

    def quantize(self, linear: Linear) -> None:
        fmt = self.format
        if fmt.bits == 4 and makes_logits(self.program, linear.node):
            fmt = _Format(8, fmt.group)
        weight = self._dequantized(linear, fmt)
        linear.node.replace_input_with(linear.weight, weight)
        if fmt.activations:
            linear.node.replace_input_with(linear.input, self._activation(linear))

    def _dequantized(self, linear: Linear, fmt: _Format) -> fx.Node:
        """The dequantize node of a weight, made once per tensor, before its first linear."""
        key = (linear.tensor, linear.axis)
        if key in self.weights:
            return self.weights[key]
        source = self.program.weights[linear.tensor]
        depth, channels = source.shape[linear.axis], source.shape[1 - linear.axis]
        codes_source, scale_source = _sources(source, linear, fmt)
        stem = linear.weight.name
        codes = self._placeholder(f"{stem}_codes", linear.tensor + CODES, "parameter", codes_source)
        scale = self._placeholder(f"{stem}_scale", linear.tensor + ".scale", "buffer", scale_source)
        with self.program.graph.inserting_before(linear.node):
            node = self.program.graph.call_function(
                ours.dequantize_weight.default, (codes, scale, linear.axis, fmt.group, fmt.bits)
            )
        _run_fake(self.program, node)
        self.code_bits += channels * depth * fmt.bits
        self.weights[key] = node
        return node

    def _placeholder(
        self, name: str, tensor: str, kind: Literal["parameter", "buffer"], source: TensorSource
    ) -> fx.Node:
        self.added[tensor] = source
        return add_weight(self.program, self.bindings, name, Binding(tensor, kind), source)

    def _activation(self, linear: Linear) -> fx.Node:
        """The quantized and restored input, made once per value, before its first linear."""
        if linear.input not in self.inputs:
            graph = self.program.graph
            with graph.inserting_before(linear.node):
                packed = graph.call_function(ours.quantize_dynamic.default, (linear.input,))
                parts = tuple(graph.call_function(getitem, (packed, index)) for index in range(3))
                restored = graph.call_function(ours.dequantize_activation.default, parts)
            for node in (packed, *parts, restored):
                _run_fake(self.program, node)
            self.inputs[linear.input] = restored
        return self.inputs[linear.input]

    def finish(self) -> Program:
        program = replace(self.program, weights=self.program.weights.updated(self.added), bindings=self.bindings)
        return swept(program)


def _run_fake(program: Program, node: fx.Node) -> None:
    """Record the node's value on fake tensors."""
    args = fx.node.map_arg(node.args, lambda n: n.meta["val"])
    with fake_mode_of(program):
        node.meta["val"] = node.target(*args)  # type: ignore[operator]


def _sources(source: TensorSource, linear: Linear, fmt: _Format) -> tuple[TensorSource, TensorSource]:
    depth, channels = source.shape[linear.axis], source.shape[1 - linear.axis]
    shape = scale_shape(channels, depth, fmt.group)
    if isinstance(source, AbsentTensor):
        return AbsentTensor(source.shape, torch.int8, source.name), AbsentTensor(shape, torch.float32, source.name)

    def compute() -> tuple[torch.Tensor, torch.Tensor]:
        value = source.load().to(torch.float32)
        rows = value if linear.axis == 1 else value.t()
        codes, scale = quantize_groups(rows, fmt.bits, fmt.group) if fmt.group else quantize_channels(rows, fmt.bits)
        return (codes if linear.axis == 1 else codes.t().contiguous()), scale

    return (
        DerivedTensor(source.shape, torch.int8, lambda: compute()[0]),
        DerivedTensor(shape, torch.float32, lambda: compute()[1]),
    )
