"""Remove MLP channels: the positions between an up projection and the down projection that contracts them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from compile_sparse.compiler.axes.algebra import Axis, leaves, segments
from compile_sparse.compiler.axes.analysis import Analysis, analyse, changeable_roles
from compile_sparse.compiler.axes.groups import Group
from compile_sparse.compiler.axes.rewrite import rewrite
from compile_sparse.compiler.contract import PassContext, PassResult
from compile_sparse.compiler.errors import ModelError, UsageError
from compile_sparse.compiler.program import Program
from compile_sparse.compiler.skip import Skip
from compile_sparse.passes.scores.activation import activation_scores
from compile_sparse.passes.scores.magnitude import magnitude_scores

__all__ = ["PruneChannels", "kept_width"]


class PruneChannels(BaseModel):
    """Remove a fraction of the channels of every MLP.

    For a group with ``n`` channels, ``W_up: [n, d]`` and ``W_down: [d, n]``, the ``k`` channels with the highest scores stay:
    ``W_up[keep]``, ``b_up[keep]``, ``W_down[:, keep]``, and gates likewise. The removed channels' contribution to the sum is
    dropped, nothing compensates for it. ``k`` depends on ``n`` only, so layers stay uniform and a Hugging Face config with
    one intermediate size can still describe the result.

    Left alone: groups whose axis is frozen, and widths that no multiple of the target's alignment below ``n`` can replace.

    Raises (from ``run``):
        ModelError: CS2104 when every group is frozen or there is none, CS2105 when none has an aligned width.
        UsageError: CS1121 when activations are asked for without calibration text.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: ClassVar[str] = "prune-channels"
    stage: ClassVar[str] = "structural"

    fraction: float = Field(gt=0.0, lt=1.0, description="share of the channels of every MLP to remove, between 0 and 1")
    criterion: Literal["magnitude", "activation"] | None = Field(
        default=None,
        description="how channels are ranked; by default 'activation' when there is calibration text, else 'magnitude'",
    )

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Choose what stays, and let the rewriting engine apply it."""
        if self.criterion == "activation" and context.calibration is None and not context.plan_only:
            raise UsageError(
                "CS1121",
                "Ranking channels by activation needs calibration text.",
                where=f"{self.name}.criterion",
                hint="Give calibration text, or set criterion: magnitude.",
            )
        analysis = analyse(program, interface_may_change=changeable_roles(context.target))
        groups, skips = self._eligible(analysis)
        widths: dict[Axis, int] = {}
        alignment = context.target.alignment
        for group in groups:
            width = kept_width(group.size, self.fraction, alignment)
            if width is None:
                skips.append(_unaligned(group, alignment))
            else:
                widths[group.leaf] = width
        chosen = [group for group in groups if group.leaf in widths]
        if not chosen:
            raise _nothing_to_do(skips)
        scores = self._scores(analysis, chosen, context)
        keep = {group.anchor: _best(scores, group, widths[group.leaf]) for group in chosen}
        pruned = rewrite(program, analysis, keep)
        before, after = sum(group.size for group in chosen), sum(widths.values())
        return PassResult(
            program=pruned,
            modified=True,
            requested={"fraction": self.fraction, "criterion": self.criterion},
            achieved={
                "criterion": self._used_criterion(context),
                "fraction": 1.0 - after / before,
                "groups": len(chosen),
                "channels": {"before": before, "after": after},
                "parameters": {"before": program.parameter_count(), "after": pruned.parameter_count()},
            },
            skips=tuple(skips),
            notes=_rounding_notes(chosen, widths, self.fraction, alignment),
        )

    def _eligible(self, analysis: Analysis) -> tuple[list[Group], list[Skip]]:
        """Free groups of channels, and the reasons for the others."""
        skips: list[Skip] = []
        groups: list[Group] = []
        for group in analysis.groups:
            if group.kind != "channels":
                continue
            if group.frozen:
                skips.append(Skip(str(group.anchor), "CS2104", f"The axis may not change: {group.frozen[0]}."))
            elif group.size > 1:
                groups.append(group)
        taken: set[Axis] = set()
        for group in groups:
            if _crosses(analysis, group, taken):
                why = (
                    "It forms a grid with channels already chosen; removing both would remove more than was asked for."
                )
                skips.append(Skip(str(group.anchor), "CS2109", why))
            else:
                taken.add(group.leaf)
        return [group for group in groups if group.leaf in taken], skips

    def _used_criterion(self, context: PassContext) -> str:
        return self.criterion or ("activation" if context.calibration is not None else "magnitude")

    def _scores(
        self, analysis: Analysis, groups: Sequence[Group], context: PassContext
    ) -> Mapping[Axis, torch.Tensor] | None:
        """Score per channel, or None when only sizes are wanted."""
        if context.plan_only:
            return None
        if self._used_criterion(context) == "magnitude" or context.calibration is None:
            return magnitude_scores(analysis, groups, context.progress)
        return activation_scores(analysis, groups, context.calibration, context.progress)


def kept_width(size: int, fraction: float, alignment: int) -> int | None:
    """Multiple of ``alignment`` nearest to ``size * (1 - fraction)``, at least one block and below ``size``.

    Ties keep more. None when there is no such multiple.
    """
    largest = (size - 1) // alignment * alignment
    if largest < alignment:
        return None
    wanted = size * (1.0 - fraction)
    nearest = int(wanted / alignment + 0.5) * alignment
    return min(max(nearest, alignment), largest)


def _crosses(analysis: Analysis, group: Group, taken: set[Axis]) -> bool:
    """Whether some weight dimension is a product of this leaf and one already taken."""
    nodes = {binding.tensor: name for name, binding in analysis.program.bindings.items()}
    for tensor, dim in group.members:
        axis = analysis.labels[nodes[tensor]][dim]
        assert isinstance(axis, Axis)  # placeholders hold one tensor
        for part in segments(axis):
            found = set(leaves(part))
            if group.leaf in found and found & taken:
                return True
    return False


def _best(scores: Mapping[Axis, torch.Tensor] | None, group: Group, width: int) -> torch.Tensor:
    kept = torch.zeros(group.size, dtype=torch.bool)
    if scores is None:
        kept[:width] = True
    else:
        kept[scores[group.leaf].argsort(descending=True, stable=True)[:width]] = True
    return kept


def _unaligned(group: Group, alignment: int) -> Skip:
    return Skip(
        str(group.anchor),
        "CS2105",
        f"No width below {group.size} is a multiple of {alignment}, the target's alignment.",
        "Choose a target with a smaller alignment.",
    )


def _nothing_to_do(skips: Sequence[Skip]) -> ModelError:
    unaligned = any(skip.code == "CS2105" for skip in skips)
    reasons: list[str] = list(dict.fromkeys(f"{skip.where}: {skip.why}" for skip in skips))
    shown = reasons[:5] + ([f"... and {len(reasons) - 5} more."] if len(reasons) > 5 else [])
    return ModelError(
        "CS2105" if unaligned else "CS2104",
        "No channels can be removed from this model.",
        where="prune-channels",
        why=" ".join(shown)
        or "The model has no MLP channels: no axis lies only between weights that make and contract it.",
        hint=skips[0].hint if unaligned else "Remove prune-channels from the recipe.",
    )


def _rounding_notes(groups: Sequence[Group], widths: Mapping[Any, int], fraction: float, alignment: int) -> list[str]:
    """One sentence per distinct width that could not be met exactly."""
    notes: dict[str, None] = {}
    for group in groups:
        wanted, kept = group.size * (1.0 - fraction), widths[group.leaf]
        if abs(kept - wanted) >= 1.0:
            notes[
                f"{wanted:g} of {group.size} channels were asked for; {kept} is the nearest multiple of {alignment}."
            ] = None
    return list(notes)
