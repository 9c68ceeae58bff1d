"""Remove experts of mixture-of-experts layers."""

from __future__ import annotations

from typing import ClassVar

from compile_sparse.compiler.axes.groups import Kind
from compile_sparse.passes.pruning.axis_pruning import AxisPruning, CriterionName

__all__ = ["PruneExperts"]


class PruneExperts(AxisPruning):
    """Remove a fraction of the experts of every layer, with their rows of the router.

    The router's softmax and top-k then choose among those left; at least as many stay as one token uses.

    Left alone: layers whose experts are addressed in a way the analysis does not follow.
    """

    name: ClassVar[str] = "prune-experts"
    kind: ClassVar[Kind] = "experts"
    noun: ClassVar[str] = "experts"
    nothing: ClassVar[str] = "The model has no mixture-of-experts layers."
    data_criterion: ClassVar[CriterionName] = "fisher"
    refits_all: ClassVar[bool] = True
