"""What the passes that remove positions of axes have in common: options, order of work, report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from compile_sparse.compiler.axes.algebra import Axis
from compile_sparse.compiler.axes.analysis import Analysis, analyse, changeable_roles
from compile_sparse.compiler.axes.groups import Group, Kind
from compile_sparse.compiler.axes.rewrite import apply_selection
from compile_sparse.compiler.axes.selection import KeepTables, Selection
from compile_sparse.compiler.diagnostics import Diagnostic
from compile_sparse.compiler.errors import ModelError, UsageError
from compile_sparse.compiler.extension.pass_contract import Pass, PassContext, PassResult, Phase
from compile_sparse.compiler.ir.program import Program
from compile_sparse.passes.criteria.registry import CRITERIA
from compile_sparse.passes.pruning.groups import Prunable, eligible_groups, prunable_groups
from compile_sparse.passes.pruning.obs import Removal
from compile_sparse.passes.pruning.selection import (
    Choice,
    keep_table,
    kept_sizes,
    rank_by_obs,
    rank_by_score,
    with_closed_form,
)
from compile_sparse.passes.reconstruction.least_squares import refit

__all__ = ["AxisPruning", "CriterionName"]

CriterionName = Literal["obs", "magnitude", "activation", "wanda", "fasp", "taylor", "fisher", "ablation"]


class AxisPruning(Pass):
    """Base of the structural passes. A subclass names a kind of axis and documents what that means.

    Positions are ranked, the least important of every group go, the rewriting engine slices every coupled tensor and literal,
    and with calibration text the linear layers are refitted in closed form to the dense network.

    Raises (from ``run``):
        ModelError: CS2104 when every group is frozen or there is none, CS2105 when none has an aligned size, CS2107 when a
            router would have too few experts to choose from.
        UsageError: CS1121 when a criterion or the refitting needs calibration text and there is none.
    """

    phase: ClassVar[Phase] = "structural"
    changes_numerics: ClassVar[bool] = False
    kind: ClassVar[Kind]
    noun: ClassVar[str]
    """What a position is called in messages."""
    nothing: ClassVar[str]
    """Why a model may have none."""
    data_criterion: ClassVar[CriterionName] = "obs"
    """Ranking used when there is calibration text and the recipe names none."""
    refits_all: ClassVar[bool] = False
    """Whether every linear layer is refitted, or only those that lost inputs."""

    fraction: float = Field(gt=0.0, lt=1.0, description="share of the positions to remove, between 0 and 1")
    criterion: CriterionName | None = Field(
        default=None,
        description="how positions are ranked; null: 'obs' (the error left after refitting) or, where that has no closed form, "
        "'wanda', with calibration text; 'magnitude' without",
    )
    allocation: Literal["uniform", "global"] = Field(
        default="uniform",
        description="uniform: every group loses the same share; global: one ranking over all groups, sizes differ by layer",
    )
    compensation: Literal["least-squares", "bias", "none"] | None = Field(
        default=None,
        description="least-squares: refit the linear layers to the dense network; bias: only their biases; "
        "null: least-squares with calibration text, else none",
    )

    def selects(self, group: Group) -> bool:
        """Whether a group of the kind is meant."""
        return True

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Choose what stays, let the rewriting engine apply it, refit what is left."""
        self._require_text(context)
        analysis = analyse(program, interface_may_change=changeable_roles(context.target))
        groups, diagnostics = eligible_groups(analysis, self.kind, self.selects)
        prunables, unaligned, notes = prunable_groups(analysis, groups, self.fraction, context)
        diagnostics += unaligned
        if not prunables:
            raise self._nothing_to_do(diagnostics)
        choices = self._ranked(analysis, prunables, context)
        global_ranking = self.allocation == "global" and not context.plan_only
        sizes = kept_sizes(choices, fraction=self.fraction, global_ranking=global_ranking)
        if global_ranking and not any(sizes[p.group.leaf] < p.group.size for p in prunables):
            raise self._too_little(prunables)
        keep: KeepTables = {
            choice.prunable.group.anchor: keep_table(choice, sizes[choice.prunable.group.leaf])
            for choice in choices
            if sizes[choice.prunable.group.leaf] < choice.prunable.group.size
        }
        selection = Selection(analysis, keep)
        pruned = apply_selection(selection)
        repaired, repair, unrepaired = self._repaired(pruned, selection, prunables, context)
        diagnostics += unrepaired
        return PassResult(
            program=repaired,
            modified=True,
            requested=self.model_dump(exclude_defaults=True) | {"fraction": self.fraction, "criterion": self.criterion},
            achieved=self._achieved(program, repaired, prunables, sizes, context) | repair,
            diagnostics=tuple(diagnostics),
            notes=self._notes(notes, context),
        )

    # -- steps

    def _require_text(self, context: PassContext) -> None:
        if context.calibration is not None:
            return
        named = self.criterion
        if named is not None and (named == "obs" or CRITERIA[named].needs_calibration):
            raise UsageError(
                "CS1121",
                f"Ranking {self.noun} by {named} needs calibration text.",
                where=f"{self.name}.criterion",
                hint="Give calibration text, or set criterion: magnitude.",
            )
        if self.compensation in ("least-squares", "bias"):
            raise UsageError(
                "CS1121",
                "Refitting needs calibration text.",
                where=f"{self.name}.compensation",
                hint="Give calibration text, or set compensation: none.",
            )

    def _ranked(self, analysis: Analysis, prunables: Sequence[Prunable], context: PassContext) -> list[Choice]:
        if context.plan_only:  # sizes only: the last positions go
            return [_last_first(prunable) for prunable in prunables]
        global_ranking = self.allocation == "global"
        if self._used_criterion(context) != "obs":
            used = self._used_criterion(context)
            return rank_by_score(analysis, prunables, used, context, comparable=global_ranking)
        closed = with_closed_form(analysis, prunables)
        others = [p for p in prunables if p not in closed]
        if global_ranking and others:  # costs of two kinds cannot be compared: one criterion for all
            return rank_by_score(analysis, prunables, _without_closed_form(prunables), context, comparable=True)
        choices = (
            rank_by_obs(analysis, closed, context, global_ranking=global_ranking, nested=self._nested(analysis, closed))
            if closed
            else []
        )
        if others:
            choices += rank_by_score(analysis, others, _without_closed_form(others), context, comparable=False)
        return choices

    def _nested(self, analysis: Analysis, prunables: Sequence[Prunable]) -> Mapping[Axis, Group]:
        """Groups whose positions may be chosen anew for each position of an outer axis."""
        return {}

    def _used_criterion(self, context: PassContext) -> CriterionName:
        return self.criterion or (self.data_criterion if context.calibration is not None else "magnitude")

    def _repaired(
        self, pruned: Program, selection: Selection, prunables: Sequence[Prunable], context: PassContext
    ) -> tuple[Program, dict[str, Any], list[Diagnostic]]:
        wanted = self.compensation or ("least-squares" if context.calibration is not None else "none")
        if wanted == "none" or context.calibration is None or context.plan_only:
            return pruned, {"compensation": wanted}, []
        analysis = selection.analysis

        def gather(node: str, value: torch.Tensor) -> torch.Tensor:
            label = analysis.labels[node]
            return selection.gather(value, label) if isinstance(label, list) else value

        consumers = {contact.node for prunable in prunables for contact in prunable.group.consumers}
        repaired = refit(
            analysis.program,
            pruned,
            context.calibration,
            context.progress,
            gather=gather,
            only=None if self.refits_all else consumers,
            biases_only=wanted == "bias",
        )
        if not repaired.layers:
            return pruned, {"compensation": "none"}, [_not_refitted(self.name, wanted)]
        return repaired.program, {"compensation": wanted, **repaired.achieved}, []

    def _achieved(
        self,
        program: Program,
        pruned: Program,
        prunables: Sequence[Prunable],
        sizes: Mapping[Axis, int],
        context: PassContext,
    ) -> dict[str, Any]:
        before, after = sum(p.group.size for p in prunables), sum(sizes.values())
        counts = sorted({sizes[p.group.leaf] for p in prunables})
        return {
            "criterion": self._used_criterion(context),
            "allocation": self.allocation,
            "fraction": 1.0 - after / before,
            "groups": len(prunables),
            self.noun: {"before": before, "after": after, "sizes": counts},
            "parameters": {"before": program.parameter_count(), "after": pruned.parameter_count()},
        }

    def _notes(self, uniform: Sequence[str], context: PassContext) -> tuple[str, ...]:
        if self.allocation == "uniform":
            return tuple(uniform)
        unknown = "Global allocation ranks weights or text, which a plan does not read; equal sizes are shown."
        return (unknown,) if context.plan_only else ()

    def _too_little(self, prunables: Sequence[Prunable]) -> ModelError:
        total, step = sum(p.group.size for p in prunables), min(p.step for p in prunables)
        return ModelError(
            "CS2112",
            f"The fraction removes no {self.noun}.",
            where=f"{self.name}.fraction",
            why=f"{self.fraction:g} of {total} is {self.fraction * total:g}, and they go in steps of {step}.",
            hint=f"Ask for {step / total:.3g} or more.",
        )

    def _nothing_to_do(self, diagnostics: Sequence[Diagnostic]) -> ModelError:
        unaligned = any(each.code == "CS2105" for each in diagnostics)
        reasons: list[str] = list(dict.fromkeys(f"{each.where}: {each.why}" for each in diagnostics))
        shown = reasons[:5] + ([f"... and {len(reasons) - 5} more."] if len(reasons) > 5 else [])
        return ModelError(
            "CS2105" if unaligned else "CS2104",
            f"No {self.noun} can be removed from this model.",
            where=self.name,
            why=" ".join(shown) or self.nothing,
            hint=next((s.hint for s in diagnostics if s.code == "CS2105"), "")
            if unaligned
            else f"Remove {self.name} from the recipe.",
        )


def _not_refitted(name: str, wanted: str) -> Diagnostic:
    why = (
        "No linear layer that lost inputs has a bias of its own."
        if wanted == "bias"
        else "No linear layer with a stored weight of its own lost inputs, or the text is too short to describe those that did; "
        "GEMMs with one matrix per expert are not refitted."
    )
    return Diagnostic(name, "CS2115", why, "More calibration text may help; or set compensation: none.")


def _last_first(prunable: Prunable) -> Choice:
    size = prunable.group.size
    return Choice(prunable, Removal(torch.arange(size).flip(0), torch.zeros(size, dtype=torch.float64)))


def _without_closed_form(prunables: Sequence[Prunable]) -> CriterionName:
    """What ranks groups whose refitted error has no closed form: their inputs if weights contract them all, else gradients."""
    return "wanda" if all(prunable.group.consumers for prunable in prunables) else "fisher"
