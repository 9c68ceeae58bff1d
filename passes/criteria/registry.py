"""Criteria by the name recipes use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import torch

from compile_sparse.compiler.axes.algebra import Axis
from compile_sparse.compiler.axes.analysis import Analysis
from compile_sparse.compiler.axes.groups import Group
from compile_sparse.compiler.execution.calibration import CalibrationStream
from compile_sparse.compiler.progress import Progress
from compile_sparse.passes.criteria.ablation import ablation_scores
from compile_sparse.passes.criteria.activation import activation_scores
from compile_sparse.passes.criteria.magnitude import magnitude_scores
from compile_sparse.passes.criteria.sensitivity import fisher_scores, taylor_scores
from compile_sparse.passes.criteria.wanda import fasp_scores, wanda_scores

__all__ = ["CRITERIA", "Criterion", "Score"]


class Score(Protocol):
    """One number per position of every group, by leaf: float64, higher means keep.

    Args:
        analysis: of the program to prune.
        groups: of one analysis; only these are scored.
        calibration: text the program is observed on.
        progress: told of every batch or tensor.
    """

    def __call__(
        self, analysis: Analysis, groups: Sequence[Group], calibration: CalibrationStream, progress: Progress
    ) -> dict[Axis, torch.Tensor]: ...


class Criterion(NamedTuple):
    """A way to rank positions.

    Attributes:
        score: computes it.
        needs_calibration: whether it looks at text; otherwise the stream may be empty.
    """

    score: Score
    needs_calibration: bool


def _magnitude(
    analysis: Analysis, groups: Sequence[Group], calibration: CalibrationStream, progress: Progress
) -> dict[Axis, torch.Tensor]:
    return magnitude_scores(analysis, groups, progress)


CRITERIA: Mapping[str, Criterion] = {
    "magnitude": Criterion(_magnitude, needs_calibration=False),
    "activation": Criterion(activation_scores, needs_calibration=True),
    "wanda": Criterion(wanda_scores, needs_calibration=True),
    "fasp": Criterion(fasp_scores, needs_calibration=True),
    "taylor": Criterion(taylor_scores, needs_calibration=True),
    "fisher": Criterion(fisher_scores, needs_calibration=True),
    "ablation": Criterion(ablation_scores, needs_calibration=True),
}
