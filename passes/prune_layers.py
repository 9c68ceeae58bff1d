"""Remove whole blocks, or the attention or MLP of some blocks: depth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from compile_sparse.compiler.errors import ModelError, UsageError
from compile_sparse.compiler.extension.pass_contract import Pass, PassContext, PassResult, Phase
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.residual.remove import Dropped, drop_branches
from compile_sparse.compiler.residual.units import Unit, UnitKind, find_units
from compile_sparse.passes.criteria.block_influence import block_influence
from compile_sparse.passes.criteria.depth_ablation import greedy_ablation
from compile_sparse.passes.reconstruction.least_squares import refit

__all__ = ["PruneLayers"]

_NOUNS: dict[UnitKind, str] = {"block": "blocks", "attention": "attention branches", "mlp": "MLP branches"}


class PruneLayers(Pass):
    """Remove a fraction of the blocks, or of their attention or MLP branches.

    A block adds to the residual stream, ``y = x + f(x)``; without it ``y = x``. Nothing changes shape. Of ``n`` units the
    nearest whole number to ``fraction * n`` goes, half rounded up. Which ones:

    - ``ablation``: one after the other, the one without which the loss on calibration text is lowest (SLEB,
      arXiv:2402.09025).
    - ``block-influence``: those that turn the stream least (ShortGPT, arXiv:2403.03853).
    - ``deepest``: the last but one and those before it; needs no text. The last block is kept because it makes the stream
      fit the head (arXiv:2403.17887). A guess: on small models it is far worse than the other two.

    With calibration text the linear layers that stay are then refitted in closed form: the layer before a gap takes over what
    the removed blocks added to the stream, as far as its inputs tell.

    Left alone: what is not a residual branch, and the last unit of its kind.

    Raises (from ``run``):
        ModelError: CS2112 when the fraction is less than half a unit, CS2113 when it is all of them, CS2114 when the model has
            none.
        UsageError: CS1121 when the criterion needs calibration text and there is none.
    """

    name: ClassVar[str] = "prune-layers"
    phase: ClassVar[Phase] = "depth"
    changes_numerics: ClassVar[bool] = False

    fraction: float = Field(gt=0.0, lt=1.0, description="share of the blocks (or branches) to remove, between 0 and 1")
    unit: UnitKind = Field(
        default="block",
        description="what is removed: whole blocks, or only the attention or only the MLP of some blocks",
    )
    criterion: Literal["ablation", "block-influence", "deepest"] | None = Field(
        default=None,
        description="which ones go; null: ablation with calibration text, deepest without",
    )

    compensation: Literal["least-squares", "none"] | None = Field(
        default=None,
        description="least-squares: refit the linear layers that stay to the dense network; null: with calibration text",
    )

    @property
    def treats(self) -> frozenset[str]:
        """Attention and MLP branches are different things, a block is both."""
        kinds = ("attention", "mlp") if self.unit == "block" else (self.unit,)
        return frozenset(f"{self.name} {kind}" for kind in kinds)

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Choose, remove the branches from the graph, refit what is left."""
        if self.criterion in ("ablation", "block-influence") and context.calibration is None:
            raise UsageError(
                "CS1121",
                f"Choosing {_NOUNS[self.unit]} by {self.criterion} needs calibration text.",
                where=f"{self.name}.criterion",
                hint="Give calibration text, or set criterion: deepest.",
            )
        if self.compensation == "least-squares" and context.calibration is None:
            raise UsageError(
                "CS1121",
                "Refitting needs calibration text.",
                where=f"{self.name}.compensation",
                hint="Give calibration text, or set compensation: none.",
            )
        units = find_units(program, self.unit)
        count = self._count(units)
        chosen, details = self._chosen(program, units, count, context)
        dropped = drop_branches(program, [branch for unit in chosen for branch in unit.branches])
        before, after = program.parameter_count(), dropped.program.parameter_count()
        repaired, repair = self._repaired(program, dropped, context)
        return PassResult(
            program=repaired,
            modified=True,
            requested={"fraction": self.fraction, "unit": self.unit, "criterion": self.criterion},
            achieved={
                "fraction": count / len(units),
                "units": {"before": len(units), "after": len(units) - count},
                "removed": sorted(unit.layer for unit in chosen),
                "parameters": {"before": before, "after": after},
                **details,
                **repair,
            },
            notes=self._notes(len(units), count, context),
        )

    def _count(self, units: Sequence[Unit]) -> int:
        noun, total = _NOUNS[self.unit], len(units)
        if not total:
            raise ModelError(
                "CS2114",
                f"The model has no {noun} that can be removed.",
                where=self.name,
                why="No sum in its graph adds to a value what was computed from that value alone.",
                hint=f"Remove {self.name} from the recipe.",
            )
        wanted = self.fraction * total
        count = int(wanted + 0.5)
        arithmetic = f"{self.fraction:g} of {total} {noun} is {wanted:g}"
        if count == 0:
            raise ModelError(
                "CS2112",
                f"The fraction removes no {noun}.",
                where=f"{self.name}.fraction",
                why=f"{arithmetic}, and the nearest whole number is 0.",
                hint=f"Ask for {1 / total:g}, which removes 1 of {total}.",
            )
        if count >= total:
            raise ModelError(
                "CS2113",
                f"The fraction removes all {noun}.",
                where=f"{self.name}.fraction",
                why=f"{arithmetic}, the nearest whole number is {total}, and one must stay.",
                hint=f"Ask for {(total - 1) / total:g} or less."
                if total > 1
                else f"Remove {self.name} from the recipe.",
            )
        return count

    def _chosen(
        self, program: Program, units: Sequence[Unit], count: int, context: PassContext
    ) -> tuple[list[Unit], dict[str, Any]]:
        """Units that go, and what the report says about the choice."""
        if context.plan_only or context.calibration is None or self.criterion == "deepest":
            last = len(units) - 1
            return list(units[last - count : last]), {}
        if self.criterion == "block-influence":
            influence = block_influence(program, units, context.calibration, context.progress)
            order = sorted(range(len(units)), key=influence.__getitem__)
            return [units[i] for i in order[:count]], {"block_influence": [round(value, 6) for value in influence]}
        chosen, losses = greedy_ablation(program, units, count, context.calibration, context.progress)
        return chosen, {"order": [unit.layer for unit in chosen], "loss": [round(loss, 6) for loss in losses]}

    def _repaired(self, program: Program, dropped: Dropped, context: PassContext) -> tuple[Program, dict[str, Any]]:
        """The layer before a gap is refitted to the dense stream behind it, every other one to its own place."""
        wanted = self.compensation or ("least-squares" if context.calibration is not None else "none")
        if wanted == "none" or context.calibration is None or context.plan_only:
            return dropped.program, {"compensation": wanted}
        repaired = refit(program, dropped.program, context.calibration, context.progress, stands_for=dropped.stands_for)
        return repaired.program, {"compensation": wanted, **repaired.achieved}

    def _notes(self, total: int, count: int, context: PassContext) -> list[str]:
        notes = []
        wanted = self.fraction * total
        if abs(wanted - count) > 1e-9:
            notes.append(f"{self.fraction:g} of {total} {_NOUNS[self.unit]} is {wanted:g}; {count} are removed.")
        if self.criterion is None and context.calibration is None:
            notes.append("The deepest go, because there is no calibration text; with text the choice is far better.")
        elif context.plan_only and self.criterion != "deepest":
            notes.append("Which ones go is decided on calibration text; the plan counts the deepest.")
        return notes
