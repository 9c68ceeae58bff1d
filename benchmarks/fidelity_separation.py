"""How far right artifacts stay below the bounds of verification, and how far wrong ones are beyond.

    python -m benchmarks.fidelity_separation MODEL [--target ort-cpu] [--scheme w8a8 ...]

Every scheme is compiled once as it is and once per mutant (``fidelity_mutants.py``). Printed is the largest error of a layer over
its bound: below 1 the artifact passes.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.fidelity_mutants import FILE_MUTANTS, MUTANTS
from compile_sparse.compiler.capture import capture
from compile_sparse.compiler.extension.backend_contract import ObservedLayers
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.ir.storage import cast_weights, torch_dtype
from compile_sparse.compiler.pipeline.job import Job, prepare
from compile_sparse.compiler.pipeline.runner import run_passes
from compile_sparse.compiler.progress import SilentProgress
from compile_sparse.compiler.recipes.recipe import recipe_from_yaml
from compile_sparse.compiler.runtimes.client import Worker
from compile_sparse.compiler.runtimes.messages import Load
from compile_sparse.compiler.verify.layers import check_layers, observed_calls

__all__ = ["Separation", "separations"]

QUIET = SilentProgress()


@dataclass(frozen=True)
class Separation:
    """One artifact: its largest error over the bound of that layer, and the layers beyond theirs."""

    scheme: str
    mutant: str
    ratio: float
    wrong: int
    checked: int


def separations(job: Job, dense: Program, scheme: str, mutants: Sequence[str] | None = None) -> Iterator[Separation]:
    """The right artifact first, then the mutants that this program can have."""
    passes = (
        () if scheme == "none" else recipe_from_yaml(f"passes: [{{quantize: {{scheme: {scheme}}}}}]").build_passes()
    )
    meant, _ = run_passes(dense, passes, job.context(QUIET))
    meant = cast_weights(meant, torch_dtype(job.precision))
    with Worker(job.backend.worker_command(job.target, job.settings)) as worker:
        yield _judged(job, meant, meant, scheme, "", worker)
        for name in mutants if mutants is not None else (*MUTANTS, *FILE_MUTANTS):
            try:
                wrong = MUTANTS[name](meant) if name in MUTANTS else meant
                yield _judged(job, meant, wrong, scheme, name, worker)
            except LookupError:
                continue


def _judged(job: Job, meant: Program, written: Program, scheme: str, mutant: str, worker: Worker) -> Separation:
    assert isinstance(job.backend, ObservedLayers)
    with tempfile.TemporaryDirectory() as scratch:
        model, copy = Path(scratch, "model"), Path(scratch, "copy")
        model.mkdir()
        copy.mkdir()
        job.backend.lower(written, job.target, model, QUIET, job.settings)
        if mutant in FILE_MUTANTS:
            FILE_MUTANTS[mutant](model)
        seen = job.backend.observation(meant, job.target, model, copy, job.settings)
        seen, calls = observed_calls(seen, text=job.text, seed=0)
        rows = max(1, len(calls.windows))
        worker.call(Load("m", str(seen.folder), 1, job.target.device, sequence=calls.longest, sequences=rows))
        found = check_layers(worker, "m", seen, calls, precision=job.precision, seed=0, progress=QUIET)
    first = found.wrong[0] if found.wrong else found.nearest
    assert first is not None
    ratio = float("inf") if first.error is None else first.error / first.bound
    return Separation(scheme, mutant, ratio, len(found.wrong), found.checked)


def main() -> None:
    """Print the table, row by row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--target", default="ort-cpu")
    parser.add_argument("--scheme", action="append", default=[])
    given = parser.parse_args()
    job = prepare(given.model, given.target, recipe_from_yaml("passes: []"))
    dense = capture(job.folder, progress=QUIET)
    print("| scheme | artifact | error / bound | layers beyond |\n|---|---|---|---|", flush=True)
    for scheme in given.scheme or ["none", "w8a8", "w8a16", "w4a16", "w4a16-g32"]:
        for row in separations(job, dense, scheme):
            named = row.mutant or "**right**"
            print(f"| {scheme} | {named} | {row.ratio:.3g} | {row.wrong} of {row.checked} |", flush=True)


if __name__ == "__main__":
    main()
