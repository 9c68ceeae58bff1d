"""What a backend promises. Third parties register theirs in the entry-point group ``compile_sparse.backends``."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from compile_sparse.compiler.extension.run_settings import DEFAULT_SETTINGS, RunSettings

if TYPE_CHECKING:
    from compile_sparse.compiler.diagnostics import Diagnostic
    from compile_sparse.compiler.extension.pass_contract import PassResult
    from compile_sparse.compiler.ir.program import Program
    from compile_sparse.compiler.progress import Progress
    from compile_sparse.compiler.targets.target import Target

__all__ = [
    "Backend",
    "DerivedFiles",
    "Lowered",
    "LoweringStep",
    "Observation",
    "ObservedLayers",
    "Probe",
    "ReferenceRuntime",
    "SteppedLowering",
]


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
        diagnostics: what could not use the fast form, with reasons.
        sparsity: ``sparsity`` of the report, as plain data, where zeros were made in a pattern that the runtime may skip.
    """

    files: Mapping[str, str]
    form: Mapping[str, Any] = field(default_factory=dict)
    limits: Sequence[str] = ()
    diagnostics: Sequence[Diagnostic] = ()
    sparsity: Mapping[str, Any] | None = None


class Backend(Protocol):
    """A serving runtime. Entry-point group ``compile_sparse.backends``; the entry is a class without constructor arguments.

    ``load`` and ``measure`` are not methods here: they are operations of the backend's worker process (see
    ``compile_sparse.compiler.runtimes.client``), started with ``worker_command``. No vendor package is imported in this process.

    What the run chose (precision, GPUs, the backend's own options) comes beside the target, in ``settings``. A backend with
    options of its own has a class attribute ``options``, and one whose ``compile-sparse verify`` has options ``verify_options``:
    subclasses of ``BackendOptions``. The command line asks every installed backend for them, so that the class's module imports
    nothing heavy.
    """

    name: str

    def probe(self, target: Target) -> Probe:
        """Which runtime, version and device is here, or why not. Never raises."""
        ...

    def plan(self, program: Program, target: Target, settings: RunSettings = DEFAULT_SETTINGS) -> Sequence[Diagnostic]:
        """What this runtime cannot express (codes ``CS4...``: ``lower`` will refuse) or will run slowly.

        Needs no weights and no hardware.
        """
        ...

    def lower(
        self,
        program: Program,
        target: Target,
        out: Path,
        progress: Progress,
        settings: RunSettings = DEFAULT_SETTINGS,
    ) -> Lowered:
        """Write what the runtime loads into the empty folder ``out``."""
        ...

    def cannot_run(self, model: Path, target: Target) -> str:
        """Why the runtime that is here cannot run the lowered folder ``model``, although others of its kind can; else empty."""
        ...

    def worker_command(self, target: Target, settings: RunSettings = DEFAULT_SETTINGS) -> Sequence[str]:
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
class DerivedFiles(Protocol):
    """A backend whose lowered folders hold, beside the model, what was made from it.

    Attributes:
        derived: patterns of such files (``fnmatch``), relative to the folder: they don't count as bytes of the model.
    """

    derived: Collection[str]

    def dense_build(self, model: Path) -> Path | None:
        """The folder in ``model`` with the same model built without sparse kernels, to be measured against; None without one."""
        ...


@dataclass(frozen=True)
class Observation:
    """How the values of single layers of a lowered folder are seen in its runtime, and what they should be.

    Attributes:
        folder: what the worker loads for it: the lowered folder itself, or a copy that tells more.
        values: node of the program -> what the worker calls its value in that folder; only what the runtime has.
        program: the compiled program with the rounding that the runtime's kernels are known to do inside made explicit; nodes
            keep their names.
        precision: that the runtime computes in here, where it is not that of the target: ``fp32``, ``fp16`` or ``bf16``.
    """

    folder: Path
    values: Mapping[str, str]
    program: Program
    precision: str = ""


@runtime_checkable
class ObservedLayers(Protocol):
    """A backend whose worker answers ``Observe`` (``compiler/runtimes/messages.py``): it shows the outputs of single layers."""

    def observation(
        self, program: Program, target: Target, model: Path, scratch: Path, settings: RunSettings
    ) -> Observation:
        """Of the lowered folder ``model``.

        Args:
            program: the compiled one, which ``model`` was lowered from.
            target, settings: as for ``lower``.
            model: the folder; it stays as it is.
            scratch: an empty folder for what is loaded instead, on the file system of ``model`` where possible.
        """
        ...


class LoweringStep(Protocol):
    """One change to a program on its way into a runtime's files, such as a pattern replaced by the operator the runtime has a
    kernel for. It is run like a pass: verified under ``--verify-each`` and timed.
    """

    @property
    def name(self) -> str: ...

    def run(self, program: Program, context: object = None) -> PassResult:
        """The changed program; the one given is untouched. A step holds what it needs: the context is for passes."""
        ...


@runtime_checkable
class SteppedLowering(Protocol):
    """A backend that writes another program than the compiled one: ``lower`` is ``write`` behind the steps."""

    def lowering_steps(self, target: Target, settings: RunSettings = DEFAULT_SETTINGS) -> Sequence[LoweringStep]:
        """What a program goes through before it is written, in order.

        Up to a ``MixedPrecision`` among them the program computes in float32. The values which that step puts into fp16 are
        watched on the text the artifact is checked on, and refused (CS4432) where they leave its range.
        """
        ...

    def write(
        self,
        program: Program,
        prepared: Program,
        target: Target,
        out: Path,
        progress: Progress,
        settings: RunSettings = DEFAULT_SETTINGS,
    ) -> Lowered:
        """Write what the runtime loads into the empty folder ``out``.

        Args:
            program: the compiled one.
            prepared: what the steps made of it. What they left alone is reported by whoever ran them.
            target, out, progress, settings: as for ``lower``.
        """
        ...
