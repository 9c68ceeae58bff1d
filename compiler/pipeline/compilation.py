"""The main job: capture, passes, lowering, verification, artifact."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field

from compile_sparse.compiler.artifact.manifest import FileEntry, Manifest, Source, Tool
from compile_sparse.compiler.artifact.report import (
    Change,
    GateResult,
    Kind,
    LayerFidelity,
    ModelSection,
    PassSection,
    Report,
    RuntimeSection,
    SourceSection,
    Sparsity,
)
from compile_sparse.compiler.artifact.staging import REPORT, Staging
from compile_sparse.compiler.capture import capture
from compile_sparse.compiler.capture.loading import load_class
from compile_sparse.compiler.capture.samples import stretch_positions
from compile_sparse.compiler.capture.stored import stored_tensors
from compile_sparse.compiler.errors import GateFailure
from compile_sparse.compiler.extension.backend_contract import Observation, ObservedLayers, ReferenceRuntime
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.ir.storage import zero_share
from compile_sparse.compiler.ir.verifier import verify_program
from compile_sparse.compiler.pipeline.job import Job, baseline_key, runtime_threads
from compile_sparse.compiler.pipeline.lowering import lower_program
from compile_sparse.compiler.pipeline.runner import run_passes
from compile_sparse.compiler.pipeline.source_types import as_stored, rounding_note, source_bytes
from compile_sparse.compiler.progress import Progress
from compile_sparse.compiler.result import CompileResult
from compile_sparse.compiler.runtimes.client import Worker
from compile_sparse.compiler.runtimes.messages import Load
from compile_sparse.compiler.verify.baseline import get_baseline
from compile_sparse.compiler.verify.gates import evaluate_gates
from compile_sparse.compiler.verify.layers import check_layers, observed_calls
from compile_sparse.compiler.verify.measure import (
    LOAD_TIMEOUT_SECONDS,
    Measured,
    MeasureRequest,
    cannot_measure,
    measure,
    measure_answers,
    model_bytes,
)
from compile_sparse.compiler.verify.quality_verdict import lost_quality, with_quality
from compile_sparse.compiler.verify.reference import write_reference
from compile_sparse.compiler.verify.same_model import departures
from compile_sparse.compiler.verify.source_model import check_source
from compile_sparse.compiler.verify.verdict import decide, wrong_model
from compile_sparse.compiler.version import TOOL_VERSION, library_versions

__all__ = ["SOURCE_CONFIG", "LoweringRecord", "compile_job", "judge", "raise_failed_gates"]

SOURCE_CONFIG = "source_config.json"
"""Copy of the source model's config in the artifact: measuring again needs its vocabulary and context length."""


class LoweringRecord(BaseModel):
    """What later stages need of a lowering; kept in the staging folder, so that a stopped run goes on after it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: SourceSection = Field(description="of the report")
    passes: tuple[PassSection, ...] = Field(description="of the report; the last one is the lowering itself")
    parameters: int = Field(description="trained elements of what was lowered")
    dense_parameters: int = Field(description="the same of the dense model")
    zeros: float = Field(description="share of stored weights that are zero")
    kind: Kind = Field(description="of the program")
    form: dict[str, Any] = Field(description="runtime form chosen, per aspect")
    limits: tuple[str, ...] = Field(description="what the runtime must respect")
    digests: dict[str, str] = Field(description="file of the artifact -> sha256, computed while it was written")
    sparsity: Sparsity | None = Field(default=None, description="of the report")


class _Build:
    """The programs of one job, captured when first needed."""

    def __init__(self, job: Job, progress: Progress, verify_each: bool) -> None:
        self.job, self.progress, self.verify_each = job, progress, verify_each

    @cached_property
    def dense(self) -> Program:
        program = capture(self.job.folder, image_size=self.job.settings.image_size, progress=self.progress)
        if self.verify_each:
            verify_program(program)
        return program

    @cached_property
    def baseline(self) -> Program:
        """The dense program with its weights as they are stored."""
        return as_stored(self.dense, self.dense, self.job.target, self.job.precision)

    @cached_property
    def compiled(self) -> Program:
        """The program after the passes, its weights as they are stored."""
        return self._passed[0]

    @cached_property
    def _passed(self) -> tuple[Program, tuple[PassSection, ...]]:
        context = self.job.context(self.progress)
        program, sections = run_passes(self.dense, self.job.steps(self.dense), context, verify_each=self.verify_each)
        return as_stored(program, self.dense, self.job.target, self.job.precision), sections

    def source(self) -> SourceSection:
        """The dense program, compared with transformers."""
        dense, folder = self.dense, self.job.folder
        loaded = load_class(folder.model_class, folder.config, stored_tensors(folder, torch.float32), torch.float32)
        if self.job.settings.image_size:
            stretch_positions(loaded.model, self.job.settings.image_size)
        return check_source(dense, loaded, self.progress)

    def lower(self, staging: Staging) -> LoweringRecord:
        """Run passes and lower into ``staging``."""
        job = self.job
        job.refuse_deployment(self.dense.kind)
        source = self.source()  # before any long work
        context = job.context(self.progress)
        program, sections = self._passed
        lowered, section = lower_program(
            job.backend, program, context, staging.fresh("model"), text=job.text, verify_each=self.verify_each
        )
        digests = {f"model/{name}": digest for name, digest in lowered.files.items()}
        limits = [*lowered.limits, *rounding_note(job.folder, job.precision)]
        for deployment in job.deployments:
            deployed = deployment.write(
                staging.folder / "model",
                staging.fresh(deployment.name),
                name=_served_name(job),
                target=job.target,
                largest_batch=max(job.workload.levels),
                known=lowered.files,
                settings=job.settings,
            )
            digests |= {f"{deployment.name}/{name}": digest for name, digest in deployed.files.items()}
            limits += deployed.limits
        staging.write(SOURCE_CONFIG, (job.folder.path / "config.json").read_bytes())
        self._reference(program, staging)
        return LoweringRecord(
            source=source,
            passes=(*sections, section),
            parameters=program.parameter_count(),
            dense_parameters=self.dense.parameter_count(),
            zeros=zero_share(program),
            kind=program.kind,
            form=dict(lowered.form),
            limits=tuple(limits),
            digests=digests,
            sparsity=None if lowered.sparsity is None else Sparsity.model_validate(lowered.sparsity),
        )

    def _reference(self, program: Program, staging: Staging) -> None:
        """Write the program's own answers beside the model."""
        job, computed = self.job, program
        if isinstance(job.backend, ObservedLayers) and job.probe.available:
            with _observation(job, program, staging) as seen:
                computed = seen.program
        write_reference(
            computed,
            staging.folder,
            text=job.text,
            precision=job.precision,
            seed=job.recipe.seed,
            progress=self.progress,
        )

    def layers(self, staging: Staging) -> LayerFidelity | None:
        """How far the runtime's layers are from the program's, in a process of the runtime that ends with it; None where the
        runtime shows none.
        """
        job, model = self.job, staging.folder / "model"
        shows = isinstance(job.backend, ObservedLayers) and job.probe.available
        if not shows or cannot_measure(job.backend, model, job.target, job.settings):
            return None
        with _observation(job, self.compiled, staging) as whole:
            seen, calls = observed_calls(whole, text=job.text, seed=job.recipe.seed)
            if not seen.values:
                return None
            with Worker(job.backend.worker_command(job.target, job.settings)) as worker:
                load = Load(
                    "observed",
                    str(seen.folder),
                    threads=runtime_threads(job.workload.threads),
                    device=job.target.device,
                    sequence=calls.longest,
                    sequences=max(1, len(calls.windows)),
                )
                worker.call(load, timeout=LOAD_TIMEOUT_SECONDS)
                return check_layers(
                    worker,
                    load.name,
                    seen,
                    calls,
                    precision=job.precision,
                    seed=job.recipe.seed,
                    progress=self.progress,
                )


@contextmanager
def _observation(job: Job, program: Program, staging: Staging) -> Iterator[Observation]:
    """How the layers of what lies in ``staging`` are seen; what is written for it goes with the context."""
    assert isinstance(job.backend, ObservedLayers)
    with tempfile.TemporaryDirectory(prefix="observed-", dir=staging.root) as scratch:
        yield job.backend.observation(program, job.target, staging.folder / "model", Path(scratch), job.settings)


def _served_name(job: Job) -> str:
    """The model's folder, in letters that every serving system takes."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", job.folder.name).strip("-_")[:128] or "model"


def compile_job(
    job: Job, out: Path, *, verify: bool, force: bool, verify_each: bool, progress: Progress
) -> CompileResult:
    """Compile, verify and publish to ``out``.

    Raises:
        GateFailure: CS3001 after the artifact and report are written; carries ``result``.
    """
    build = _Build(job, progress, verify_each)
    with Staging(out, key=job.key, force=force) as staging:
        stored = staging.completed("lowered")
        record = build.lower(staging) if stored is None else LoweringRecord.model_validate(stored)
        if stored is None:
            staging.complete("lowered", record.model_dump(mode="json"))
        measured, baseline_bytes, why = None, None, "Verification was switched off (--no-verify)."
        if verify:
            layers = _checked_layers(build, staging)
            measured, baseline_bytes, why = _verified(build, staging.folder, progress)
            measured = measured and measured.with_layers(layers)
        sizes = ModelSection(
            kind=record.kind,
            parameters=Change(baseline=record.dense_parameters, compiled=record.parameters),
            artifact_bytes=_change(baseline_bytes, model_bytes(job.backend, staging.folder / "model")),
            source_bytes=source_bytes(job.folder),
            precision=job.precision,
            zeros=record.zeros,
        )
        report = judge(
            Report(
                target=job.target.name,
                verdict="unverified",
                verdict_why=why,
                model=sizes,
                source=record.source,
                passes=record.passes,
                sparsity=record.sparsity,
                notes=record.limits,
                runtime=RuntimeSection(
                    name=job.probe.runtime, version=job.probe.version, device=job.probe.device or job.target.device
                ),
            ),
            measured,
            job.recipe.gates,
        )
        staging.write(REPORT, report.as_json())

        def manifest(files: dict[str, FileEntry]) -> Manifest:
            return Manifest(
                tool=Tool(version=TOOL_VERSION),
                source=Source(name=job.folder.name, digest=job.source_digest, commit=job.folder.commit),
                recipe=job.canonical_recipe,
                target=job.target.name,
                passes=record.passes,
                runtime=report.runtime,
                libraries=library_versions(),
                form=record.form,
                limits=record.limits,
                files=files,
            )

        staging.publish(manifest, known=record.digests)
    return raise_failed_gates(report, out)


def _checked_layers(build: _Build, staging: Staging) -> LayerFidelity | None:
    """What was found layer by layer, now or by a stopped run: a stage of its own, because it may need the passes again."""
    stored = staging.completed("layers")
    if stored is None:
        found = build.layers(staging)
        staging.complete("layers", {"layers": found and found.model_dump(mode="json")})
        return found
    return LayerFidelity.model_validate(stored["layers"]) if stored["layers"] else None


def _verified(build: _Build, artifact: Path, progress: Progress) -> tuple[Measured | None, int | None, str]:
    """What was measured of the artifact, bytes of the baseline, and why nothing was measured in the target's runtime."""
    job = build.job
    if not job.probe.available:
        why = f"{job.probe.why_not} {job.probe.hint}".strip()
        reference = job.backend.reference_command(job.target) if isinstance(job.backend, ReferenceRuntime) else ()
        if not (isinstance(job.backend, ReferenceRuntime) and reference):
            return None, None, why
        if unable := job.backend.reference_refusal(artifact / "model", job.target):
            return None, None, f"{why} {unable}"
    elif why := cannot_measure(job.backend, artifact / "model", job.target, job.settings):
        return None, None, why
    settings = job.settings.for_baseline(runs_here=job.probe.available)
    baseline = get_baseline(
        baseline_key(job.source_digest, job.target, settings, job.probe.version),
        lambda: build.baseline,
        lambda program, out: job.backend.lower(program, job.target, out, progress, settings),
        progress,
        text=job.sample,
        precision=job.precision,
    )
    size = model_bytes(job.backend, baseline / "model")
    request = MeasureRequest(
        baseline=baseline,
        artifact=artifact,
        workload=job.workload,
        slices=job.slices,
        evaluation=job.evaluation,
        threads=runtime_threads(job.workload.threads),
        vocabulary=job.vocabulary,
        seed=job.recipe.seed,
        max_loss=job.recipe.evaluation.max_loss,
    )
    if why:
        return measure_answers(request, reference, progress), size, why
    return measure(request, job.backend, job.target, job.settings, progress), size, ""


def _change(baseline: int | None, compiled: int) -> Change | None:
    return None if baseline is None else Change(baseline=baseline, compiled=compiled)


def judge(report: Report, measured: Measured | None, gates: tuple[str, ...]) -> Report:
    """``report`` with the measurements, the verdict and the gates filled in."""
    quantized = any(section.changes_numerics is not False for section in report.passes)
    if measured is not None:
        report = report.model_copy(
            update={
                "runtime": measured.runtime or report.runtime,
                "fidelity": measured.fidelity,
                "performance": measured.performance,
                "quality": measured.quality,
            }
        )
    if measured is not None and measured.over_dense and report.sparsity is not None:
        report = report.model_copy(update={"sparsity": report.sparsity.with_speed(measured.over_dense)})
    if measured is not None and measured.performance is not None:
        verdict, why = decide(report.model_dump(mode="json"), quantized=quantized)
        if departed := departures(measured.baseline_fidelity.model_dump(), quantized=False):
            verdict, why = "unverified", f"The runtime computes the dense baseline wrongly too. {departed[0].why}"
        report = report.model_copy(update={"verdict": verdict, "verdict_why": why})
    report = with_quality(report)
    data = report.model_dump(mode="json")
    results = [*wrong_model(data, quantized=quantized), *lost_quality(report), *evaluate_gates(gates, data)]
    return report.model_copy(update={"gates": tuple(GateResult.model_validate(r) for r in results)})


def raise_failed_gates(report: Report, folder: Path) -> CompileResult:
    """The result of a published report; GateFailure (CS3001) carrying it when a gate failed."""
    result = CompileResult(report.verdict, report.model_dump(mode="json", exclude_none=True), folder, folder / REPORT)
    failed = [gate for gate in report.gates if not gate.passed]
    if failed:
        raise GateFailure(
            "CS3001",
            f"{len(failed)} of {len(report.gates)} gates failed.",
            result=result,
            where="; ".join(gate.gate for gate in failed),
            why="; ".join(gate.why or f"{gate.gate}: measured {gate.value}" for gate in failed),
            hint="The artifact and its report are written; loosen the gate or compress less.",
        )
    return result
