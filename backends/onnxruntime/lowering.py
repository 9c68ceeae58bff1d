"""From a program to the model folder: the steps it goes through, the graph, and what stands beside it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch

from compile_sparse.backends.onnx import lower
from compile_sparse.backends.onnx.emission import Emission

# Importing an emitter module registers its operators.
from compile_sparse.backends.onnx.emitters import standard  # noqa: F401
from compile_sparse.backends.onnx.emitters.attention import STANDARD_ATTENTION
from compile_sparse.backends.onnx.interface import dynamic_interface
from compile_sparse.backends.onnxruntime import emit_activations, emit_norms, linear  # noqa: F401
from compile_sparse.backends.onnxruntime.dialect import DIALECT
from compile_sparse.backends.onnxruntime.emit_attention import GROUPED, refuse_attention
from compile_sparse.backends.onnxruntime.genai import write_genai
from compile_sparse.compiler.capture.side_files import write_labels, write_side_files
from compile_sparse.compiler.diagnostics import Diagnostic
from compile_sparse.compiler.errors import ModelError, Refusal
from compile_sparse.compiler.extension.backend_contract import Lowered
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.lowering import raising_steps, run_steps
from compile_sparse.compiler.lowering.rotary import ROTARY_PREFIX
from compile_sparse.compiler.progress import Progress

__all__ = ["MANIFEST", "STEPS", "declare_interface", "rehearse", "write_folder", "write_graph"]

MANIFEST = "compile_sparse.json"
STEPS = raising_steps(refuse_attention)


def rehearse(program: Program) -> list[Diagnostic]:
    """Everything that would stop or slow the lowering, without reading weights."""
    try:
        program, left = run_steps(program, STEPS)
    except ModelError:  # captured without weights, and the rotary angles need one
        left = []
    return [*left, *lower.rehearse(program, DIALECT, declare_interface)]


def write_graph(program: Program, out: Path, progress: Progress) -> tuple[Emission, dict[str, str]]:
    """``model.onnx`` and its weight file for ``program`` as it is: the emission, and the SHA-256 digest of each file.

    Raises:
        Refusal: CS2311 when an operator has no ONNX form, CS2312 for half-precision models.
    """
    return lower.write_graph(program, DIALECT, declare_interface, out, progress)


def write_folder(prepared: Program, out: Path, progress: Progress) -> Lowered:
    """Write everything the runtimes load into ``out``; ``prepared`` is a program after ``STEPS``."""
    emission, files = write_graph(prepared, out, progress)
    grouped = bool(emission.forms.get(GROUPED)) and not emission.forms.get(STANDARD_ATTENTION)
    limits = _limits(emission) if prepared.kind == "decoder" else []
    inputs = [value.name for value in emission.graph.inputs]
    # Whoever calls the graph needs the tokenizer, the pooling and the preparation of images, and so does measuring it again.
    files.update(write_side_files(prepared, out))
    if prepared.kind == "decoder":
        written, said = write_genai(prepared, inputs, out, share_buffer=grouped)
        files.update(written)
        limits += said
    else:
        files.update(write_labels(prepared, out))
    manifest = {"schema_version": 1, "kind": prepared.kind, "share_buffer": grouped, "inputs": inputs, "limits": limits}
    text = json.dumps(manifest, indent=2).encode()
    (out / MANIFEST).write_bytes(text)
    files[MANIFEST] = hashlib.sha256(text).hexdigest()
    return Lowered(
        files=files, form=dict(sorted(emission.forms.items())), limits=limits, diagnostics=emission.diagnostics
    )


def declare_interface(emission: Emission) -> Callable[[], None]:
    """The kernels for raised patterns and quantized weights exist in float32 on processors; half precision gains nothing.

    Raises:
        Refusal: CS2312, a weight or an input is in half precision.
    """
    program = emission.program
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.op != "placeholder" or not isinstance(value, torch.Tensor) or not value.is_floating_point():
            continue
        if value.dtype != torch.float32:
            raise Refusal(
                "CS2312",
                "This backend writes float32 models.",
                where=node.name,
                why=f"{program.tensor_of(node) or node.name} is {str(value.dtype).removeprefix('torch.')}.",
                hint="Capture the model with dtype float32.",
            )
    return dynamic_interface(emission)


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
            "On processors without 8-bit dot products set session.x64quantprecision to 1, or sums may saturate."
        )
    return limits
