"""The public Python API. The command line is a thin layer over these functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compile_sparse.compiler.capture import open_folder
from compile_sparse.compiler.errors import CompileSparseError
from compile_sparse.compiler.extension.backends import find_backend
from compile_sparse.compiler.microbench import probe_model
from compile_sparse.compiler.microbench.probe import device_for
from compile_sparse.compiler.microbench.table_file import refuse_occupied, write_table
from compile_sparse.compiler.pipeline.compilation import compile_job
from compile_sparse.compiler.pipeline.job import prepare
from compile_sparse.compiler.pipeline.remeasure import verify_artifact
from compile_sparse.compiler.planning.plan import plan_job
from compile_sparse.compiler.progress import Progress, SilentProgress
from compile_sparse.compiler.recipes.flags import merge_options
from compile_sparse.compiler.recipes.recipe import Recipe, load_recipe
from compile_sparse.compiler.result import CompileResult
from compile_sparse.compiler.targets.target import find_target, load_targets
from compile_sparse.compiler.targets.workload import parse_workload

__all__ = ["CompileResult", "compile", "doctor", "explain", "load_recipe", "probe", "verify"]


def compile(
    model: str | Path,
    *,
    target: str,
    recipe: Recipe | str | Path | None = None,
    out: str | Path | None = None,
    verify: bool = True,
    force: bool = False,
    allow_useless: bool = False,
    verify_each: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> CompileResult:
    """Compile ``model`` for ``target``, measure it against the dense model, and write the artifact.

    Args:
        model: a Hugging Face folder, or a hub id where a hub is reachable.
        target: name of a target, see ``compile-sparse targets``.
        recipe: a recipe, the path of one, or a built-in name.
        out: artifact folder; ``./MODEL-TARGET`` by default.
        verify: False skips all measurements; the verdict is then ``unverified``.
        force: replace an existing artifact.
        allow_useless: accept what the target cannot exploit.
        verify_each: check the program after every pass.
        progress: where long work reports.
        options: shorthand for a recipe, see ``flags.merge_options``: ``prune={"channels": 0.25}``,
            ``criterion="wanda"``, ``allocation="global"``, ``low_rank=0.2``, ``quantize="w8a8"``, ``calibration=FILE``,
            ``eval={"en": FILE}``, ``workload="prompt=128,output=64"``, ``gates=["decode_tok_s>=1.2x"]``, ``seed=0``, and so on;
            and options of the target's backend, by their names.

    Raises:
        CompileSparseError: see ``errors``; each class has its exit code.
    """
    merged = merge_options(_recipe(recipe), **options)
    job = prepare(model, target, merged)
    if not allow_useless:
        job.refuse_useless()
    folder = Path(out) if out is not None else Path(f"{job.folder.path.name}-{target}")
    return compile_job(
        job,
        folder.absolute(),
        verify=verify,
        force=force,
        verify_each=verify_each,
        progress=progress or SilentProgress(),
    )


def explain(
    model: str | Path,
    *,
    target: str,
    recipe: Recipe | str | Path | None = None,
    allow_useless: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> dict[str, Any]:
    """The plan for the same arguments as ``compile``: sizes and reasons, no weights read, nothing written."""
    merged = merge_options(_recipe(recipe), **options)
    job = prepare(model, target, merged)
    return plan_job(job, progress or SilentProgress(), accept_useless=allow_useless)


def verify(
    artifact: str | Path,
    *,
    eval: Mapping[str, str | Path] | None = None,
    workload: str | None = None,
    concurrency: str | Sequence[int] | None = None,
    gates: Sequence[str] = (),
    max_quality_loss: str | float | None = None,
    model: str | Path | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> CompileResult:
    """Measure an existing artifact again; see ``remeasure.verify_artifact``.

    ``options`` are those of the artifact's backend.
    """
    return verify_artifact(
        artifact,
        eval=eval,
        workload=workload,
        concurrency=concurrency,
        gates=gates,
        max_quality_loss=max_quality_loss,
        model=model,
        options=options,
        progress=progress or SilentProgress(),
    )


def probe(
    model: str | Path,
    *,
    target: str,
    workload: str | None = None,
    concurrency: str | Sequence[int] | None = None,
    out: str | Path | None = None,
    any_gpu: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure what fewer bits and 2:4 zeros buy on each GEMM of ``model``, with torch on the GPU at hand.

    Args:
        model: a Hugging Face folder, or a hub id where a hub is reachable; its weights are not read.
        target: whose GPU it must be.
        workload: ``prompt=128,batch=1,rounds=5``: rows of the GEMMs, and how often they are measured.
        concurrency: numbers of requests that decode at once.
        out: JSON file to write.
        any_gpu: measure another GPU than the target's; the result says so.
        force: replace an existing file.
        progress: where long work reports.

    Returns:
        See ``microbench.probe.probe_model``.

    Raises:
        UsageError: CS1044 no NVIDIA GPU, CS1045 the file exists, and those of models and workloads.
        EnvironmentFailure: CS5401 no GPU here, CS5402 another GPU.
    """
    found = find_target(target)
    work = parse_workload(workload or {})
    if concurrency is not None:
        work = parse_workload({"concurrency": concurrency}, work)
    file = None if out is None else Path(out)
    if file is not None:
        refuse_occupied(file, force=force)
    device = device_for(found, any_gpu=any_gpu)
    result = probe_model(open_folder(model), found, work, device, progress or SilentProgress())
    if file is not None:
        write_table(file, result)
    return result


def doctor() -> list[dict[str, Any]]:
    """Per target: whether its runtime works on this machine, and why not."""
    found = []
    for target in load_targets().values():
        try:
            probe = find_backend(target).probe(target)
        except CompileSparseError as error:
            entry = {"available": False, "runtime": target.backend, "why_not": error.why, "hint": error.hint}
        else:
            entry = dict(vars(probe))
        found.append({"target": target.name, **entry})
    return found


def _recipe(recipe: Recipe | str | Path | None) -> Recipe | None:
    return recipe if recipe is None or isinstance(recipe, Recipe) else load_recipe(recipe)
