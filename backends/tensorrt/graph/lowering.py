"""From a program to the graph TensorRT parses: raise, assign types, emit."""

from __future__ import annotations

from collections.abc import Callable

import torch

from compile_sparse.backends.onnx.emission import Emission
from compile_sparse.backends.onnx.emitters import standard  # noqa: F401  (registers operators)
from compile_sparse.backends.onnx.external_data import Sink
from compile_sparse.backends.onnx.graph_writer import GraphWriter
from compile_sparse.backends.onnx.interface import add_inputs, add_outputs
from compile_sparse.backends.onnx.writing import refuse_unsupported
from compile_sparse.backends.tensorrt.graph import (
    emit_attention,  # noqa: F401
    emit_batch_norm,  # noqa: F401
    linear,  # noqa: F401
)
from compile_sparse.backends.tensorrt.graph.cache import add_decoder_inputs, add_decoder_outputs, unraised
from compile_sparse.backends.tensorrt.graph.dialect import DIALECT
from compile_sparse.backends.tensorrt.graph.emit_attention import refuse_attention
from compile_sparse.compiler.diagnostics import Diagnostic
from compile_sparse.compiler.errors import ModelError
from compile_sparse.compiler.ir.model_facts import context_length
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.ir.storage import torch_dtype
from compile_sparse.compiler.lowering import raise_patterns
from compile_sparse.compiler.lowering.mixed_precision import in_precision
from compile_sparse.compiler.pipeline.building import LONGEST_CACHE
from compile_sparse.compiler.targets.target import Build, Target

__all__ = ["build_of", "emit", "half_precision_nodes", "prepared", "rehearse"]


def build_of(target: Target, program: Program) -> Build:
    """What engines are built for, within what the model can do."""
    context = context_length(program.config)
    found = target.build or Build(
        batch=1, largest_batch=1, prompt=128, max_length=min(context or LONGEST_CACHE, LONGEST_CACHE)
    )
    longest = min(found.max_length, context) if context else found.max_length
    return found.model_copy(update={"max_length": longest, "prompt": min(found.prompt, longest)})


def prepared(program: Program, target: Target) -> tuple[Program, list[Diagnostic]]:
    """``program`` raised and typed, ready for ``emit``."""
    raised, skips = raise_patterns(program, refuse_attention=refuse_attention)
    return in_precision(raised, torch_dtype(target.baseline_precision)), skips


def half_precision_nodes(program: Program) -> tuple[Program, list[str]]:
    """The raised program, which still computes in float32, and its nodes whose values the graph keeps in fp16."""
    raised, _ = raise_patterns(program, refuse_attention=refuse_attention)
    here = {node.name for node in raised.graph.nodes}
    typed = in_precision(raised, torch.float16)
    names = [
        node.name
        for node in typed.graph.nodes
        if node.op == "call_function"
        and node.name in here
        and getattr(node.meta.get("val"), "dtype", None) == torch.float16
    ]
    return raised, names


def emit(program: Program, sink: Sink, length: int, on_weight: Callable[[], None]) -> tuple[Emission, dict[str, str]]:
    """Emit a prepared program; weights go to ``sink`` one at a time.

    Args:
        program: from ``prepared``.
        sink: where weights go.
        length: of the cache (decoders).
        on_weight: called after each weight.

    Returns:
        The emission, and cache output -> the input whose memory it must share.

    Raises:
        Refusal: CS2311 an operator without an ONNX form, CS4431 a weight out of range, CS4411 a cache that cannot be static.
    """
    emission = Emission(program, GraphWriter(sink), on_weight, DIALECT)
    decoder = program.kind == "decoder"
    symbols: dict[str, str] = {}
    if decoder:
        add_decoder_inputs(emission, length)
    else:
        symbols = add_inputs(emission)
    emission.run()
    refuse_unsupported(emission)
    if decoder:
        return emission, add_decoder_outputs(emission)
    add_outputs(emission, symbols)
    return emission, {}


def rehearse(program: Program, target: Target) -> list[Diagnostic]:
    """Everything that would stop the lowering or slow its result, without reading weights."""
    try:
        program, skips = prepared(program, target)
    except ModelError:  # captured without weights, and the rotary angles need one
        program, skips = in_precision(program, torch.float16), []
        if program.kind == "decoder":
            return skips  # its attention cannot be looked at
    if program.kind == "decoder" and (problem := unraised(program)) is not None:
        return [problem, *skips]
    emission = Emission(program, GraphWriter(Sink()), dialect=DIALECT)
    if program.kind == "decoder":
        add_decoder_inputs(emission, build_of(target, program).max_length)
    else:
        add_inputs(emission)
    emission.run()
    return [*skips, *emission.unsupported, *emission.skips]
