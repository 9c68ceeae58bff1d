"""The backend's verbs. vLLM itself is never imported here: it lives in an interpreter of its own (``compiler/runtimes.py``)."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compile_sparse.backends.vllm.plugin_files import copy_plugin
from compile_sparse.compiler.cache import cache_key
from compile_sparse.compiler.contract import Lowered, Probe
from compile_sparse.compiler.editing import op_name
from compile_sparse.compiler.errors import EnvironmentFailure, Refusal
from compile_sparse.compiler.runtimes import RuntimeRecord, find_runtime, open_runtimes_folder
from compile_sparse.compiler.skip import Skip
from compile_sparse.compiler.version import TOOL_VERSION
from compile_sparse.compiler.version_numbers import older

if TYPE_CHECKING:
    from compile_sparse.compiler.program import Program
    from compile_sparse.compiler.progress import Progress
    from compile_sparse.compiler.schemes import Scheme
    from compile_sparse.compiler.targets import Target

__all__ = ["VllmBackend"]

_RUNTIME = "vllm"
_HINT = "compile-sparse runtime install vllm"
PLUGIN_FOLDER = "vllm_plugin"
_FOUR_BIT_KERNEL = "cpu_gemm_wna16"


class VllmBackend:
    """Writes checkpoints that vLLM serves, and measures them in vLLM."""

    name = _RUNTIME

    def probe(self, target: Target) -> Probe:
        """What the registered vLLM is, and whether it runs on the target's hardware here."""
        try:
            record = find_runtime(_RUNTIME)
        except EnvironmentFailure as error:
            return Probe(False, _RUNTIME, why_not=f"{error.what} {error.why}", hint=error.hint or _HINT)
        if record is None:
            return Probe(False, _RUNTIME, why_not="No vLLM is registered.", hint=_HINT)
        version = str(record.versions.get("vllm", ""))
        if record.problem:
            return Probe(False, _RUNTIME, version, why_not=record.problem, hint=f"{_HINT} --force")
        wanted = target.minimum_versions.get("vllm", "0")
        if older(version, wanted):
            why = f"vLLM {version} is older than {wanted}, which this target needs."
            return Probe(False, _RUNTIME, version, why_not=why, hint=f"{_HINT} --version {wanted} --force")
        if why := _other_hardware(record, target):
            return Probe(False, _RUNTIME, version, why_not=why)
        facts = {key: record.facts.get(key) for key in ("isa", "capability", "kernels", "int8_saturates")}
        return Probe(True, _RUNTIME, version, target.device, processor=cache_key(facts)[:16])

    def plan(self, program: Program, target: Target) -> Sequence[Skip]:
        """CS42xx and CS43xx for what cannot be written or loaded, CS23xx for what runs slowly. Weights are not read."""
        from compile_sparse.backends.vllm.checkpoint import plan

        return [*_unknown(program), *plan(program, target), *_slow(program, target)]

    def lower(self, program: Program, target: Target, out: Path, progress: Progress) -> Lowered:
        """Write the model folder.

        Raises:
            Refusal: CS42xx or CS43xx.
        """
        from compile_sparse.backends.vllm.checkpoint import PLUGIN_PREFIX, write
        from compile_sparse.backends.vllm.contract import violations

        for skip in _unknown(program):
            raise Refusal(skip.code, "vLLM does not know this model.", where=skip.where, why=skip.why, hint=skip.hint)
        written = write(program, target, out, progress)
        stored = written.form
        notes = [skip for skip in violations(stored.view, stored.coded, target) if not skip.refuses]
        form: dict[str, Any] = {"config": dict(written.changes) or "as the source"}
        files, limits = dict(written.files), []
        if stored.scheme is not None:
            form["quantization"] = "compressed-tensors"
        if stored.own_method:
            kind = "factors" if stored.factored else "2:4 values and positions"
            form["weights"] = f"{kind}, experimental"
        if stored.scales:
            form["key-value cache"] = "fp8 (e4m3), one scale per layer"
        if written.plugin:
            if written.per_layer:
                form["layers"] = f"{written.per_layer} differ from the global config"
            form["plugin"] = PLUGIN_FOLDER
            files |= {f"{PLUGIN_FOLDER}/{name}": digest for name, digest in copy_plugin(out / PLUGIN_FOLDER).items()}
            limits.append(
                f"vLLM needs the compile-sparse plugin to load this model: put the folder {PLUGIN_FOLDER}, which lies in the "
                "model's folder, on PYTHONPATH (or install compile-sparse in vLLM's environment). Without it vLLM says that the "
                f"architecture {PLUGIN_PREFIX}... is not supported, and what to do."
            )
        return Lowered(
            files=files,
            form=form,
            limits=limits,
            skips=[*notes, *_slow(program, target)],
            unrunnable=_unrunnable(stored.scheme, target, fp8_cache=bool(stored.scales)),
        )

    def worker_command(self, target: Target) -> Sequence[str]:
        """The measuring process under the registered interpreter, with our plugin on its path.

        Raises:
            EnvironmentFailure: CS5007 when no vLLM is registered.
        """
        record = find_runtime(_RUNTIME)
        if record is None:
            raise EnvironmentFailure("CS5007", "No vLLM is registered.", where=target.name, hint=_HINT)
        # -P keeps this folder's modules from shadowing the worker's imports.
        return [str(record.python), "-P", str(Path(__file__).with_name("worker.py")), str(_own_plugin())]


def _own_plugin() -> Path:
    """A folder with our plugin alone, for PYTHONPATH. Never an artifact's own copy: what a stranger sends is not run."""
    folder = open_runtimes_folder() / f"vllm-plugin-{TOOL_VERSION}"
    copy_plugin(folder)
    return folder


def _other_hardware(record: RuntimeRecord, target: Target) -> str:
    """Why the registered vLLM's machine is not the target's, or an empty string."""
    if record.device != target.device:
        return (
            f"The registered vLLM runs on {record.device}, the target on {target.device}; nothing was measured there."
        )
    found = str(record.facts.get("capability", ""))
    if target.compute_capability and found != target.compute_capability:
        gpu = record.facts.get("gpu") or "the GPU here"
        return (
            f"{gpu} has compute capability {found}, the target {target.compute_capability}; nothing was measured there."
        )
    return ""


def _unknown(program: Program) -> list[Skip]:
    """CS4305 when the registered vLLM has no class for the model."""
    try:
        record = find_runtime(_RUNTIME)
    except EnvironmentFailure:
        return []
    known = (record.facts.get("architectures") if record else None) or ()
    name = str((program.config.get("architectures") or [""])[0])
    if not known or name in known:
        return []
    near = difflib.get_close_matches(name, known, n=2)
    why = f"vLLM {record.versions.get('vllm', '') if record else ''} has {len(known)} model classes, and not this one."
    hint = f"Its nearest are {' and '.join(near)}. " if near else ""
    return [Skip(f"architectures: {name}", "CS4305", why, f"{hint}Compile for ort-cpu or hf.")]


def _slow(program: Program, target: Target) -> list[Skip]:
    """What was measured to be slower than the dense model on processors like the one here."""
    if target.device != "cpu":
        return []
    isa = _processor()
    four_bit = any(op_name(node) == "dequantize_weight" and node.args[4:5] == (4,) for node in program.graph.nodes)
    eight_bit = any(op_name(node) == "fake_quantize" for node in program.graph.nodes)
    if four_bit and isa == "avx512":
        why = (
            "On processors with AVX-512 and no AMX vLLM's 4-bit kernel is slower than bf16: prefill 0.5x, decode 0.65x on a "
            "152M-parameter Llama, one thread, vLLM 0.32. The file is 0.34x."
        )
        return [
            Skip("--quantize", "CS2332", why, "--quantize w8a8 is faster there: prefill 1.4x to 1.6x, decode 1.3x.")
        ]
    if eight_bit and isa == "avx2":
        why = (
            "On processors without AVX-512 vLLM's int8 products are faster than float32 for prompts and slower for decoding: "
            "prefill 1.5x, decode 0.3x on a 152M-parameter Llama, one thread, vLLM 0.32. The file is 0.56x of bf16."
        )
        return [Skip("--quantize", "CS2332", why, "--prune channels=FRACTION is faster on any processor.")]
    return []


def _unrunnable(scheme: Scheme | None, target: Target, *, fp8_cache: bool = False) -> str:
    """Why the registered vLLM cannot run what was written, although it may elsewhere."""
    try:
        record = find_runtime(_RUNTIME)
    except EnvironmentFailure:
        return ""
    if record is None or target.device != "cpu":
        return ""
    if fp8_cache and _processor() not in ("avx512", "amx"):
        return (
            f"vLLM's 8-bit key-value cache needs a processor with AVX-512; this one has {_processor() or 'none known'}."
        )
    if scheme is None:
        return ""
    version, kernels = record.versions.get("vllm", ""), record.facts.get("kernels") or (_FOUR_BIT_KERNEL,)
    if not scheme.activations and _FOUR_BIT_KERNEL not in kernels:
        return (
            f"vLLM {version} has no kernel for 4-bit weights ({_FOUR_BIT_KERNEL}) on this processor ({_processor()}); it has one "
            "on processors with AVX-512."
        )
    if scheme.activations.startswith("int8") and scheme.weights.bits == 8 and record.facts.get("int8_saturates"):
        return (
            f"On this processor ({_processor()}, without 8-bit dot products) vLLM {version}'s int8 kernel adds in 16 bits and "
            "overflows silently. Compile with 'quantize: {scheme: w8a8, reduce_range: true}' in a recipe, which is exact "
            "everywhere, or measure on a processor with VNNI."
        )
    return ""


def _processor() -> str:
    try:
        record = find_runtime(_RUNTIME)
    except EnvironmentFailure:
        return ""
    return str(record.facts.get("isa", "")) if record else ""
