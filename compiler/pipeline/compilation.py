"""The main job: capture, passes, lowering, verification, artifact."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from compile_sparse.compiler.artifact.manifest import FileEntry, Manifest, Source, Tool
from compile_sparse.compiler.artifact.report import (
    Change,
    GateResult,
    Interval,
    ModelSection,
    PassSection,
    Report,
    RuntimeSection,
    Sparsity,
)
from compile_sparse.compiler.artifact.staging import REPORT, Staging
from compile_sparse.compiler.capture import capture
from compile_sparse.compiler.errors import GateFailure
from compile_sparse.compiler.extension.backend_contract import ReferenceRuntime
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.ir.storage import cast_weights, torch_dtype, zero_share
from compile_sparse.compiler.ir.verifier import verify_program
from compile_sparse.compiler.pipeline.building import baseline_target
from compile_sparse.compiler.pipeline.job import Job, baseline_key, runtime_threads
from compile_sparse.compiler.pipeline.lowering import lower_program
from compile_sparse.compiler.pipeline.runner import run_passes
from compile_sparse.compiler.progress import Progress
from compile_sparse.compiler.verify.baseline import get_baseline
from compile_sparse.compiler.verify.fidelity import LARGEST_NOISE_NATS, fidelity_bound
from compile_sparse.compiler.verify.gates import evaluate_gates
from compile_sparse.compiler.verify.measure import Measured, cannot_measure, folder_bytes, measure, measure_answers
from compile_sparse.compiler.verify.reference import write_reference
from compile_sparse.compiler.verify.verdict import decide, wrong_model
from compile_sparse.compiler.version import TOOL_VERSION, library_versions

__all__ = ["SOURCE_CONFIG", "CompileResult", "compile_job", "judge", "raise_failed_gates"]

SOURCE_CONFIG = "source_config.json"
"""Copy of the source model's config in the artifact: measuring again needs its vocabulary and context length."""


@dataclass(frozen=True)
class CompileResult:
    """What a compilation gave.

    Attributes:
        verdict: ``faster``, ``smaller-only``, ``no-gain``, ``slower`` or ``unverified``.
        report: plain data of ``report.json``.
        artifact: the artifact's folder.
        report_path: the report in it.
    """

    verdict: str
    report: Mapping[str, Any]
    artifact: Path
    report_path: Path


class _Build:
    """The programs of one job, captured when first needed."""

    def __init__(self, job: Job, progress: Progress, verify_each: bool) -> None:
        self.job, self.progress, self.verify_each = job, progress, verify_each

    @cached_property
    def dense(self) -> Program:
        program = capture(self.job.folder, progress=self.progress)
        if self.verify_each:
            verify_program(program)
        return program

    @cached_property
    def baseline(self) -> Program:
        """The dense program with its weights as they are stored."""
        return cast_weights(self.dense, torch_dtype(self.job.target.baseline_precision))

    def lower(self, staging: Staging) -> dict[str, Any]:
        """Run passes and lower into ``staging``; returns what later stages need."""
        job = self.job
        job.refuse_deployment(self.dense.kind)
        context = job.context(self.progress)
        program, sections = run_passes(self.dense, job.passes, context, verify_each=self.verify_each)
        program = cast_weights(program, torch_dtype(job.target.baseline_precision))
        text = [w for windows in job.slices.values() for w in windows]
        text = text or [list(w) for w in (job.calibration.windows if job.calibration else ())]
        lowered, section = lower_program(
            job.backend, program, context, staging.fresh("model"), text=text, verify_each=self.verify_each
        )
        digests = {f"model/{name}": digest for name, digest in lowered.files.items()}
        limits = list(lowered.limits)
        for deployment in job.deployments:
            deployed = deployment.write(
                staging.folder / "model",
                staging.fresh(deployment.name),
                name=_served_name(job),
                target=job.target,
                largest_batch=max(job.workload.levels),
                known=lowered.files,
            )
            digests |= {f"{deployment.name}/{name}": digest for name, digest in deployed.files.items()}
            limits += deployed.limits
        staging.write(SOURCE_CONFIG, (job.folder.path / "config.json").read_bytes())
        short = job.target.baseline_precision != "fp32"
        write_reference(
            program,
            staging.folder,
            text=text,
            seed=job.recipe.seed,
            progress=self.progress,
            dense=self.baseline if short else None,
        )
        return {
            "passes": [s.model_dump(mode="json") for s in (*sections, section)],
            "parameters": program.parameter_count(),
            "dense_parameters": self.dense.parameter_count(),
            "zeros": zero_share(program),
            "kind": program.kind,
            "form": dict(lowered.form),
            "limits": limits,
            "digests": digests,
            "sparsity": lowered.sparsity,
        }


def _served_name(job: Job) -> str:
    """The model's folder, in letters that every serving system takes."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", job.folder.path.resolve().name).strip("-_")[:128] or "model"


def compile_job(
    job: Job, out: Path, *, verify: bool, force: bool, verify_each: bool, progress: Progress
) -> CompileResult:
    """Compile, verify and publish to ``out``.

    Raises:
        GateFailure: CS3001 after the artifact and report are written; carries ``result``.
    """
    build = _Build(job, progress, verify_each)
    with Staging(out, key=job.key, force=force) as staging:
        stage = staging.completed("lowered")
        if stage is None:
            stage = build.lower(staging)
            staging.complete("lowered", stage)
        measured, baseline_bytes, why = None, None, "Verification was switched off (--no-verify)."
        if verify:
            measured, baseline_bytes, why = _verified(build, staging.folder, progress)
        sizes = ModelSection(
            kind=stage["kind"],
            parameters=Change(baseline=stage["dense_parameters"], compiled=stage["parameters"]),
            artifact_bytes=_change(baseline_bytes, folder_bytes(staging.folder / "model")),
            zeros=stage["zeros"],
        )
        passes = tuple(PassSection.model_validate(p) for p in stage["passes"])
        report = judge(
            Report(
                target=job.target.name,
                verdict="unverified",
                verdict_why=why,
                model=sizes,
                passes=passes,
                sparsity=stage.get("sparsity"),
                notes=tuple(stage["limits"]),
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
                source=Source(name=job.folder.path.name, digest=job.source_digest),
                recipe=job.canonical_recipe,
                target=job.target.name,
                passes=passes,
                runtime=report.runtime,
                libraries=library_versions(),
                form=stage["form"],
                limits=tuple(stage["limits"]),
                files=files,
            )

        staging.publish(manifest, known=stage["digests"])
    return raise_failed_gates(report, out)


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
    elif why := cannot_measure(job.backend, artifact / "model", job.target):
        return None, None, why
    dense_target = baseline_target(job.target, runs_here=job.probe.available)
    baseline = get_baseline(
        baseline_key(job.source_digest, dense_target, job.probe.version),
        lambda: build.baseline,
        job.backend,
        dense_target,
        progress,
    )
    size = folder_bytes(baseline / "model")
    threads = runtime_threads(job.workload.threads)
    found: dict[str, Any] = {"workload": job.workload, "slices": job.slices, "seed": job.recipe.seed}
    found |= {"baseline": baseline, "artifact": artifact, "threads": threads, "progress": progress}
    if why:
        return measure_answers(reference, **found), size, why
    return measure(job.backend, job.target, vocabulary=job.vocabulary, **found), size, ""


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
    if measured is not None and measured.twin and report.sparsity is not None:
        report = report.model_copy(update={"sparsity": _with_twin(report.sparsity, measured.twin)})
    if measured is not None and measured.performance is not None:
        verdict, why = decide(report.model_dump(mode="json"), fidelity_bound=fidelity_bound(quantized))
        dense = measured.baseline_fidelity.top1_agreement or 0.0
        noise = measured.baseline_fidelity.mean_abs_logprob_diff or 0.0
        if noise > LARGEST_NOISE_NATS:
            verdict, why = (
                "unverified",
                f"The runtime computes the dense model {noise:.2g} nats off, more than rounding explains.",
            )
        elif dense < fidelity_bound(quantized=False):
            verdict, why = "unverified", f"The dense baseline itself agrees with torch on only {dense:.1%} of tokens."
        report = report.model_copy(update={"verdict": verdict, "verdict_why": why})
    data = report.model_dump(mode="json")
    results = [*wrong_model(data, fidelity_bound(quantized)), *evaluate_gates(gates, data)]
    return report.model_copy(update={"gates": tuple(GateResult.model_validate(r) for r in results)})


def _with_twin(sparsity: Sparsity, ratios: Mapping[str, Interval]) -> Sparsity:
    """The section with the speed of sparse kernels over dense ones, for the profiles that were measured."""
    profiles = {
        name: section.model_copy(update={"twin": ratios.get(name)})
        for name, section in (sparsity.profiles or {}).items()
    }
    return sparsity.model_copy(update={"profiles": profiles or None})


def raise_failed_gates(report: Report, folder: Path) -> CompileResult:
    """The result of a published report; GateFailure (CS3001) carrying it when a gate failed."""
    result = CompileResult(report.verdict, report.model_dump(mode="json", exclude_none=True), folder, folder / REPORT)
    failed = [gate for gate in report.gates if not gate.passed]
    if failed:
        error = GateFailure(
            "CS3001",
            f"{len(failed)} of {len(report.gates)} gates failed.",
            where="; ".join(gate.gate for gate in failed),
            why="; ".join(gate.why or f"{gate.gate}: measured {gate.value}" for gate in failed),
            hint="The artifact and its report are written; loosen the gate or compress less.",
        )
        error.result = result  # type: ignore[attr-defined]
        raise error
    return result
