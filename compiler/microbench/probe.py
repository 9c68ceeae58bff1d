"""Probe: time every form of every GEMM of a model on the GPU at hand, as a table that a target file can learn from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from statistics import median
from typing import Any

from compile_sparse.compiler.capture import ModelFolder, capture
from compile_sparse.compiler.errors import EnvironmentFailure, UsageError
from compile_sparse.compiler.microbench.device import Device, mismatch, open_cuda
from compile_sparse.compiler.microbench.gemm_forms import Form, Prepared, forms_for
from compile_sparse.compiler.microbench.numerics import relative_error
from compile_sparse.compiler.microbench.shapes import ProductShape, product_shapes
from compile_sparse.compiler.microbench.suggestion import suggest
from compile_sparse.compiler.microbench.timing import Runner, alternate
from compile_sparse.compiler.progress import Progress
from compile_sparse.compiler.targets.target import Target
from compile_sparse.compiler.targets.workload import Workload
from compile_sparse.compiler.verify.statistics import ratio_of_rounds
from compile_sparse.compiler.version import TOOL_VERSION

__all__ = ["device_for", "measure_shape", "probe_model"]

LIMITS = (
    "Products alone: no scales, biases or activation functions, and what comes before and after is left out.",
    "Kernels of cuBLAS and cuSPARSELt, as torch calls them; TensorRT has others and chooses by itself.",
    "int8 results have 32 bits here; TensorRT's sparse int8 kernels pay where they have 8.",
    "Factors are random, and weights are taken in turn so that they come from memory, not from a cache.",
)
_FAILURES = (RuntimeError, ValueError, TypeError, NotImplementedError, AssertionError, AttributeError)
"""What torch raises for shapes, formats and devices that a private operator does not take."""


def device_for(target: Target, *, any_gpu: bool) -> Device:
    """The GPU at hand, which must be the target's.

    Raises:
        UsageError: CS1044 when the target is no NVIDIA GPU.
        EnvironmentFailure: CS5401 without a GPU, CS5402 when it is another one.
    """
    if not target.compute_capability:
        raise UsageError(
            "CS1044",
            f"{target.name} is no NVIDIA GPU, so there is nothing to probe.",
            where=target.name,
            why="The probe compares kernels of NVIDIA's libraries.",
            hint="Choose a target with a compute capability; 'compile-sparse targets' lists them.",
        )
    device = open_cuda()
    if not any_gpu:
        refuse_other(target, device)
    return device


def refuse_other(target: Target, device: Device) -> None:
    """Raise CS5402 unless ``device`` is the target's GPU: a table of another GPU would say nothing about it."""
    if why := mismatch(target, device):
        raise EnvironmentFailure(
            "CS5402",
            f"This is not {target.name}'s GPU.",
            where=device.name,
            why=why,
            hint="Choose this GPU's target, or add --any-gpu; the table then says what it was measured on.",
        )


def probe_model(
    folder: ModelFolder,
    target: Target,
    workload: Workload,
    device: Device,
    progress: Progress,
    forms: Sequence[Form] | None = None,
) -> dict[str, Any]:
    """Measure every GEMM of the model in ``folder``. Its weights are not read; random ones stand for them.

    Args:
        folder: an opened model folder.
        target: whose baseline precision the dense form has, and whose 2:4 entry the suggestion starts from.
        workload: requests, prompt and rounds.
        device: see ``device_for``.
        progress: where shapes are reported.
        forms: the dense form first; None: everything that torch has.

    Returns:
        Plain data: ``device``, ``workload``, ``rows`` (see ``measure_shape``), ``left_out``, ``suggestion`` (see ``suggest``),
        ``limits``.
    """
    shapes, left_out = product_shapes(capture(folder, require_weights=False, progress=progress), workload)
    forms = list(forms) if forms is not None else forms_for(target.baseline_precision)
    rows: list[dict[str, Any]] = []
    with progress.task("GEMMs", total=len(shapes)) as task:
        for shape in shapes:
            rows += measure_shape(shape, forms, device, rounds=workload.rounds)
            device.release()
            task.advance()
    now, facts = datetime.now(UTC), device.facts()
    versions = ", ".join(f"{key} {facts[key]}" for key in ("torch", "cuda", "driver") if facts.get(key))
    setting = f"{facts['name']}, {versions}, {now.date().isoformat()}"
    return {
        "schema_version": 1,
        "kind": "probe",
        "tool": TOOL_VERSION,
        "target": target.name,
        "model": folder.path.name,
        "same_gpu": not mismatch(target, device),
        "device": facts,
        "measured_at": now.isoformat(timespec="seconds"),
        "workload": workload.model_dump(mode="json"),
        "rows": rows,
        "left_out": [skip.as_dict() for skip in left_out],
        "suggestion": suggest(rows, target.pattern("2:4"), setting),
        "limits": list(LIMITS),
    }


def measure_shape(
    shape: ProductShape, forms: Sequence[Form], device: Device, *, rounds: int, least_seconds: float = 0.02
) -> list[dict[str, Any]]:
    """One row per form. A form that cannot be measured is a row with ``why_not``, never an exception.

    All forms alternate in the same rounds. ``us``: median microseconds per GEMM; ``over_dense``: speed-up over the first form,
    ``over_twin``: of a 2:4 form over the dense one of its format, each ``{"value", "ci95"}`` over rounds, above 1 when faster;
    ``timing``: ``graph`` (the GPU's time) or ``launches`` (what Python takes is in it, for every form of the shape).
    """
    rows = {form.name: _empty(shape, form) for form in forms}
    ready: dict[str, Prepared] = {}
    for form in forms:
        row = rows[form.name]
        row["why_not"] = form.unavailable(device) or form.misfit(shape)
        if not row["why_not"]:
            prepared = _checked(form, shape, device, row)
            if prepared is not None:
                ready[form.name] = prepared
    runners, failed = _runners(ready, device)
    for name, why in failed.items():
        rows[name]["why_not"] = why
    if forms[0].name not in runners:
        for name in runners:
            rows[name]["why_not"] = "The dense form could not be measured, so there is nothing to compare with."
        return list(rows.values())
    try:
        times = alternate(runners, rounds=rounds, least_seconds=least_seconds)
    except _FAILURES as error:
        for name in runners:
            rows[name]["why_not"] = f"Timing failed: {_first_line(error)}"
        return list(rows.values())
    dense = {form.format: form.name for form in forms if not form.pattern}
    for form in forms:
        if form.name not in times:
            continue
        row, seconds = rows[form.name], times[form.name]
        row |= {"us": median(seconds) * 1e6, "timing": runners[form.name].mode, "note": ready[form.name].note}
        if form is not forms[0]:
            row["over_dense"] = ratio_of_rounds(seconds, times[forms[0].name]).as_dict()
        if form.pattern and (same := dense.get(form.format)) in times:
            row["over_twin"] = ratio_of_rounds(seconds, times[same]).as_dict()
    return list(rows.values())


def _empty(shape: ProductShape, form: Form) -> dict[str, Any]:
    sizes = {key: getattr(shape, key) for key in ("regime", "rows", "inner", "outer", "layers", "example")}
    what = {"form": form.name, "format": form.format, "pattern": form.pattern, "bound": form.bound}
    nothing = dict.fromkeys(("us", "over_dense", "over_twin", "error", "timing"))
    return {**sizes, **what, **nothing, "note": "", "why_not": ""}


def _checked(form: Form, shape: ProductShape, device: Device, row: dict[str, Any]) -> Prepared | None:
    """The prepared form if it computes the GEMM; otherwise the row says why not."""
    try:
        prepared = form.prepare(shape, device)
        error = relative_error(prepared)
    except _FAILURES as problem:
        row["why_not"] = f"It failed here: {_first_line(problem)}"
        return None
    if not error <= form.bound:
        row["why_not"] = f"Its result differs from the GEMM by {error:.2g}, more than {form.bound:.2g}; not timed."
        return None
    row["error"] = error
    return prepared


def _runners(ready: Mapping[str, Prepared], device: Device) -> tuple[dict[str, Runner], dict[str, str]]:
    """Runners of one mode, and why others are missing: a replayed graph next to plain launches would seem faster than it is."""
    for graph in (True, False):
        found: dict[str, Runner] = {}
        failed: dict[str, str] = {}
        for name, prepared in ready.items():
            try:
                found[name] = device.runner(prepared.calls, graph=graph)
            except _FAILURES as error:
                failed[name] = f"It failed here: {_first_line(error)}"
        if len({runner.mode for runner in found.values()}) <= 1:
            break
    return found, failed


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
