"""Measure an existing artifact again, against the dense baseline of its own source model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from compile_sparse.compiler.artifact.reader import Artifact, read_artifact, read_manifest, replace_report
from compile_sparse.compiler.artifact.report import Change, ModelSection, Report
from compile_sparse.compiler.capture import capture, open_folder
from compile_sparse.compiler.capture.folder import read_classes
from compile_sparse.compiler.errors import EnvironmentFailure, UsageError
from compile_sparse.compiler.extension.backend_options import RunFacts
from compile_sparse.compiler.extension.backends import find_backend, options_for
from compile_sparse.compiler.extension.run_settings import RunSettings
from compile_sparse.compiler.ir.model_facts import context_length
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.pipeline.compilation import SOURCE_CONFIG, judge, raise_failed_gates
from compile_sparse.compiler.pipeline.job import (
    baseline_key,
    fit_workload,
    longest_window,
    read_evaluation,
    runtime_threads,
)
from compile_sparse.compiler.pipeline.settling import settle_run
from compile_sparse.compiler.pipeline.source_types import as_stored
from compile_sparse.compiler.pipeline.text_reader import TextReader
from compile_sparse.compiler.progress import Progress
from compile_sparse.compiler.recipes.flags import merge_options
from compile_sparse.compiler.recipes.recipe import Recipe
from compile_sparse.compiler.result import CompileResult
from compile_sparse.compiler.targets.target import Precision, Target, find_target
from compile_sparse.compiler.verify.baseline import baseline_parameters, get_baseline
from compile_sparse.compiler.verify.gates import parse_gate
from compile_sparse.compiler.verify.measure import MeasureRequest, cannot_measure, measure, model_bytes
from compile_sparse.compiler.verify.processor import processor_identity
from compile_sparse.compiler.verify.reference import DECODER_FILE, SAMPLE_FILE

__all__ = ["verify_artifact"]


def verify_artifact(
    path: str | Path,
    *,
    eval: Mapping[str, str | Path] | None,
    workload: str | None,
    concurrency: str | Sequence[int] | None = None,
    gates: Sequence[str],
    max_quality_loss: str | float | None = None,
    model: str | Path | None,
    options: Mapping[str, Any],
    progress: Progress,
) -> CompileResult:
    """Check the artifact's digests, measure it and replace its report.

    Args:
        path: the artifact.
        eval: quality slices; without them perplexity is not measured.
        workload: instead of the one it was compiled with.
        concurrency: numbers of requests at once, instead of those it was compiled with.
        gates: conditions on the new measurements, instead of those it was compiled with.
        max_quality_loss: instead of the one it was compiled with.
        model: the dense model, needed when its baseline is no longer in the cache.
        options: of the target's backend (its ``verify_options``).
        progress: where measuring is reported.

    Raises:
        UsageError: CS1021 to CS1023 when the artifact is incomplete or changed; CS1039 another model; CS1046 and CS1105 wrong
            options.
        EnvironmentFailure: CS5007 the runtime is not here; CS5008 the baseline is neither cached nor can be built.
        GateFailure: CS3001.
    """
    target = find_target(read_manifest(path).target)
    verifying = options_for(target, options, verify=True)
    vouched = verifying.vouched()
    trusted = vouched.suffix if vouched else ""
    artifact = read_artifact(path, trusted=trusted)
    _require_complete(artifact)
    manifest, old = artifact.manifest, Report.model_validate(artifact.report)
    config = json.loads((artifact.folder / SOURCE_CONFIG).read_text(encoding="utf-8"))
    context = context_length(config)
    decoder = old.model.kind == "decoder"
    compiled = _as_compiled(manifest.recipe)
    settings = replace(
        _settings_of(compiled, target, context, causal=decoder, stored=old.model.precision), verifying=verifying
    )
    backend = find_backend(target)
    probe = backend.probe(target)
    if not probe.available:
        raise EnvironmentFailure(
            "CS5007",
            f"{target.name} cannot be measured here.",
            where=probe.runtime,
            why=probe.why_not,
            hint=probe.hint,
        )
    if reason := cannot_measure(backend, artifact.model, target, settings):
        raise EnvironmentFailure(
            "CS5007", f"This artifact cannot be measured here with {target.name}.", where=probe.runtime, why=reason
        )
    recipe = merge_options(
        compiled, eval=eval, workload=workload, concurrency=concurrency, max_quality_loss=max_quality_loss
    )
    for text in gates:
        parse_gate(text)
    measured_workload = fit_workload(recipe.workload, context if decoder else None)
    reader = TextReader(config, artifact.model, recipe.bos)
    slices = reader.slices(recipe) if decoder else {}
    evaluation = read_evaluation(recipe, artifact.model, *read_classes(config, artifact.folder))
    of_baseline = settings.for_baseline(runs_here=True)
    baseline = get_baseline(
        baseline_key(manifest.source.digest, target, of_baseline, probe.version),
        lambda: _dense(model, manifest.source.digest, target, settings, progress),
        lambda program, out: backend.lower(program, target, out, progress, of_baseline),
        progress,
        text=reader.sample(),
        precision=settings.precision_on(target),
    )
    request = MeasureRequest(
        baseline=baseline,
        artifact=artifact.folder,
        workload=measured_workload,
        slices=slices,
        evaluation=evaluation,
        threads=runtime_threads(measured_workload.threads),
        vocabulary=int(config.get("vocab_size") or 0),
        seed=recipe.seed,
        max_loss=recipe.evaluation.max_loss,
    )
    measured = measure(request, backend, target, settings, progress)
    if old.quality is not None and old.quality.known and not recipe.evaluation.slices:
        # The same two models: what was measured on data still holds.
        kept = old.quality.model_copy(update={"max_loss": recipe.evaluation.max_loss})
        measured = replace(measured, quality=kept)
    if old.fidelity is not None and old.runtime is not None and old.fidelity.layers is not None:
        same_runtime = (old.runtime.version, old.fidelity.layers.processor) == (probe.version, processor_identity())
        measured = measured.with_layers(old.fidelity.layers if same_runtime else None)
    sizes = ModelSection(
        kind=old.model.kind,
        parameters=Change(baseline=baseline_parameters(baseline), compiled=old.model.parameters.compiled),
        artifact_bytes=Change(
            baseline=model_bytes(backend, baseline / "model"), compiled=model_bytes(backend, artifact.model)
        ),
        source_bytes=old.model.source_bytes,
        precision=old.model.precision,
        zeros=old.model.zeros,
    )
    changes: dict[str, Any] = {"model": sizes, "gates": ()}
    if vouched:
        # What a builder said of the recorded files says nothing of these.
        changes |= {"sparsity": None, "notes": (*(n for n in old.notes if n != vouched.note), vouched.note)}
    report = judge(old.model_copy(update=changes), measured, tuple(gates) or tuple(manifest.recipe["gates"]))
    replace_report(artifact, report.as_json(), trusted=trusted)
    return raise_failed_gates(report, artifact.folder)


def _as_compiled(canonical: Mapping[str, Any]) -> Recipe:
    """What the artifact was compiled with, from its canonical recipe: workload, options, windows and seed, without data."""
    kept = {key: canonical[key] for key in ("workload", "building", "bos", "seed") if key in canonical}
    return Recipe.model_validate(kept | {"evaluation": {**canonical["evaluation"], "slices": {}}})


def _settings_of(
    compiled: Recipe, target: Target, context: int | None, *, causal: bool, stored: Precision | None
) -> RunSettings:
    """What the run that made the artifact chose."""
    workload = fit_workload(compiled.workload, context if causal else None)
    run = RunFacts(workload, context, longest_window(compiled, context), causal=causal, stored=stored)
    return settle_run(target, compiled.building, run)


def _require_complete(artifact: Artifact) -> None:
    """A manifest can be valid and still not list what measuring needs."""
    names = set(artifact.manifest.files)
    needed = {
        "a model": any(name.startswith("model/") for name in names),
        "a report": artifact.report is not None,
        SOURCE_CONFIG: SOURCE_CONFIG in names,
        "a reference": bool(names & {DECODER_FILE, SAMPLE_FILE}),
    }
    missing = [what for what, there in needed.items() if not there]
    if missing:
        raise UsageError(
            "CS1021",
            "This is not a complete artifact.",
            where=str(artifact.folder),
            why=f"Its manifest does not list {', '.join(missing)}.",
            hint="Compile it again.",
        )


def _dense(model: str | Path | None, digest: str, target: Target, settings: RunSettings, progress: Progress) -> Program:
    if model is None:
        raise EnvironmentFailure(
            "CS5008",
            "The dense baseline is not in the cache.",
            where="COMPILE_SPARSE_CACHE",
            why="It was removed, or the artifact was compiled on another machine or with another runtime version.",
            hint="Give the dense model with --model; its baseline is then built again.",
        )
    folder = open_folder(model)
    if folder.digest() != digest:
        raise UsageError(
            "CS1039",
            "The artifact was not compiled from this model.",
            where=folder.path.name,
            why=f"Its digest is {folder.digest()[:12]}..., the artifact's source is {digest[:12]}...",
            hint="Give the model the artifact was compiled from.",
        )
    dense = capture(folder, image_size=settings.image_size, progress=progress)
    return as_stored(dense, dense, target, settings.precision_on(target))
