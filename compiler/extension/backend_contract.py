"""What a backend promises. Third parties register theirs in the entry-point group ``compile_sparse.backends``."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from compile_sparse.compiler.diagnostics import Diagnostic
    from compile_sparse.compiler.ir.program import Program
    from compile_sparse.compiler.progress import Progress
    from compile_sparse.compiler.targets.target import Target

__all__ = ["Backend", "Lowered", "Probe", "ReducedPrecision", "ReferenceRuntime"]


@dataclass(frozen=True)
class Probe:
    """Whether a runtime works here.

    Attributes:
        available: it can load and run artifacts on this machine.
        runtime, version, device: what was found; version is empty when nothing was.
        why_not, hint: the reason and the remedy when unavailable.
        processor: what else decides which artifacts run, such as the instruction set; part of the identity of a compilation.
    """

    available: bool
    runtime: str
    version: str = ""
    device: str = ""
    why_not: str = ""
    hint: str = ""
    processor: str = ""


@dataclass(frozen=True)
class Lowered:
    """What lowering wrote.

    Attributes:
        files: paths relative to the output folder -> sha256 hex digest, computed while writing.
        form: the runtime form chosen, in a few words per aspect (attention, linear formats, ...).
        limits: what the runtime must respect (padding side, batching of chunked prefill, ...), as sentences.
        skips: what could not use the fast form, with reasons.
        sparsity: ``sparsity`` of the report, as plain data, where zeros were made in a pattern that the runtime may skip.
    """

    files: Mapping[str, str]
    form: Mapping[str, Any] = field(default_factory=dict)
    limits: Sequence[str] = ()
    skips: Sequence[Diagnostic] = ()
    sparsity: Mapping[str, Any] | None = None


class Backend(Protocol):
    """A serving runtime. Entry-point group ``compile_sparse.backends``; the entry is a class without constructor arguments.

    ``load`` and ``measure`` are not methods here: they are operations of the backend's worker process (see
    ``compile_sparse.compiler.runtimes.client``), started with ``worker_command``. No vendor package is imported in this process.
    """

    name: str

    def probe(self, target: Target) -> Probe:
        """Which runtime, version and device is here, or why not. Never raises."""
        ...

    def plan(self, program: Program, target: Target) -> Sequence[Diagnostic]:
        """What this runtime cannot express (codes ``CS4...``: ``lower`` will refuse) or will run slowly.

        Needs no weights and no hardware.
        """
        ...

    def lower(self, program: Program, target: Target, out: Path, progress: Progress) -> Lowered:
        """Write what the runtime loads into the empty folder ``out``."""
        ...

    def cannot_run(self, model: Path, target: Target) -> str:
        """Why the runtime that is here cannot run the lowered folder ``model``, although others of its kind can; else empty."""
        ...

    def worker_command(self, target: Target) -> Sequence[str]:
        """Command line of the measuring process (JSON lines on stdin and stdout)."""
        ...


@runtime_checkable
class ReferenceRuntime(Protocol):
    """A backend whose lowered folders another runtime can run where the target's is missing: for its answers, never its speed."""

    def reference_command(self, target: Target) -> Sequence[str]:
        """Command line of that runtime's measuring process, or nothing when it is missing too."""
        ...

    def reference_refusal(self, model: Path, target: Target) -> str:
        """Why it cannot run the lowered folder ``model``, a sentence; else empty."""
        ...


@runtime_checkable
class ReducedPrecision(Protocol):
    """A backend that keeps values in a type whose range they may leave."""

    def half_precision_nodes(self, program: Program, target: Target) -> tuple[Program, Collection[str]]:
        """``program`` as it will be computed, and the names of its nodes whose values are held in a type of smaller range than
        float32; no names where there are none.
        """
        ...
