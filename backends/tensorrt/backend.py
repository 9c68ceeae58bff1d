"""The backend's verbs. Builders and runtimes are started in processes of their own; nothing of theirs is imported here."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from compile_sparse.backends.tensorrt.layout import DERIVED, TWIN
from compile_sparse.backends.tensorrt.options import TensorRtOptions, TensorRtVerifyOptions
from compile_sparse.compiler.extension.backend_contract import Lowered, LoweringStep, Probe
from compile_sparse.compiler.extension.run_settings import DEFAULT_SETTINGS, RunSettings

if TYPE_CHECKING:
    from compile_sparse.compiler.diagnostics import Diagnostic
    from compile_sparse.compiler.ir.program import Program
    from compile_sparse.compiler.progress import Progress
    from compile_sparse.compiler.targets.target import Target

__all__ = ["TensorRtBackend"]

_WORKER = (sys.executable, "-P", "-m", "compile_sparse.backends.tensorrt.run.worker")


class TensorRtBackend:
    """Lowers programs to a strongly typed ONNX graph, builds engines from it and measures them on the target's GPU."""

    name = "tensorrt"
    options = TensorRtOptions
    verify_options = TensorRtVerifyOptions
    derived = DERIVED

    def probe(self, target: Target) -> Probe:
        """Whether TensorRT and the target's GPU are here."""
        from compile_sparse.backends.tensorrt.processor import probe_runtime

        return probe_runtime(target)

    def plan(self, program: Program, target: Target, settings: RunSettings = DEFAULT_SETTINGS) -> Sequence[Diagnostic]:
        """CS2311 for operators without a form, CS4411 for caches that cannot be static, CS23xx for what was not recognised."""
        from compile_sparse.backends.tensorrt.graph.lowering import rehearse

        return rehearse(program, target, settings)

    def lower(
        self,
        program: Program,
        target: Target,
        out: Path,
        progress: Progress,
        settings: RunSettings = DEFAULT_SETTINGS,
    ) -> Lowered:
        """Write the graph, check or build its engine, and the same model as a unified Hugging Face checkpoint.

        Raises:
            Refusal: CS2311, CS44xx (graph and builder), CS4501 (a layer that lost its zeros).
            EnvironmentFailure: CS52xx, the builder.
        """
        from compile_sparse.compiler.lowering import lower_in_steps

        return lower_in_steps(self, program, target, out, progress, settings)

    def lowering_steps(self, target: Target, settings: RunSettings = DEFAULT_SETTINGS) -> Sequence[LoweringStep]:
        """Patterns TensorRT has a kernel for, and types."""
        from compile_sparse.backends.tensorrt.graph.lowering import lowering_steps

        return lowering_steps(settings.precision_on(target))

    def write(
        self,
        program: Program,
        prepared: Program,
        target: Target,
        out: Path,
        progress: Progress,
        settings: RunSettings = DEFAULT_SETTINGS,
    ) -> Lowered:
        """Write the model folder: the graph of ``prepared``, the checkpoint of ``program``."""
        from compile_sparse.backends.tensorrt.folder import write_folder

        return write_folder(program, prepared, target, out, progress, settings)

    def cannot_run(self, model: Path, target: Target) -> str:
        """The folder has no engine for the GPU here."""
        from compile_sparse.backends.tensorrt.description import read_description
        from compile_sparse.backends.tensorrt.engine.engines import choose_engine
        from compile_sparse.backends.tensorrt.processor import here
        from compile_sparse.compiler.errors import CompileSparseError

        try:
            record = choose_engine(read_description(model), here())
        except CompileSparseError as error:
            return f"{error.what} {error.why} {error.hint}".strip()
        if record.builder != "tensorrt":
            return (
                "Its engine is TensorRT-RTX's, and the dense baseline's TensorRT's: a process loads one of them only, so they "
                "are not measured against each other. Compile without --engine rtx-aot."
            )
        return ""

    def worker_command(self, target: Target, settings: RunSettings = DEFAULT_SETTINGS) -> Sequence[str]:
        """The measuring process on the GPU."""
        given = settings.verifying
        foreign = isinstance(given, TensorRtVerifyOptions) and given.allow_foreign_engine
        return [*_WORKER, "engine", *(["--allow-foreign-engine"] if foreign else [])]

    def dense_build(self, model: Path) -> Path | None:
        """The twin, where an engine with sparse kernels was built."""
        twin = model / TWIN
        return twin if twin.is_dir() else None

    def reference_command(self, target: Target) -> Sequence[str]:
        """The same graph in ONNX Runtime on the processor: its answers are the graph's."""
        from compile_sparse.backends.tensorrt.processor import reference_version

        return [*_WORKER, "reference"] if reference_version() else []

    def reference_refusal(self, model: Path, target: Target) -> str:
        """The graph has operators of TensorRT's own (NVFP4)."""
        from compile_sparse.backends.onnx.external_data import MODEL_FILE
        from compile_sparse.backends.tensorrt.run.portable import reference_refusal

        return reference_refusal(model / MODEL_FILE)
