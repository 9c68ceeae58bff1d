"""Quantize the key-value cache to 8-bit floating point."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import fx

from compile_sparse.compiler.diagnostics import Diagnostic
from compile_sparse.compiler.errors import ModelError, Refusal, UsageError
from compile_sparse.compiler.extension.pass_contract import Pass, PassContext, PassResult, Phase
from compile_sparse.compiler.ir.edit import add_weight, eliminate_dead_code, fake_mode_of, op_name
from compile_sparse.compiler.ir.ops.quantization import FP8_MAX
from compile_sparse.compiler.ir.program import Binding, Program
from compile_sparse.compiler.ir.weights import AbsentTensor, ResidentTensor, TensorSource
from compile_sparse.passes.statistics.ranges import largest_magnitudes

__all__ = ["QuantizeCache"]

ours = torch.ops.compile_sparse


class QuantizeCache(Pass):
    """Quantize new keys and values before they enter the cache: ``cat(past, x)`` becomes ``cat(past, dequantize(quantize(x)))``.

    e4m3 with one scale for the keys and one for the values of each layer, ``max|x| / 448`` on calibration text (as in vLLM,
    where it halves the cache's bytes, arXiv:2209.05433 for the format). Attention sees the dequantized values, those of the
    present token included, as runtimes do that read everything from the cache.

    Leaves alone: caches that are not extended by a plain concatenation.

    Raises:
        Refusal: CS4102, the target's runtime has no such cache.
        ModelError: CS2206, the model has no cache of that form.
        UsageError: CS1121, there is no calibration text.
    """

    name: ClassVar[str] = "quantize-cache"
    phase: ClassVar[Phase] = "quantization"
    changes_numerics: ClassVar[bool] = True

    format: Literal["fp8"] = Field(
        default="fp8", description="of cached keys and values; fp8: e4m3, one scale per layer"
    )

    def run(self, program: Program, context: PassContext) -> PassResult:
        self._require(context)
        edited = program.clone()
        entries, diagnostics = _new_entries(edited)
        if not entries:
            raise ModelError(
                "CS2206",
                "There is no key-value cache to quantize.",
                where="quantize-cache",
                why=diagnostics[0].why if diagnostics else "The model has none.",
                hint="Leave --kv-cache out.",
            )
        ranges = None if context.plan_only else largest_magnitudes(edited, entries.values(), context)
        bindings = dict(edited.bindings)
        added: dict[str, TensorSource] = {}
        for name, value in entries.items():
            source: TensorSource = AbsentTensor((1,), torch.float32, name)
            if ranges is not None:
                source = ResidentTensor(torch.tensor([(ranges[value.name] or 1.0) / FP8_MAX], dtype=torch.float32))
            added[f"{name}.scale"] = source
        for node, output in zip(edited.output_nodes, edited.outputs, strict=True):
            if output.name not in entries:
                continue
            tensor = f"{output.name}.scale"
            scale = add_weight(edited, bindings, tensor.replace(".", "_"), Binding(tensor, "buffer"), added[tensor])
            _quantize_entry(edited, node, entries[output.name], scale)
        result = eliminate_dead_code(replace(edited, weights=edited.weights.updated(added), bindings=bindings))
        return PassResult(
            program=result,
            modified=True,
            requested={"format": self.format},
            achieved={"tensors": len(entries), "bits_per_element": 8},
            diagnostics=tuple(diagnostics),
        )

    def _require(self, context: PassContext) -> None:
        if self.format not in context.target.cache_formats:
            raise Refusal(
                "CS4102",
                f"{context.target.name} cannot run an {self.format} key-value cache.",
                where="--kv-cache",
                why=f"It has {', '.join(context.target.cache_formats) or 'no quantized cache'}.",
                hint="Leave the option out, or choose another target.",
            )
        if context.calibration is None and not context.plan_only:
            raise UsageError(
                "CS1121",
                "Quantizing the cache needs calibration text.",
                where="--kv-cache",
                why="The ranges of keys and values are fixed ahead, from what they are on that text.",
                hint="Give --calibration FILE.",
            )


def _new_entries(program: Program) -> tuple[dict[str, fx.Node], list[Diagnostic]]:
    """Cache output -> what is appended to it."""
    past = {entry.placeholder for entry in program.inputs if entry.role in ("past_key", "past_value")}
    found: dict[str, fx.Node] = {}
    diagnostics: list[Diagnostic] = []
    for node, output in zip(program.output_nodes, program.outputs, strict=True):
        if output.role not in ("present_key", "present_value"):
            continue
        parts = node.all_input_nodes if op_name(node) == "cat" else []
        if len(parts) == 2 and parts[0].name in past:
            found[output.name] = parts[1]
        else:
            diagnostics.append(
                Diagnostic(output.name, "CS2207", "This cache is not extended by a plain concatenation.")
            )
    return found, diagnostics


def _quantize_entry(program: Program, cat: fx.Node, value: fx.Node, scale: fx.Node) -> None:
    with program.graph.inserting_before(cat):
        quantized = program.graph.call_function(ours.fake_quantize.default, (value, "fp8-static", scale))
    with fake_mode_of(program):
        quantized.meta["val"] = ours.fake_quantize.default(value.meta["val"], "fp8-static", scale.meta["val"])
    cat.args = ([cat.args[0][0], quantized], *cat.args[1:])  # type: ignore[index]
