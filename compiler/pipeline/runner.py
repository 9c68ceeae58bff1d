"""Run a list of passes: order, honesty about changes, time, memory, verification."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import psutil

from compile_sparse.compiler.artifact.report import DiagnosticEntry, PassSection
from compile_sparse.compiler.extension.backend_contract import LoweringStep
from compile_sparse.compiler.extension.pass_contract import Pass, PassContext, PassResult
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.ir.verifier import InvalidProgram, verify_program
from compile_sparse.compiler.ir.verify_masks import verify_masks

__all__ = ["Cost", "observed", "run_passes", "structural_digest"]

SAMPLING_SECONDS = 0.02


def run_passes(
    program: Program, passes: Sequence[Pass | LoweringStep], context: PassContext, *, verify_each: bool = False
) -> tuple[Program, tuple[PassSection, ...]]:
    """Apply ``passes``, or a backend's lowering steps, in order.

    With ``verify_each`` the IR is verified after every pass, masked weights are read to see that they keep their zeros, and
    ``modified`` is compared with a digest of the program.

    Returns:
        The last program, and one report section per pass.
    """
    sections = []
    for step in passes:
        before = structural_digest(program) if verify_each else ""
        with observed() as cost:
            result = step.run(program, context)
        if verify_each:
            verify_program(result.program, after=step.name)
            verify_masks(result.program, after=step.name, before=program)
            changed = structural_digest(result.program) != before
            if changed != result.modified:
                raise InvalidProgram(f"pass {step.name} says modified={result.modified}, but the digest says {changed}")
        sections.append(_section(step, result, cost))
        program = result.program
    return program, tuple(sections)


def _section(step: Pass | LoweringStep, result: PassResult, cost: Cost) -> PassSection:
    return PassSection(
        name=step.name,
        changes_numerics=isinstance(step, Pass) and step.changes_numerics and result.modified,
        requested=dict(result.requested),
        achieved=dict(result.achieved),
        seconds=cost.seconds,
        peak_rss_bytes=cost.peak_rss_bytes,
        skips=tuple(DiagnosticEntry(**each.as_dict()) for each in result.diagnostics),
        notes=tuple(result.notes),
    )


def structural_digest(program: Program) -> str:
    """Digest of the graph, the bindings and the shapes, dtypes and identities of the weights."""
    parts = [str(program.graph)]
    for name, binding in program.bindings.items():
        source = program.weights[binding.tensor]
        parts.append(f"{name}={binding} {source.shape} {source.dtype} {id(source)}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


@dataclass
class Cost:
    """Wall-clock seconds and highest resident bytes of a block of work; final when the block has ended."""

    seconds: float = 0.0
    peak_rss_bytes: int = 0


@contextmanager
def observed() -> Iterator[Cost]:
    """Cost of the block. Memory is sampled, because the kernel's own peak never falls again."""
    process, cost, stop, start = psutil.Process(), Cost(), threading.Event(), time.perf_counter()

    def sample() -> None:
        while True:
            cost.peak_rss_bytes = max(cost.peak_rss_bytes, process.memory_info().rss)
            if stop.wait(SAMPLING_SECONDS):
                return

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield cost
    finally:
        stop.set()
        thread.join()
        cost.seconds = round(time.perf_counter() - start, 3)
