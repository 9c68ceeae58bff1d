"""The backend's verbs. Everything that knows transformers is imported inside them."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from compile_sparse.backends.worker.start import command
from compile_sparse.compiler.diagnostics import Diagnostic
from compile_sparse.compiler.errors import Refusal
from compile_sparse.compiler.extension.backend_contract import Lowered, Observation, Probe
from compile_sparse.compiler.extension.run_settings import DEFAULT_SETTINGS, RunSettings

if TYPE_CHECKING:
    from compile_sparse.compiler.ir.program import Program
    from compile_sparse.compiler.progress import Progress
    from compile_sparse.compiler.targets.target import Target

__all__ = ["HuggingFaceBackend"]

_RUNTIME = "transformers"


class HuggingFaceBackend:
    """Writes checkpoints of transformers' own classes and runs them in transformers."""

    name = "huggingface"

    def probe(self, target: Target) -> Probe:
        """transformers is a dependency of this package, so it is here unless the installation is broken."""
        try:
            found = version(_RUNTIME)
        except PackageNotFoundError:
            return Probe(
                False, _RUNTIME, why_not="The package transformers is not installed.", hint="pip install transformers"
            )
        if target.device != "cpu":
            return Probe(False, _RUNTIME, found, why_not=f"Device {target.device!r} is not measured.")
        return Probe(True, _RUNTIME, found, target.device)

    def plan(self, program: Program, target: Target, settings: RunSettings = DEFAULT_SETTINGS) -> Sequence[Diagnostic]:
        """CS42xx when no config of the model's class has these shapes. Weights are not read."""
        from compile_sparse.backends.checkpoint.checkpoint import plan_checkpoint

        try:
            plan_checkpoint(program)
        except Refusal as error:
            return [Diagnostic.of(error)]
        return []

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
            Refusal: CS42xx when the model's class cannot express the program.
        """
        from compile_sparse.backends.checkpoint.checkpoint import write_checkpoint

        written = write_checkpoint(program, out, progress)
        limits = []
        if written.unused:
            more = f" and {len(written.unused) - 1} more" if len(written.unused) > 1 else ""
            limits.append(
                f"{written.unused[0]}{more} take no part in the outputs and are not in the folder; transformers "
                "starts them anew."
            )
        form = {"config": dict(written.changes) or "as the source"}
        return Lowered(files=written.files, form=form, limits=limits)

    def observation(
        self, program: Program, target: Target, model: Path, scratch: Path, settings: RunSettings
    ) -> Observation:
        """Modules tell their outputs by hooks."""
        from compile_sparse.backends.checkpoint.layer_modules import layer_modules

        return Observation(model, layer_modules(program), program)

    def cannot_run(self, model: Path, target: Target) -> str:
        """Every folder runs wherever the runtime does."""
        return ""

    def worker_command(self, target: Target, settings: RunSettings = DEFAULT_SETTINGS) -> Sequence[str]:
        """The measuring process; it imports torch and transformers only."""
        return command("compile_sparse.backends.huggingface.worker")
