"""Remove attention heads: whole key-value groups, or query heads within every group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

from pydantic import Field

from compile_sparse.compiler.axes.algebra import Axis
from compile_sparse.compiler.axes.analysis import Analysis
from compile_sparse.compiler.axes.groups import Group, Kind
from compile_sparse.passes.pruning.axis_pruning import AxisPruning
from compile_sparse.passes.pruning.groups import Prunable
from compile_sparse.passes.pruning.selection import outer_of

__all__ = ["PruneHeads"]

COPIES = "broadcast"
"""Role of the axis along which one key head serves several query heads."""


class PruneHeads(AxisPruning):
    """Remove a fraction of the heads of every attention.

    ``unit: group`` removes key-value heads together with the query heads they serve (in plain multi-head attention: heads):
    rows of ``W_q``, ``W_k``, ``W_v``, columns of ``W_o``, and cache entries. ``unit: query`` keeps every key-value head and
    removes as many query heads from each; which ones may differ from one key-value head to the next. The output projection is
    then refitted to the dense network, without which a removed head is very costly (arXiv:2302.04089).

    Left alone: attention whose heads are coupled to something that may not change.
    """

    name: ClassVar[str] = "prune-heads"
    kind: ClassVar[Kind] = "heads"
    noun: ClassVar[str] = "heads"
    nothing: ClassVar[str] = (
        "The model has no attention heads that can be grouped: unit: query needs several query heads for each key-value head, "
        "unit: group several key-value heads."
    )
    refits_all: ClassVar[bool] = True

    unit: Literal["group", "query"] = Field(
        default="group",
        description="group: key-value heads with their query heads; query: query heads within each group",
    )

    def selects(self, group: Group) -> bool:
        """Groups of the asked-for unit."""
        return (COPIES in group.roles) == (self.unit == "query")

    def _nested(self, analysis: Analysis, prunables: Sequence[Prunable]) -> Mapping[Axis, Group]:
        if self.unit == "group":
            return {}
        heads = [group for group in analysis.groups if group.kind == self.kind and COPIES not in group.roles]
        found = {p.group.leaf: outer_of(analysis, p.group, heads) for p in prunables}
        return {leaf: outer for leaf, outer in found.items() if outer is not None}
