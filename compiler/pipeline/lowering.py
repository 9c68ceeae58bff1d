"""Lowering a compiled program: the backend's steps, run as passes are, the range check between them, and the files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from compile_sparse.compiler.artifact.report import DiagnosticEntry, PassSection
from compile_sparse.compiler.extension.backend_contract import Backend, Lowered, SteppedLowering
from compile_sparse.compiler.extension.pass_contract import PassContext
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.lowering.mixed_precision import MixedPrecision, half_precision_nodes
from compile_sparse.compiler.pipeline.runner import Cost, observed, run_passes
from compile_sparse.compiler.verify.range_check import require_range
from compile_sparse.compiler.verify.reference import reference_windows

__all__ = ["lower_program"]


def lower_program(
    backend: Backend,
    program: Program,
    context: PassContext,
    out: Path,
    *,
    text: Sequence[Sequence[int]] = (),
    verify_each: bool = False,
) -> tuple[Lowered, PassSection]:
    """Write ``program`` for the context's target into the empty folder ``out``.

    Args:
        backend: the target's.
        program: after the passes.
        context: what the passes were given.
        out: the model's folder.
        text: token ids the artifact is checked on (decoders).
        verify_each: verify the program after every step of the backend.

    Returns:
        What was written, and the report's ``lower`` section: steps and writing together.

    Raises:
        Refusal: CS4432, a value leaves the range of fp16; and what the backend refuses.
        InvalidProgram: a step broke the program.
    """
    if not isinstance(backend, SteppedLowering):
        with observed() as cost:
            lowered = backend.lower(program, context.target, out, context.progress, context.settings)
        return lowered, _section(lowered, (), cost)
    steps = backend.lowering_steps(context.target, context.settings)
    typing = next((place for place, step in enumerate(steps) if isinstance(step, MixedPrecision)), len(steps))
    computed, sections = run_passes(program, steps[:typing], context, verify_each=verify_each)
    prepared, more = run_passes(computed, steps[typing:], context, verify_each=verify_each)
    if names := half_precision_nodes(computed, prepared):
        windows = reference_windows(program, text, context.seed) if program.kind == "decoder" else ()
        require_range(computed, names, windows=windows, seed=context.seed, progress=context.progress)
    with observed() as cost:
        lowered = backend.write(program, prepared, context.target, out, context.progress, context.settings)
    return lowered, _section(lowered, sections + more, cost)


def _section(lowered: Lowered, steps: Sequence[PassSection], cost: Cost) -> PassSection:
    return PassSection(
        name="lower",
        changes_numerics=False,
        achieved=dict(lowered.form),
        seconds=round(cost.seconds + sum(step.seconds or 0 for step in steps), 3),
        peak_rss_bytes=max([cost.peak_rss_bytes, *(step.peak_rss_bytes or 0 for step in steps)]),
        skips=(
            *(each for step in steps for each in step.skips),
            *(DiagnosticEntry(**each.as_dict()) for each in lowered.diagnostics),
        ),
    )
