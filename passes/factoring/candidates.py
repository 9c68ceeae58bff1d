"""Which linear layers may become two, at which ranks, and why not the others."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from compile_sparse.compiler.diagnostics import Diagnostic
from compile_sparse.compiler.extension.pass_contract import PassContext
from compile_sparse.compiler.ir.linears import Linear, find_linears, is_lm_head
from compile_sparse.compiler.ir.program import Program
from compile_sparse.passes.factoring.allocation import Choices

__all__ = ["Candidate", "Limit", "find_candidates", "limits"]

GRADES = 4
"""Ranks are multiples of a later quantization's group size where at least this many such multiples are to choose from."""


@dataclass(frozen=True)
class Limit:
    """Two factors run faster than a weight of ``n`` parameters when they hold fewer than ``share * n - overhead``.

    Attributes:
        share: above 0, at most 1.
        overhead: parameters.
        why: where the numbers come from, a clause.
    """

    share: float
    overhead: int
    why: str

    def parameters(self, dense: int) -> int:
        """The most that pay for a weight of ``dense`` parameters; 0 or less when none do."""
        return math.ceil(self.share * dense) - self.overhead - 1


@dataclass(frozen=True)
class Candidate:
    """A linear layer and the ranks it may get."""

    linear: Linear
    choices: Choices

    @property
    def name(self) -> str:
        """Name of the layer's node."""
        return self.linear.node.name


def limits(program: Program, context: PassContext) -> tuple[Limit, ...]:
    """What factors must stay below for every phase of the declared workload to gain."""
    known, name = context.target.low_rank, context.target.name
    if known is None:
        return (Limit(1.0, 0, "above that the factors have more parameters than the weight"),)
    found = [Limit(known.prefill_pays_below, 0, _clause(name, "prompts", known.prefill_pays_below, 0))]
    if program.kind == "decoder" and context.workload.output > 1:
        overhead = known.extra_product_weights
        found.append(
            Limit(known.decode_pays_below, overhead, _clause(name, "decoding", known.decode_pays_below, overhead))
        )
    return tuple(found)


def _clause(target: str, phase: str, share: float, overhead: int) -> str:
    less = f" less {overhead:,} for one more GEMM" if overhead else ""
    return f"for {phase} {target} runs two factors faster below {share:.0%} of the parameters{less}"


def find_candidates(program: Program, context: PassContext) -> tuple[list[Candidate], list[Diagnostic]]:
    """Linears whose weight only they read, with the aligned ranks that pay; and a reason for every other linear."""
    linears, diagnostics = find_linears(program)
    bounds = limits(program, context)
    tied = set(program.aliases) | set(program.aliases.values())
    readers: Counter[str] = Counter()
    for node in program.graph.nodes:
        tensor = program.tensor_of(node)
        if tensor is not None:
            readers[tensor] += len(node.users)
    found: list[Candidate] = []
    for linear in linears:
        shape = program.weights[linear.tensor].shape
        rows, columns = shape[1 - linear.axis], shape[linear.axis]
        if is_lm_head(program, linear.node):
            diagnostics.append(
                Diagnostic(linear.tensor, "CS2501", "It is the lm_head, where every error is felt directly.")
            )
        elif linear.tensor in tied or readers[linear.tensor] > 1:
            diagnostics.append(
                Diagnostic(linear.tensor, "CS2501", "Its weight has another use, which needs the whole matrix.")
            )
        elif linear.tensor in program.masks:
            why = "It has a sparsity pattern, which two factors would fill."
            diagnostics.append(
                Diagnostic(linear.tensor, "CS2501", why, "Put low-rank before mask, as the order of phases says.")
            )
        else:
            bound = min(bounds, key=lambda limit: limit.parameters(rows * columns))
            ranks = _ranks(rows, columns, bound, context)
            if ranks:
                found.append(Candidate(linear, Choices(rows, columns, ranks)))
            else:
                diagnostics.append(_too_small(linear, rows, columns, bound, context))
    return found, diagnostics


def _ranks(rows: int, columns: int, bound: Limit, context: PassContext) -> range:
    """Aligned ranks that pay."""
    largest = max(0, bound.parameters(rows * columns)) // (rows + columns)
    alignment = context.target.alignment
    grouped = math.lcm(alignment, context.contraction_multiple)
    step = grouped if largest // grouped >= GRADES else alignment
    return range(step, largest + 1, step)


def _too_small(linear: Linear, rows: int, columns: int, bound: Limit, context: PassContext) -> Diagnostic:
    alignment = context.target.alignment
    held, dense = alignment * (rows + columns), rows * columns
    return Diagnostic(
        linear.tensor,
        "CS2502",
        f"At rank {alignment}, the lowest that {context.target.name} aligns to, the factors hold {alignment} * ({rows} + "
        f"{columns}) = {held:,} parameters, {held / dense:.0%} of the weight's {dense:,}; {bound.why}.",
        "It stays dense.",
    )
