"""What the processor or GPU of the registered vLLM can run, and what it runs slowly: facts of its check, applied."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from compile_sparse.compiler.diagnostics import Diagnostic
from compile_sparse.compiler.errors import EnvironmentFailure
from compile_sparse.compiler.ir.edit import op_name
from compile_sparse.compiler.runtimes.environments import RuntimeRecord, find_runtime

if TYPE_CHECKING:
    from compile_sparse.compiler.ir.program import Program
    from compile_sparse.compiler.targets.target import Target

__all__ = ["cannot_run", "other_hardware", "registered", "slow"]

_FOUR_BIT_KERNEL = "cpu_gemm_wna16"
_REDUCED = 63
"""Largest code of 7 bits: pairs of products with 8-bit activations then fit in 16 bits."""


def registered() -> RuntimeRecord | None:
    """The registered vLLM; None without one, or when its record is damaged."""
    try:
        return find_runtime("vllm")
    except EnvironmentFailure:
        return None


def other_hardware(record: RuntimeRecord, target: Target) -> str:
    """Why the registered vLLM's machine is not the target's, or an empty string."""
    if record.device != target.device:
        return (
            f"The registered vLLM runs on {record.device}, the target on {target.device}; nothing was measured there."
        )
    gpu, found = str(record.facts.get("gpu") or "the GPU here"), str(record.facts.get("capability", ""))
    if target.compute_capability and found != target.compute_capability:
        return (
            f"{gpu} has compute capability {found}, the target {target.compute_capability}; nothing was measured there."
        )
    if target.gpu and not re.search(rf"\b{re.escape(target.gpu)}\b", gpu):
        return f"The target is an {target.gpu}, the GPU here is called {gpu!r}; nothing was measured there."
    return ""


def slow(program: Program, target: Target) -> list[Diagnostic]:
    """CS2332 for what was measured to be slower than the dense model on processors like the one here."""
    record = registered()
    if target.device != "cpu" or record is None:
        return []
    isa = str(record.facts.get("isa", ""))
    four_bit = any(op_name(node) == "dequantize_weight" and node.args[4:5] == (4,) for node in program.graph.nodes)
    eight_bit = any(
        op_name(node) == "fake_quantize" and str(node.args[1]).startswith("int8") for node in program.graph.nodes
    )
    if four_bit and isa == "avx512":
        why = (
            "On processors with AVX-512 and no AMX vLLM's 4-bit kernel is slower than bf16: prefill 0.5x, decode 0.65x on a "
            "152M-parameter Llama, one thread, vLLM 0.32. The file is 0.34x."
        )
        return [
            Diagnostic(
                "--quantize", "CS2332", why, "--quantize w8a8 is faster there: prefill 1.4x to 1.6x, decode 1.3x."
            )
        ]
    if eight_bit and isa == "avx2":
        why = (
            "On processors without AVX-512 vLLM's int8 GEMMs are faster than float32 for prompts and slower for decoding: "
            "prefill 1.5x, decode 0.3x on a 152M-parameter Llama, one thread, vLLM 0.32. The file is 0.56x of bf16."
        )
        return [Diagnostic("--quantize", "CS2332", why, "--prune channels=FRACTION is faster on any processor.")]
    return []


def cannot_run(model: Path, target: Target) -> str:
    """Why the registered vLLM cannot run the checkpoint in ``model`` on its processor, although vLLM can elsewhere."""
    record = registered()
    if record is None or target.device != "cpu":
        return ""
    config = json.loads((model / "config.json").read_text(encoding="utf-8")).get("quantization_config") or {}
    isa, version = str(record.facts.get("isa") or "unknown"), record.versions.get("vllm", "")
    kernels = record.facts.get("kernels") or (_FOUR_BIT_KERNEL,)
    if config.get("kv_cache_scheme") and isa not in ("avx512", "amx"):
        return f"vLLM's 8-bit key-value cache needs a processor with AVX-512; this one has {isa}."
    if config.get("format") == "pack-quantized" and _FOUR_BIT_KERNEL not in kernels:
        return (
            f"vLLM {version} has no kernel for 4-bit weights ({_FOUR_BIT_KERNEL}) on this processor ({isa}); it has one on "
            "processors with AVX-512."
        )
    if (
        config.get("format") == "int-quantized"
        and record.facts.get("int8_saturates")
        and _largest_code(model) > _REDUCED
    ):
        return (
            f"On this processor ({isa}, without 8-bit dot products) vLLM {version}'s int8 kernel adds in 16 bits and overflows "
            "silently. Compile with 'quantize: {scheme: w8a8, reduce_range: true}' in a recipe, which is exact everywhere, or "
            "measure on a processor with VNNI."
        )
    return ""


def _largest_code(model: Path) -> int:
    """Of the first int8 weight in the folder: every row of every weight uses its whole range."""
    for path in sorted(model.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - the reader is no mapping
                part: Any = file.get_slice(name)
                if part.get_dtype() == "I8" and len(part.get_shape()) == 2:
                    return int(file.get_tensor(name).short().abs().max())
    return 0
