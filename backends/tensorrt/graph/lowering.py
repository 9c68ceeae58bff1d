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
from compile_sparse.backends.tensorrt.options import engine_settings
from compile_sparse.compiler.diagnostics import Diagnostic
from compile_sparse.compiler.errors import ModelError
from compile_sparse.compiler.extension.backend_contract import LoweringStep
from compile_sparse.compiler.extension.run_settings import RunSettings
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.ir.storage import torch_dtype
from compile_sparse.compiler.lowering import MixedPrecision, raising_steps, run_steps
from compile_sparse.compiler.targets.target import Precision, Target

__all__ = ["interface_of", "lowering_steps", "rehearse"]


def lowering_steps(precision: Precision) -> Sequence[LoweringStep]:
    """Patterns TensorRT has a kernel for, then the types of a strongly typed network."""
    return *raising_steps(refuse_attention), MixedPrecision(torch_dtype(precision))


def interface_of(program: Program, length: int) -> Interface:
    """A decoder's cache is a buffer of ``length`` positions; other models keep their own interface."""
    return static_cache_interface(length) if program.kind == "decoder" else dynamic_interface


def rehearse(program: Program, target: Target, settings: RunSettings) -> list[Diagnostic]:
    """Everything that would stop the lowering or slow its result, without reading weights."""
    try:
        prepared, left = run_steps(program, lowering_steps(settings.precision_on(target)))
    except ModelError:
        return []  # captured without weights, and the rotary angles need one: its attention cannot be looked at
    length = engine_settings(settings, program.config).max_length
    return [*left, *lower.rehearse(prepared, DIALECT, interface_of(program, length))]
