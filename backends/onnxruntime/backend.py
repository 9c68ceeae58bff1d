"""The backend's verbs. Everything that knows ONNX is imported inside them."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from compile_sparse.backends.worker.start import command
from compile_sparse.compiler.extension.backend_contract import Lowered, LoweringStep, Observation, Probe
from compile_sparse.compiler.extension.run_settings import DEFAULT_SETTINGS, RunSettings
from compile_sparse.compiler.version_numbers import older

if TYPE_CHECKING:
    from compile_sparse.compiler.diagnostics import Diagnostic
    from compile_sparse.compiler.ir.program import Program
    from compile_sparse.compiler.progress import Progress
    from compile_sparse.compiler.targets.target import Target

__all__ = ["OnnxRuntimeBackend"]

_RUNTIME = "onnxruntime"
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class OnnxRuntimeBackend:
    """Lowers programs to ONNX and runs them in ONNX Runtime."""

    name = _RUNTIME

    def probe(self, target: Target) -> Probe:
        """Version and device found here, or why the target cannot run."""
        extra = "ort-cuda" if target.device == "cuda" else "ort"
        hint = f"pip install 'compile-sparse[{extra}]'"
        for package in ("onnx", "onnxruntime"):
            if find_spec(package) is None:
                return Probe(False, _RUNTIME, why_not=f"The package {package} is not installed.", hint=hint)
        try:
            import onnxruntime
        except (ImportError, OSError) as error:
            return Probe(False, _RUNTIME, why_not=f"onnxruntime does not load: {error}.", hint=hint)
        version = str(onnxruntime.__version__)
        wanted = target.minimum_versions.get("onnxruntime", "0")
        if older(version, wanted):
            why = f"onnxruntime {version} is older than {wanted}, which this target needs."
            return Probe(False, _RUNTIME, version, why_not=why, hint=hint + " --upgrade")
        provider = _PROVIDERS.get(target.device)
        if provider is None or provider not in onnxruntime.get_available_providers():
            why = f"This onnxruntime has no support for device {target.device!r}."
            return Probe(False, _RUNTIME, version, why_not=why, hint=hint)
        return Probe(True, _RUNTIME, version, target.device)

    def plan(self, program: Program, target: Target, settings: RunSettings = DEFAULT_SETTINGS) -> Sequence[Diagnostic]:
        """CS2311 for operators without an ONNX form, CS2310 and CS23xx for what runs in a slow form."""
        from compile_sparse.backends.onnxruntime.lowering import rehearse

        return rehearse(program)

    def lower(
        self,
        program: Program,
        target: Target,
        out: Path,
        progress: Progress,
        settings: RunSettings = DEFAULT_SETTINGS,
    ) -> Lowered:
        """Write the model folder.

        Raises:
            Refusal: CS2311 when an operator has no ONNX form.
        """
        from compile_sparse.compiler.lowering import lower_in_steps

        return lower_in_steps(self, program, target, out, progress, settings)

    def lowering_steps(self, target: Target, settings: RunSettings = DEFAULT_SETTINGS) -> Sequence[LoweringStep]:
        """Patterns the runtime has a kernel for."""
        from compile_sparse.backends.onnxruntime.lowering import STEPS

        return STEPS

    def write(
        self,
        program: Program,
        prepared: Program,
        target: Target,
        out: Path,
        progress: Progress,
        settings: RunSettings = DEFAULT_SETTINGS,
    ) -> Lowered:
        """Write the model folder of ``prepared``."""
        from compile_sparse.backends.onnxruntime.lowering import write_folder

        return write_folder(prepared, out, progress)

    def observation(
        self, program: Program, target: Target, model: Path, scratch: Path, settings: RunSettings
    ) -> Observation:
        """A copy of the graph that tells the output of every layer."""
        from compile_sparse.backends.onnxruntime.observation import observe_folder

        return observe_folder(program, model, scratch)

    def cannot_run(self, model: Path, target: Target) -> str:
        """Every folder runs wherever the runtime does."""
        return ""

    def worker_command(self, target: Target, settings: RunSettings = DEFAULT_SETTINGS) -> Sequence[str]:
        """The measuring process; it imports numpy and onnxruntime only."""
        return command("compile_sparse.backends.onnxruntime.worker")
