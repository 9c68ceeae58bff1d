"""A backend without a runtime: it writes what it was given, so that the whole pipeline can be tested and inspected."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from compile_sparse.compiler.errors import EnvironmentFailure
from compile_sparse.compiler.extension.backend_contract import Lowered, Probe
from compile_sparse.compiler.extension.run_settings import DEFAULT_SETTINGS, RunSettings

if TYPE_CHECKING:
    from compile_sparse.compiler.diagnostics import Diagnostic
    from compile_sparse.compiler.ir.program import Program
    from compile_sparse.compiler.progress import Progress
    from compile_sparse.compiler.targets.target import Target

__all__ = ["NullBackend"]

_WHY = "This target has no runtime."


class NullBackend:
    """Writes ``program.txt`` (the graph, printed) and ``weights.safetensors`` (as stored in the program)."""

    name = "null"

    def probe(self, target: Target) -> Probe:
        """Never available."""
        return Probe(
            available=False, runtime="null", why_not=_WHY, hint="Choose another target; see 'compile-sparse targets'."
        )

    def plan(self, program: Program, target: Target, settings: RunSettings = DEFAULT_SETTINGS) -> Sequence[Diagnostic]:
        """Nothing is refused: every program can be printed."""
        return ()

    def lower(
        self,
        program: Program,
        target: Target,
        out: Path,
        progress: Progress,
        settings: RunSettings = DEFAULT_SETTINGS,
    ) -> Lowered:
        """Write the program into the empty folder ``out``; memory follows the largest tensor.

        Raises:
            ModelError: CS2001 when the program was captured without weights.
        """
        from compile_sparse.compiler.files.digests import digest_file
        from compile_sparse.compiler.ir.safetensors_stream import write_safetensors

        listing = out / "program.txt"
        lines = [f"# {program.kind} for {target.name}"]
        lines += [f"# weight {node}: {binding.tensor} ({binding.kind})" for node, binding in program.bindings.items()]
        lines += [f"# alias {name}: {bound}" for name, bound in sorted(program.aliases.items())]
        listing.write_text("\n".join([*lines, str(program.graph), ""]), encoding="utf-8")
        weights = out / "weights.safetensors"
        with progress.task("writing weights", total=len(program.weights)) as task:
            digest = write_safetensors(weights, dict(sorted(program.weights.items())), on_tensor=task.advance)
        return Lowered(
            files={listing.name: digest_file(listing)[0], weights.name: digest}, form={"weights": "as stored"}
        )

    def cannot_run(self, model: Path, target: Target) -> str:
        """Every folder runs wherever the runtime does."""
        return ""

    def worker_command(self, target: Target, settings: RunSettings = DEFAULT_SETTINGS) -> Sequence[str]:
        """There is nothing to start.

        Raises:
            EnvironmentFailure: CS5010, always.
        """
        raise EnvironmentFailure("CS5010", "Nothing can be measured.", where=f"target {target.name}", why=_WHY)
