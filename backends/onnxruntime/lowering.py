"""From a program to the model folder: raise, emit, write."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from compile_sparse.backends.onnx.emission import Emission

# Importing an emitter module registers its operators.
from compile_sparse.backends.onnx.emitters import standard  # noqa: F401
from compile_sparse.backends.onnx.emitters.attention import STANDARD_ATTENTION
from compile_sparse.backends.onnx.external_data import Sink
from compile_sparse.backends.onnx.graph_writer import GraphWriter
from compile_sparse.backends.onnx.interface import add_inputs, add_outputs
from compile_sparse.backends.onnx.writing import DATA_FILE, MODEL_FILE, refuse_unsupported, write_files
from compile_sparse.backends.onnxruntime import emit_norms, linear  # noqa: F401
from compile_sparse.backends.onnxruntime.dialect import DIALECT
from compile_sparse.backends.onnxruntime.emit_attention import GROUPED, refuse_attention
from compile_sparse.backends.onnxruntime.genai import write_genai
from compile_sparse.compiler.diagnostics import Diagnostic
from compile_sparse.compiler.errors import ModelError, Refusal
from compile_sparse.compiler.extension.backend_contract import Lowered
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.lowering import raise_patterns
from compile_sparse.compiler.lowering.rotary import ROTARY_PREFIX
from compile_sparse.compiler.progress import Progress
from compile_sparse.compiler.targets.target import Target

__all__ = ["DATA_FILE", "MANIFEST", "MODEL_FILE", "emit", "rehearse", "write_folder", "write_graph"]

MANIFEST = "compile_sparse.json"


def emit(program: Program, sink: Sink, on_weight: Any = lambda: None) -> Emission:
    """Emit ``program``; weights go to ``sink`` one at a time.

    Raises:
        Refusal: CS2311 when an operator has no ONNX form, CS2312 for half-precision models.
    """
    wrong = _wrong_precision(program)
    if wrong is not None:
        raise Refusal(
            wrong.code, "This backend writes float32 models.", where=wrong.where, why=wrong.why, hint=wrong.hint
        )
    emission = Emission(program, GraphWriter(sink), on_weight, DIALECT)
    symbols = add_inputs(emission)
    emission.run()
    refuse_unsupported(emission)
    add_outputs(emission, symbols)
    return emission


def rehearse(program: Program) -> list[Diagnostic]:
    """Everything that would stop or slow the lowering, without reading weights."""
    wrong = _wrong_precision(program)
    if wrong is not None:
        return [wrong]
    try:
        program, skips = raise_patterns(program, refuse_attention=refuse_attention)
    except ModelError:  # captured without weights, and the rotary angles need one
        skips = []
    emission = Emission(program, GraphWriter(Sink()), dialect=DIALECT)
    add_inputs(emission)
    emission.run()
    return [*skips, *emission.unsupported, *emission.skips]


def write_graph(program: Program, out: Path, progress: Progress) -> tuple[Emission, dict[str, str]]:
    """Write ``model.onnx`` and its weight file for ``program`` as it is; nothing is left behind on failure.

    Returns:
        The emission and the SHA-256 digest of each file.
    """
    return write_files(program, out, lambda sink, on_weight: emit(program, sink, on_weight), progress)


def write_folder(program: Program, target: Target, out: Path, progress: Progress) -> Lowered:
    """Raise ``program`` and write everything the runtimes load into ``out``."""
    raised, skips = raise_patterns(program, refuse_attention=refuse_attention)
    emission, files = write_graph(raised, out, progress)
    grouped = bool(emission.forms.get(GROUPED)) and not emission.forms.get(STANDARD_ATTENTION)
    limits = _limits(emission) if program.kind == "decoder" else []
    inputs = [value.name for value in emission.graph.inputs]
    if program.kind == "decoder":
        written, why_not = write_genai(program, inputs, out, share_buffer=grouped)
        files.update(written)
        limits += [why_not] if why_not else []
    manifest = {"schema_version": 1, "kind": program.kind, "share_buffer": grouped, "inputs": inputs, "limits": limits}
    text = json.dumps(manifest, indent=2).encode()
    (out / MANIFEST).write_bytes(text)
    files[MANIFEST] = hashlib.sha256(text).hexdigest()
    return Lowered(
        files=files, form=dict(sorted(emission.forms.items())), limits=limits, skips=[*skips, *emission.skips]
    )


def _wrong_precision(program: Program) -> Diagnostic | None:
    """The kernels for raised patterns and quantized weights exist in float32 on processors; half precision gains nothing."""
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.op != "placeholder" or not isinstance(value, torch.Tensor) or not value.is_floating_point():
            continue
        if value.dtype != torch.float32:
            why = f"{program.tensor_of(node) or node.name} is {str(value.dtype).removeprefix('torch.')}."
            return Diagnostic(node.name, "CS2312", why, "Capture the model with dtype float32.")
    return None


def _limits(emission: Emission) -> list[str]:
    limits = []
    if emission.forms.get(GROUPED):
        limits += [
            "Pad on the right: with padding on the left the results are silently wrong.",
            "Feed several new tokens on top of a cache (chunked prefill, speculative decoding) with batch size 1 only.",
        ]
    tables = {record.shape[0] for name, record in emission.graph.tensors.items() if name.startswith(ROTARY_PREFIX)}
    if tables:
        limits.append(f"Rotary tables end at position {min(tables)}; longer sequences fail.")
    if any(form.startswith("MatMulNBits") for form in emission.forms):
        limits.append(
            "The kernel rounds activations to 8 bits inside each group, so results differ from exact arithmetic on the same "
            "weights by about as much as 8-bit weights do."
        )
    if any(form.startswith("MatMulIntegerToFloat") for form in emission.forms):
        limits.append(
            "One activation scale covers the whole batch: a row's result depends slightly on the other rows. On processors "
            "without 8-bit dot products set session.x64quantprecision to 1, or sums may saturate."
        )
    return limits
