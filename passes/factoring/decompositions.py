"""Decompose the weights of many layers with what calibration text says about them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import torch

from compile_sparse.compiler.execution.calibration import CalibrationStream
from compile_sparse.compiler.ir.linears import Linear
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.progress import Progress
from compile_sparse.passes.factoring.candidates import Candidate
from compile_sparse.passes.factoring.factors import Factors, factor
from compile_sparse.passes.statistics.fisher import output_fisher
from compile_sparse.passes.statistics.gram import Gram, each_gram

__all__ = ["decompositions", "rows_of"]

BUDGET_BYTES = 2 << 30
"""Fisher matrices held at a time; wider models are differentiated on the calibration text several times."""


def decompositions(
    program: Program,
    candidates: Sequence[Candidate],
    calibration: CalibrationStream,
    progress: Progress,
    *,
    outputs: bool,
    budget_bytes: int = BUDGET_BYTES,
) -> Iterator[tuple[Candidate, Factors]]:
    """Factors of every candidate up to its highest rank, in the metric of its inputs (and, with ``outputs``, of the loss).

    Args:
        program: what the text runs through.
        candidates: in graph order.
        calibration: the text.
        progress: told of every batch and layer.
        outputs: take the Fisher matrix of the outputs as their metric; needs gradients.
        budget_bytes: bound on the Fisher matrices in memory, ``8 N^2`` bytes per layer. Of Gram matrices, ``8 K^2`` bytes, only
            those are held that a later candidate needs too.
    """
    readers = Counter(each.linear.input.name for each in candidates)
    coming, grams = each_gram(program, readers, calibration, progress), dict[str, Gram]()
    for group in _groups(candidates, budget_bytes) if outputs else [candidates]:
        fishers = output_fisher(program, [each.name for each in group], calibration, progress) if outputs else {}
        with progress.task("decompose weights", total=len(group)) as task:
            for each in group:
                source = each.linear.input.name
                while source not in grams:  # in graph order, as the candidates: parallel branches read one again later
                    grams.update([next(coming)])
                readers[source] -= 1
                gram = grams[source] if readers[source] else grams.pop(source)
                found = factor(
                    rows_of(program, each.linear),
                    input_metric=gram.moment,
                    output_metric=fishers.get(each.name),
                    where=each.linear.tensor,
                )
                task.advance()
                yield each, found.truncated(each.choices.ranks[-1])


def rows_of(program: Program, linear: Linear) -> torch.Tensor:
    """The weight as ``[N, K]``."""
    value = program.weights.load(linear.tensor)
    return value if linear.axis == 1 else value.t()


def _groups(candidates: Sequence[Candidate], budget_bytes: int) -> list[list[Candidate]]:
    """Consecutive candidates whose Fisher matrices fit the budget together; one that never fits is alone."""
    groups: list[list[Candidate]] = []
    room = 0
    for each in candidates:
        size = 8 * each.choices.rows**2
        if not groups or size > room:
            groups.append([])
            room = budget_bytes
        groups[-1].append(each)
        room -= size
    return groups
