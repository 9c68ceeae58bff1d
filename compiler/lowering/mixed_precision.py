"""Give every value of a program a 16-bit or 32-bit floating-point type, with explicit casts between them.

A program is captured in float32. Runtimes with strongly typed networks compute every operator in the type of its operands, so the
types are decided here, by operator:

- GEMMs, convolutions, attention, embeddings and norms (which add up in float32 inside) run in the reduced type;
- what overflows or loses its digits there (powers, exponentials, sums, softmax written out) runs in float32;
- everything else follows its operands, and float32 wins where both meet.

Trained weights get the reduced type. Constants stay in float32 until an operator that runs in the reduced type reads them:
positions times a frequency have no meaning in 11 bits.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import fx

from compile_sparse.compiler.errors import Refusal
from compile_sparse.compiler.extension.pass_contract import PassResult
from compile_sparse.compiler.ir.edit import fake_mode_of
from compile_sparse.compiler.ir.nodes import qualified_name
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.ir.weights import AbsentTensor, DerivedTensor, DowncastTensor, TensorSource

__all__ = ["MixedPrecision", "half_precision_nodes"]

_REDUCED = {
    *("aten::linear", "aten::addmm", "aten::mm", "aten::bmm", "aten::matmul", "aten::einsum", "aten::embedding"),
    *("aten::conv1d", "aten::conv2d", "aten::conv3d", "aten::convolution"),
    *("aten::conv_transpose1d", "aten::conv_transpose2d", "aten::conv_transpose3d"),
    *("aten::scaled_dot_product_attention", "aten::layer_norm", "aten::batch_norm"),
    *("aten::_native_batch_norm_legit_no_training", "compile_sparse::rms_norm", "compile_sparse::residual_rms_norm"),
    "compile_sparse::cached_attention",
}
_FLOAT32 = {
    *("aten::exp", "aten::log", "aten::pow", "aten::sqrt", "aten::rsqrt", "aten::reciprocal", "aten::sin", "aten::cos"),
    *("aten::mean", "aten::sum", "aten::cumsum", "aten::var", "aten::linalg_vector_norm"),
    *("aten::softmax", "aten::_softmax", "aten::log_softmax", "aten::_log_softmax"),
    *("aten::group_norm", "aten::instance_norm"),
}
_OWN_OPERANDS = {
    "compile_sparse::cached_attention": {"cos", "sin"},
    "aten::batch_norm": {"running_mean", "running_var"},
    "aten::_native_batch_norm_legit_no_training": {"running_mean", "running_var"},
    "compile_sparse::fake_quantize": {"scale"},
}
"""Operands whose type the emitter chooses when it writes them."""
_CASTS = {"aten::_to_copy", "aten::to", "aten::type_as"}


@dataclass(frozen=True)
class MixedPrecision:
    """See the module. Cache inputs get the reduced type, other inputs and what depends on them keep their own until an operator
    asks. Nothing changes where ``dtype`` is float32.

    Attributes:
        dtype: the 16-bit type, or float32.
    """

    dtype: torch.dtype
    name: ClassVar[str] = "mixed precision"

    def run(self, program: Program, context: object = None) -> PassResult:
        """Assign types.

        Raises (when weights are loaded):
            Refusal: CS4431, a weight is out of the type's range.
        """
        if self.dtype == torch.float32:
            return PassResult(program, modified=False)
        edited = program.clone()
        work = _Typing(edited, self.dtype)
        changes = work.weights()
        for node in list(edited.graph.nodes):
            if node.op == "call_function":
                work.visit(node)
        edited.graph_module.recompile()
        return PassResult(replace(edited, weights=edited.weights.updated(changes)), modified=True)


def half_precision_nodes(program: Program, typed: Program) -> list[str]:
    """Nodes of ``program`` whose values ``typed``, made from it by ``MixedPrecision``, holds in fp16: they may leave its range.

    bf16 has the range of float32.
    """
    computed = {node.name for node in program.graph.nodes}
    return [
        node.name
        for node in typed.graph.nodes
        if node.op == "call_function"
        and node.name in computed
        and getattr(node.meta.get("val"), "dtype", None) == torch.float16
    ]


class _Typing:
    def __init__(self, program: Program, reduced: torch.dtype) -> None:
        self.program, self.reduced = program, reduced
        self._mode = fake_mode_of(program)
        self._last_placeholder = [node for node in program.graph.nodes if node.op == "placeholder"][-1]
        self._casts: dict[tuple[fx.Node, torch.dtype, bool], fx.Node] = {}

    def weights(self) -> dict[str, TensorSource]:
        """Types of the placeholders; returns the weights that change theirs."""
        changes: dict[str, TensorSource] = {}
        caches = {entry.placeholder for entry in self.program.inputs if entry.role in ("past_key", "past_value")}
        for node in self.program.graph.nodes:
            if node.op != "placeholder" or not _is_float32(node):
                continue
            binding = self.program.bindings.get(node.name)
            if binding is not None and binding.kind == "parameter":
                source = self.program.weights[binding.tensor]
                changes[binding.tensor] = _cast_to(binding.tensor, source, self.reduced)
                self._retype(node, self.reduced)
            elif node.name in caches:
                self._retype(node, self.reduced)
        return changes

    def visit(self, node: fx.Node) -> None:
        """Types of one call: casts before it where its operands differ, and the type of its value."""
        name = qualified_name(node)
        if name.startswith("compile_sparse::dequantize_"):
            self._retype(node, self.reduced)
            return
        if node.target is operator.getitem:
            node.meta["val"] = node.args[0].meta["val"][node.args[1]]  # type: ignore[union-attr, index]
            return
        operands = self._operands(node, _OWN_OPERANDS.get(name, set()))
        floats = [operand for operand in operands if _is_float(operand)]
        if name in _REDUCED:
            wanted = self.reduced
        elif name in _FLOAT32:
            wanted = torch.float32
        elif name in _CASTS and floats:
            wanted = floats[0].meta["val"].dtype  # a cast to the type the program is captured in
        elif floats:
            wanted = self.reduced if all(f.meta["val"].dtype == self.reduced for f in floats) else torch.float32
        else:
            return
        for operand in dict.fromkeys(floats):
            if operand.meta["val"].dtype != wanted:
                node.replace_input_with(
                    operand, self._cast(operand, wanted, masks=name.endswith("dot_product_attention"))
                )
        if name in _CASTS and "dtype" in node.kwargs:
            node.update_kwarg("dtype", wanted)
        self._retype(node, wanted)

    @staticmethod
    def _operands(node: fx.Node, own: set[str]) -> list[fx.Node]:
        if not own:
            return list(node.all_input_nodes)
        schema = node.target._schema.arguments  # type: ignore[union-attr]
        skipped = {value for argument, value in zip(schema, node.args, strict=False) if argument.name in own}
        skipped |= {value for key, value in node.kwargs.items() if key in own}
        return [operand for operand in node.all_input_nodes if operand not in skipped]

    def _cast(self, value: fx.Node, dtype: torch.dtype, *, masks: bool) -> fx.Node:
        """``value`` in another type, made once. Additive masks saturate instead of overflowing to infinity, so that a row which
        sees nothing stays finite.
        """
        key = (value, dtype, masks)
        if key not in self._casts:
            graph = self.program.graph
            with graph.inserting_after(self._last_placeholder if value.op == "placeholder" else value):
                saturated = value
                if masks and dtype != torch.float32:
                    saturated = graph.call_function(torch.ops.aten.clamp_min.default, (value, torch.finfo(dtype).min))
                    saturated.meta.update(val=value.meta["val"])
            with graph.inserting_after(saturated if saturated.op != "placeholder" else self._last_placeholder):
                cast = graph.call_function(torch.ops.aten._to_copy.default, (saturated,), {"dtype": dtype})
            cast.meta["val"] = value.meta["val"]
            self._retype(cast, dtype)
            self._casts[key] = cast
        return self._casts[key]

    def _retype(self, node: fx.Node, dtype: torch.dtype) -> None:
        def retyped(value: Any) -> Any:
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                with self._mode:
                    return torch.empty_like(value, dtype=dtype)
            return value

        value = node.meta["val"]
        node.meta["val"] = type(value)(map(retyped, value)) if isinstance(value, (tuple, list)) else retyped(value)


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype in (torch.float32, torch.float16, torch.bfloat16)


def _is_float32(node: fx.Node) -> bool:
    return _is_float(node) and node.meta["val"].dtype == torch.float32


def _cast_to(name: str, source: TensorSource, dtype: torch.dtype) -> TensorSource:
    if isinstance(source, DowncastTensor) and source.storage == dtype:
        source = source.source  # rounding twice to the same type is rounding once
    if isinstance(source, AbsentTensor):
        return AbsentTensor(source.shape, dtype, source.name)
    return DerivedTensor(source.shape, dtype, _converter(name, source, dtype))


def _converter(name: str, source: TensorSource, dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    def convert() -> torch.Tensor:
        value = source.load()
        cast = value.to(dtype)
        largest = float(cast.abs().max()) if cast.numel() else 0.0
        if largest == float("inf") or largest != largest:
            raise Refusal(
                "CS4431",
                "A weight is out of the range of the artifact's precision.",
                where=name,
                why=f"Its largest magnitude is {float(value.abs().max()):.4g}; "
                f"{str(dtype).removeprefix('torch.')} ends at {torch.finfo(dtype).max:.4g}.",
                hint="Choose --precision bf16, whose range is that of float32.",
            )
        return cast

    return convert
