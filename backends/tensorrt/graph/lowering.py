"""From a program to the graph TensorRT parses: the steps it goes through, and its interface."""

from __future__ import annotations

from collections.abc import Sequence

from compile_sparse.backends.onnx import lower
from compile_sparse.backends.onnx.emitters import standard  # noqa: F401  (registers operators)
from compile_sparse.backends.onnx.interface import Interface, dynamic_interface
from compile_sparse.backends.tensorrt.graph import (
    emit_attention,  # noqa: F401
    emit_batch_norm,  # noqa: F401
    linear,  # noqa: F401
)
from compile_sparse.backends.tensorrt.graph.cache import static_cache_interface
from compile_sparse.backends.tensorrt.graph.dialect import DIALECT
from compile_sparse.backends.tensorrt.graph.emit_attention import refuse_attention
from compile_sparse.compiler.diagnostics import Diagnostic
from compile_sparse.compiler.errors import ModelError
from compile_sparse.compiler.extension.backend_contract import LoweringStep
from compile_sparse.compiler.ir.model_facts import context_length
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.ir.storage import torch_dtype
from compile_sparse.compiler.lowering import MixedPrecision, raising_steps, run_steps
from compile_sparse.compiler.pipeline.building import LONGEST_CACHE
from compile_sparse.compiler.targets.target import Build, Target

__all__ = ["build_of", "interface_of", "lowering_steps", "rehearse"]


def build_of(target: Target, program: Program) -> Build:
    """What engines are built for, within what the model can do."""
    context = context_length(program.config)
    found = target.build or Build(
        batch=1, largest_batch=1, prompt=128, max_length=min(context or LONGEST_CACHE, LONGEST_CACHE)
    )
    longest = min(found.max_length, context) if context else found.max_length
    return found.model_copy(update={"max_length": longest, "prompt": min(found.prompt, longest)})


def lowering_steps(target: Target) -> Sequence[LoweringStep]:
    """Patterns TensorRT has a kernel for, then the types of a strongly typed network."""
    return *raising_steps(refuse_attention), MixedPrecision(torch_dtype(target.baseline_precision))


def interface_of(program: Program, length: int) -> Interface:
    """A decoder's cache is a buffer of ``length`` positions; other models keep their own interface."""
    return static_cache_interface(length) if program.kind == "decoder" else dynamic_interface


def rehearse(program: Program, target: Target) -> list[Diagnostic]:
    """Everything that would stop the lowering or slow its result, without reading weights."""
    try:
        prepared, left = run_steps(program, lowering_steps(target))
    except ModelError:
        return []  # captured without weights, and the rotary angles need one: its attention cannot be looked at
    return [*left, *lower.rehearse(prepared, DIALECT, interface_of(program, build_of(target, program).max_length))]
