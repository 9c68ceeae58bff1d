"""Replace linear layers by two thinner ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator

from compile_sparse.compiler.diagnostics import Diagnostic
from compile_sparse.compiler.errors import ModelError, Refusal, UsageError
from compile_sparse.compiler.execution.scratch import Scratch
from compile_sparse.compiler.extension.pass_contract import Pass, PassContext, PassResult, Phase
from compile_sparse.compiler.ir.linears import find_linears
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.ir.weights import AbsentTensor, LastComputed
from compile_sparse.passes.factoring.allocation import allocate, uniform_rank
from compile_sparse.passes.factoring.candidates import Candidate, find_candidates, limits
from compile_sparse.passes.factoring.decompositions import decompositions, rows_of
from compile_sparse.passes.factoring.factors import Factors, factor
from compile_sparse.passes.factoring.rewriting import FactorSources, lazy_factors, replace_by_factors
from compile_sparse.passes.reconstruction.least_squares import refit

__all__ = ["LowRank"]

Criterion = Literal["loss", "whitened", "svd"]
Allocation = Literal["global", "uniform"]

NOTED = 0.02
"""A difference between the share asked for and the share removed that people are told about."""


class LowRank(Pass):
    """Factor weights ``W: [N, K]`` into ``outer [N, r] @ inner [r, K]``: ``linear(linear(x, inner), outer, b)``.

    The criterion says in which metric ``W - outer @ inner`` is smallest (see ``factoring.factors``):

    - ``svd``: the weights' own.
    - ``whitened``: of the outputs on calibration text (SVD-LLM, arXiv:2403.07378).
    - ``loss``: of the loss on calibration text, to second order, with a Kronecker-factored Fisher matrix
      (arXiv:1503.05671). Only these errors can be compared between layers, so with it ranks are allocated globally: layers
      where a rank costs most stay dense, and the others pay for them.

    Left alone: the lm_head, embeddings, weights with another use or with a sparsity pattern, and
    layers where no aligned rank would run faster on the target at the declared workload. The rank is a contraction dimension:
    it is a multiple of the target's alignment, and of a later quantization's group size where there is room.

    Memory: ``svd`` decomposes a layer when its factors are read. The others keep the factors (with ``loss`` up to the highest
    rank that pays, less than the weights) and 2 GiB of statistics.

    Raises (from ``run``):
        ModelError: CS2502 when no layer can be factored, CS2503 when a weight or statistic is not finite.
        Refusal: CS4104 when the amount asked for is out of reach or would not run faster.
        UsageError: CS1121 when the criterion or the refitting needs calibration text.
    """

    name: ClassVar[str] = "low-rank"
    phase: ClassVar[Phase] = "low-rank"
    changes_numerics: ClassVar[bool] = False

    fraction: float = Field(
        gt=0.0,
        lt=1.0,
        description="share of the parameters of the layers that can be factored to remove, between 0 and 1",
    )
    criterion: Criterion | None = Field(
        default=None,
        description="what the factors keep: 'loss' (decoders) or 'whitened' with calibration text, 'svd' without, by default",
    )
    allocation: Allocation | None = Field(
        default=None,
        description="uniform: every layer keeps the same share; global: the least loss in all, layers may stay dense (needs "
        "criterion loss); by default global where possible",
    )
    compensation: Literal["least-squares", "none"] | None = Field(
        default=None,
        description="least-squares: refit second factors and dense layers to the dense network; null: least-squares with "
        "calibration text, else none",
    )

    @model_validator(mode="after")
    def _comparable(self) -> LowRank:
        if self.allocation == "global" and self.criterion in ("svd", "whitened"):
            raise ValueError("only criterion loss measures every layer in the same unit; global allocation needs it")
        return self

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Choose ranks, decompose, edit the graph, refit."""
        criterion = self._used_criterion(program, context)
        self._require_text(criterion, context)
        candidates, diagnostics = find_candidates(program, context)
        if not candidates:
            raise _nothing_to_factor(diagnostics)
        global_ranking = criterion == "loss" and self.allocation != "uniform"
        notes: list[str] = []
        estimate: dict[str, Any] = {}
        if context.plan_only:
            equal = {each.name: torch.ones(min(each.choices.rows, each.choices.columns)) for each in candidates}
            ranks = (
                self._allocated(candidates, equal, context)
                if global_ranking
                else self._uniform(program, candidates, context)
            )
            sources = _planned(program, candidates, ranks)
            if global_ranking:
                notes.append(
                    "Calibration text decides which layers get which rank; only the total of the plan is right."
                )
        elif criterion == "svd":
            ranks = self._uniform(program, candidates, context)
            sources = _lazy(program, candidates, ranks)
        else:
            ranks, sources, missed = self._decomposed(program, candidates, context, criterion, global_ranking)
            if criterion == "loss":
                estimate = {"estimated_loss_added": round(missed / 2, 6)}
        if not global_ranking:
            diagnostics += [
                _too_far(each, self.fraction, program, context) for each in candidates if ranks[each.name] is None
            ]
        amounts = _amounts(candidates, ranks)
        if abs(amounts["fraction"] - self.fraction) > NOTED:
            notes.append(
                f"{self.fraction:.1%} was asked for; aligned ranks that pay remove {amounts['fraction']:.1%} of the parameters."
            )
        factored = replace_by_factors(program, sources)
        repaired, repair = self._repaired(program, factored, context)
        return PassResult(
            program=repaired,
            modified=True,
            requested={"fraction": self.fraction, "criterion": self.criterion, "allocation": self.allocation},
            achieved={"criterion": criterion, "allocation": "global" if global_ranking else "uniform"}
            | amounts
            | {"parameters": {"before": program.parameter_count(), "after": repaired.parameter_count()}}
            | estimate
            | repair,
            diagnostics=tuple(diagnostics),
            notes=tuple(notes),
        )

    # -- steps

    def _used_criterion(self, program: Program, context: PassContext) -> Criterion:
        if self.criterion is not None:
            return self.criterion
        if self.allocation == "global":
            return "loss"
        if context.calibration is None:
            return "svd"
        return "loss" if program.kind == "decoder" else "whitened"

    def _require_text(self, criterion: Criterion, context: PassContext) -> None:
        if context.calibration is not None or context.plan_only:
            return
        option = "criterion" if criterion != "svd" else "compensation"
        if criterion != "svd" or self.compensation == "least-squares":
            raise UsageError(
                "CS1121",
                f"Criterion {criterion!r} needs calibration text."
                if option == "criterion"
                else "Refitting needs calibration text.",
                where=f"{self.name}.{option}",
                hint=f"Give calibration text, or set {option}: {'svd' if option == 'criterion' else 'none'}.",
            )

    def _uniform(
        self, program: Program, candidates: Sequence[Candidate], context: PassContext
    ) -> dict[str, int | None]:
        limit = min(limits(program, context), key=lambda each: each.share)
        if 1.0 - self.fraction >= limit.share:
            raise Refusal(
                "CS4104",
                f"Removing {self.fraction:.0%} of every layer would not run faster on {context.target.name}.",
                where=f"{self.name}.fraction",
                why=f"Each layer would keep {1.0 - self.fraction:.0%} of its parameters; {limit.why}.",
                hint=f"Remove more than {1.0 - limit.share:.0%}, or use criterion: loss, which leaves some layers dense.",
            )
        ranks = {each.name: uniform_rank(each.choices, self.fraction) for each in candidates}
        if all(rank is None for rank in ranks.values()):
            raise Refusal(
                "CS4104",
                f"Removing about {self.fraction:.0%} of a layer does not run faster on {context.target.name}.",
                where=f"{self.name}.fraction",
                why=_too_far(candidates[0], self.fraction, program, context).why,
                hint="Remove more, or use criterion: loss, which leaves some layers dense.",
            )
        return ranks

    def _allocated(
        self, candidates: Sequence[Candidate], energies: Mapping[str, torch.Tensor], context: PassContext
    ) -> dict[str, int | None]:
        ranks = allocate({each.name: each.choices for each in candidates}, energies, self.fraction)
        if ranks is None:
            raise _out_of_reach(candidates, self.fraction, context)
        return ranks

    def _decomposed(
        self,
        program: Program,
        candidates: Sequence[Candidate],
        context: PassContext,
        criterion: Criterion,
        global_ranking: bool,
    ) -> tuple[dict[str, int | None], dict[str, FactorSources], float]:
        """Ranks, factors, and the energy they miss in all."""
        ranks = {} if global_ranking else self._uniform(program, candidates, context)
        found: dict[str, Any] = {}
        assert context.calibration is not None  # _require_text has seen to it
        for each, factors in decompositions(
            program, candidates, context.calibration, context.progress, outputs=criterion == "loss"
        ):
            dtype = program.weights[each.linear.tensor].dtype
            rank = ranks.get(each.name)
            found[each.name] = (factors if rank is None else factors.truncated(rank)).to(dtype)
        energies = {name: factors.energies for name, factors in found.items()}
        if global_ranking:
            ranks = self._allocated(candidates, energies, context)
        sources, missed, scratch = {}, 0.0, Scratch()
        for name, rank in ranks.items():
            factors = found.pop(name)
            if rank is not None:
                cut = factors.truncated(rank)
                sources[name] = FactorSources(scratch.keep(cut.inner), scratch.keep(cut.outer))
                missed += float(factors.energies[rank:].sum())
        return ranks, sources, missed

    def _repaired(self, program: Program, factored: Program, context: PassContext) -> tuple[Program, dict[str, Any]]:
        wanted = self.compensation or ("least-squares" if context.calibration is not None else "none")
        if wanted == "none" or context.calibration is None or context.plan_only:
            return factored, {"compensation": wanted}
        # Layers that stay dense make up for the others too, unless they hold zeros that refitting would fill.
        free = {each.node.name for each in find_linears(factored)[0] if each.tensor not in factored.masks}
        repaired = refit(program, factored, context.calibration, context.progress, only=free)
        return repaired.program, {"compensation": wanted, **repaired.achieved}


def _lazy(
    program: Program, candidates: Sequence[Candidate], ranks: Mapping[str, int | None]
) -> dict[str, FactorSources]:
    """Plain decompositions, made when their factors are read."""
    memory: LastComputed[Factors] = LastComputed()
    sources: dict[str, FactorSources] = {}
    for each in candidates:
        rank, linear = ranks[each.name], each.linear
        source = program.weights[linear.tensor]
        if rank is None:
            continue
        if isinstance(source, AbsentTensor):
            sources |= _planned(program, [each], ranks)
            continue

        def compute(each: Candidate = each, rank: int = rank) -> Any:
            return factor(rows_of(program, each.linear), where=each.linear.tensor).truncated(rank)

        shape = (each.choices.rows, each.choices.columns)
        sources[each.name] = lazy_factors(memory, linear.tensor, shape, rank, source.dtype, compute)
    return sources


def _planned(
    program: Program, candidates: Sequence[Candidate], ranks: Mapping[str, int | None]
) -> dict[str, FactorSources]:
    """Shapes alone."""
    sources = {}
    for each in candidates:
        rank, tensor = ranks[each.name], each.linear.tensor
        if rank is not None:
            dtype = program.weights[tensor].dtype
            sources[each.name] = FactorSources(
                AbsentTensor((rank, each.choices.columns), dtype, tensor),
                AbsentTensor((each.choices.rows, rank), dtype, tensor),
            )
    return sources


def _amounts(candidates: Sequence[Candidate], ranks: Mapping[str, int | None]) -> dict[str, Any]:
    before = sum(each.choices.dense for each in candidates)
    after = sum(each.choices.parameters(ranks[each.name]) for each in candidates)
    return {
        "fraction": 1.0 - after / before,
        "linears": {
            "factored": sum(rank is not None for rank in ranks.values()),
            "dense": sum(rank is None for rank in ranks.values()),
        },
        "ranks": {each.linear.tensor: ranks[each.name] for each in candidates if ranks[each.name] is not None},
    }


def _too_far(each: Candidate, fraction: float, program: Program, context: PassContext) -> Diagnostic:
    choices, rank = each.choices, each.choices.ranks[-1]
    limit = min(limits(program, context), key=lambda limit: limit.parameters(choices.dense))
    return Diagnostic(
        each.linear.tensor,
        "CS2502",
        f"The highest aligned rank that pays, {rank}, keeps {choices.parameters(rank) / choices.dense:.0%} of its "
        f"{choices.dense:,} parameters, {1.0 - fraction:.0%} were to be kept; {limit.why}.",
        "It stays dense.",
    )


def _nothing_to_factor(diagnostics: Sequence[Diagnostic]) -> ModelError:
    reasons = list(dict.fromkeys(f"{each.where}: {each.why}" for each in diagnostics))
    shown = reasons[:5] + ([f"... and {len(reasons) - 5} more."] if len(reasons) > 5 else [])
    return ModelError(
        "CS2502",
        "No layer of this model can be factored.",
        where="low-rank",
        why=" ".join(shown) or "It has no linear layer with a stored weight.",
        hint="Remove low-rank from the recipe, or choose a target with a smaller alignment.",
    )


def _out_of_reach(candidates: Sequence[Candidate], fraction: float, context: PassContext) -> Refusal:
    dense = sum(each.choices.dense for each in candidates)
    least = sum(each.choices.parameters(each.choices.ranks[0]) for each in candidates)
    return Refusal(
        "CS4104",
        f"{fraction:.0%} of the parameters cannot be removed by factoring.",
        where="low-rank.fraction",
        why=f"The lowest ranks that {context.target.name} aligns to leave {least:,} of {dense:,} parameters, "
        f"{least / dense:.0%}.",
        hint=f"Remove at most {1.0 - least / dense:.0%}.",
    )
