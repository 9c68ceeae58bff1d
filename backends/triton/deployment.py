"""The deployment ``triton``: a model repository for the backend that belongs to the target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from compile_sparse.compiler.diagnostics import Diagnostic
from compile_sparse.compiler.errors import Refusal
from compile_sparse.compiler.extension.deployments import Deployed
from compile_sparse.compiler.extension.run_settings import DEFAULT_SETTINGS, RunSettings

if TYPE_CHECKING:
    from compile_sparse.backends.triton.repository import Backend
    from compile_sparse.compiler.targets.target import Target

__all__ = ["TritonDeployment"]

_BACKENDS: dict[str, Backend] = {"onnxruntime": "onnxruntime", "tensorrt": "tensorrt", "vllm": "vllm"}
"""Backend of a target -> Triton's backend."""


class TritonDeployment:
    """Writes ``NAME/config.pbtxt`` and ``NAME/1/``."""

    name = "triton"

    def refusals(self, kind: str, target: Target, settings: RunSettings = DEFAULT_SETTINGS) -> Sequence[Diagnostic]:
        """CS4620 for targets that no backend of Triton serves, CS4621 for decoders in TensorRT, CS4622 without its engine."""
        if target.backend not in _BACKENDS:
            why = (
                f"Triton has backends for {', '.join(_BACKENDS)} artifacts; {target.name} writes for {target.backend}."
            )
            return [Diagnostic("--emit triton", "CS4620", why, "Choose a target of one of these.", severity="error")]
        if target.backend == "tensorrt" and kind == "decoder":
            from compile_sparse.backends.triton.serve_tensorrt import aliased

            error = aliased()
            return [Diagnostic.of(error)]
        if target.backend == "tensorrt" and (why := _no_engine(target, settings)):
            return [
                Diagnostic(
                    "--emit triton",
                    "CS4622",
                    why,
                    "Compile on a machine with the GPU, or for an ort-* target.",
                    severity="error",
                )
            ]
        return []

    def write(
        self,
        model: Path,
        out: Path,
        *,
        name: str,
        target: Target,
        largest_batch: int,
        known: Mapping[str, str],
        settings: RunSettings = DEFAULT_SETTINGS,
    ) -> Deployed:
        """Write ``out/name``. See ``repository.write_repository``.

        Raises:
            UsageError: CS1062.
            Refusal: CS4419, CS4620 to CS4625.
            EnvironmentFailure: CS5003, CS5012.
        """
        from compile_sparse.backends.triton.repository import write_repository

        if target.backend not in _BACKENDS:
            skip = self.refusals("", target)[0]
            raise Refusal(
                skip.code, "This target has no Triton backend.", where=skip.where, why=skip.why, hint=skip.hint
            )
        written = write_repository(
            model,
            out,
            name=name,
            backend=_BACKENDS[target.backend],
            device=target.device,
            largest_batch=largest_batch,
            gpus=settings.tensor_parallel,
            known=known,
        )
        limits = list(written.limits)
        wanted = target.minimum_versions.get("onnxruntime")
        if target.backend == "onnxruntime" and wanted:
            limits.append(f"Triton's onnxruntime must be {wanted} or later.")
        return Deployed(written.files, limits)


def _no_engine(target: Target, settings: RunSettings) -> str:
    """Why no engine that Triton's TensorRT backend loads will be built here, or an empty string."""
    from compile_sparse.backends.tensorrt.options import EngineSettings
    from compile_sparse.backends.tensorrt.processor import probe_runtime

    build = settings.options
    if isinstance(build, EngineSettings) and build.engine != "auto":
        return f"Triton's backend loads engines of TensorRT, and --engine {build.engine} builds none."
    return probe_runtime(target).why_not
