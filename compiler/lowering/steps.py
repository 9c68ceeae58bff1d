"""What every lowering step has in common: how it gives its result, and running a list of them without the compiler's runner."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from compile_sparse.compiler.diagnostics import Diagnostic
from compile_sparse.compiler.extension.backend_contract import Lowered, LoweringStep, SteppedLowering
from compile_sparse.compiler.extension.pass_contract import PassResult
from compile_sparse.compiler.extension.run_settings import RunSettings
from compile_sparse.compiler.ir.edit import eliminate_dead_code
from compile_sparse.compiler.ir.program import Binding, Program
from compile_sparse.compiler.progress import Progress
from compile_sparse.compiler.targets.target import Target

__all__ = ["lower_in_steps", "raised", "run_steps"]


def raised(
    program: Program,
    edited: Program,
    count: int,
    diagnostics: Sequence[Diagnostic] = (),
    *,
    bindings: Mapping[str, Binding] | None = None,
) -> PassResult:
    """What a raising step gives: ``edited`` without what died in it, or ``program`` itself where nothing was recognised.

    Args:
        program: what the step was given.
        edited: its clone after ``count`` edits.
        count: patterns raised.
        diagnostics: what was left alone.
        bindings: those of ``edited`` where the step added some.
    """
    if not count:
        return PassResult(program, modified=False, diagnostics=diagnostics)
    result = eliminate_dead_code(edited, bindings=bindings)
    return PassResult(result, modified=True, achieved={"raised": count}, diagnostics=diagnostics)


def run_steps(program: Program, steps: Sequence[LoweringStep]) -> tuple[Program, list[Diagnostic]]:
    """The program after ``steps`` in order, and everything they left alone: for plans, the baseline and tests.

    A compilation runs them in ``compile_sparse.compiler.pipeline.runner``, which also verifies and times them.
    """
    diagnostics: list[Diagnostic] = []
    for step in steps:
        result = step.run(program)
        program = result.program
        diagnostics += result.diagnostics
    return program, diagnostics


def lower_in_steps(
    backend: SteppedLowering, program: Program, target: Target, out: Path, progress: Progress, settings: RunSettings
) -> Lowered:
    """``Backend.lower`` of a backend that declares steps."""
    prepared, diagnostics = run_steps(program, backend.lowering_steps(target, settings))
    lowered = backend.write(program, prepared, target, out, progress, settings)
    return replace(lowered, diagnostics=[*diagnostics, *lowered.diagnostics])
