"""The plan: the same passes as a compilation, on sizes alone. No weights are read and nothing is written."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from compile_sparse.compiler.axes.analysis import analyse, changeable_roles
from compile_sparse.compiler.capture import capture
from compile_sparse.compiler.capture.loading import load_class
from compile_sparse.compiler.capture.stored import stored_tensors
from compile_sparse.compiler.diagnostics import Diagnostic
from compile_sparse.compiler.errors import ModelError, Refusal
from compile_sparse.compiler.ir.model_facts import layer_count
from compile_sparse.compiler.ir.storage import stored_bytes
from compile_sparse.compiler.pipeline.job import Job
from compile_sparse.compiler.pipeline.runner import run_passes
from compile_sparse.compiler.pipeline.source_types import as_stored, source_bytes
from compile_sparse.compiler.planning.axis_shares import group_rows
from compile_sparse.compiler.planning.speedup_bound import speedup_bound
from compile_sparse.compiler.planning.token_cost import token_cost
from compile_sparse.compiler.progress import Progress
from compile_sparse.compiler.verify.source_model import unused_tensors

__all__ = ["plan_job"]


def plan_job(job: Job, progress: Progress, *, accept_useless: bool = False) -> dict[str, Any]:
    """What compiling ``job`` would do.

    Args:
        job: the model, target and recipe.
        progress: where capture is reported.
        accept_useless: do not list what the target cannot exploit as refused.

    Returns:
        Plain data: ``model``, ``source`` (what is to be said about the model's folder), ``passes`` (requested, achieved, skips,
        notes), ``groups`` (axes that can be removed together, see ``group_rows``), ``source_bytes``, ``bytes`` and ``parameters``
        before and after, ``gain`` (bounds on the speed-up, see ``speedup_bound``), ``runtime`` (what the backend says about the
        result) and ``refusals``.
    """
    dense = capture(job.folder, require_weights=False, image_size=job.settings.image_size, progress=progress)
    refusals = [] if accept_useless else [skip.as_dict() for skip in job.useless]
    context = job.context(progress, plan_only=True)
    program, sections = dense, []
    for step in job.steps(dense):
        try:
            program, done = run_passes(program, [step], context)
        except (Refusal, ModelError) as error:
            refused = Diagnostic.of(error)
            refusals.append(replace(refused, where=refused.where or step.name).as_dict())
            continue
        sections += [section.model_dump(mode="json") for section in done]
    captured = dense
    dense, program = (as_stored(each, captured, job.target, job.precision) for each in (dense, program))
    with progress.task("axes", total=1) as task:
        analysis = analyse(dense, interface_may_change=changeable_roles(job.target))
        groups = group_rows(analysis, token_cost(dense, tokens=1 if dense.kind == "decoder" else job.workload.prompt))
        task.advance()
    said = [
        *job.backend.plan(program, job.target, job.settings),
        *(s for d in job.deployments for s in d.refusals(dense.kind, job.target, job.settings)),
    ]
    refusals += [skip.as_dict() for skip in said if skip.severity == "error"]
    return {
        "schema_version": 1,
        "target": job.target.name,
        "model": {
            "kind": dense.kind,
            "parameters": dense.parameter_count(),
            "layers": layer_count(dense.config),
        },
        "source": [each.as_dict() for each in unused_tensors(_unused(job))],
        "passes": sections,
        "groups": groups,
        "source_bytes": source_bytes(job.folder),
        "bytes": {"baseline": stored_bytes(dense), "compiled": stored_bytes(program)},
        "parameters": {"baseline": dense.parameter_count(), "compiled": program.parameter_count()},
        "gain": speedup_bound(dense, program, job.target, prompt=job.workload.prompt),
        "runtime": [skip.as_dict() for skip in said if skip.severity != "error"],
        "refusals": refusals,
    }


def _unused(job: Job) -> tuple[str, ...]:
    """Stored tensors that the model does not use; none for a folder without weights."""
    folder = job.folder
    stored = stored_tensors(folder, torch.float32, required=False)
    return load_class(folder.model_class, folder.config, stored, torch.float32).unused if stored else ()
