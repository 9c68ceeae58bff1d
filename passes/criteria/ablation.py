"""Ablation: what the model loses on calibration text when one position is silenced."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from compile_sparse.compiler.axes.algebra import Axis, coords
from compile_sparse.compiler.axes.analysis import Analysis
from compile_sparse.compiler.axes.groups import Group
from compile_sparse.compiler.errors import UsageError
from compile_sparse.compiler.execution.calibration import CalibrationStream
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.ir.weights import ResidentTensor
from compile_sparse.compiler.progress import Progress
from compile_sparse.passes.criteria.consumers import contacts_of, contracted_dim
from compile_sparse.passes.criteria.depth_ablation import loss_measure
from compile_sparse.passes.criteria.positions import axis_of

__all__ = ["ablation_scores"]

MOST_POSITIONS = 1024
"""Each position costs one run over the text: affordable for heads, not for channels."""


def ablation_scores(
    analysis: Analysis, groups: Sequence[Group], calibration: CalibrationStream, progress: Progress
) -> dict[Axis, torch.Tensor]:
    """``score[p]``: loss with position ``p`` silenced, less the loss of the dense model; float64, by leaf. Negative where
    the model is better off without.

    A position is silenced by zeroing what every consumer's weight reads from it, one position at a time (each is judged with all
    others present). The loss is that of ``greedy_ablation``, on the same sample of the text.
    Source: head masking, Michel et al., "Are sixteen heads really better than one?" (arXiv:1905.10650).

    Raises:
        UsageError: CS1126 when nothing contracts a group, CS1128 for more than ``MOST_POSITIONS`` positions in all.
    """
    contacts_of(groups, "ablation")
    total = sum(group.size for group in groups)
    if total > MOST_POSITIONS:
        raise UsageError(
            "CS1128",
            "There are too many positions to silence one by one.",
            where="criterion ablation",
            why=f"The groups have {total:,} positions in all, at most {MOST_POSITIONS:,} are tried.",
            hint="Use obs, or another criterion.",
        )
    program = analysis.program
    measure = loss_measure(program, calibration)
    dense = measure(program)
    scores: dict[Axis, torch.Tensor] = {}
    with progress.task("score by ablation", total=total) as task:
        for group in groups:
            losses = []
            for position in range(group.size):
                losses.append(measure(_silenced(analysis, group, position)) - dense)
                task.advance()
            scores[group.leaf] = torch.tensor(losses, dtype=torch.float64)
    return scores


def _silenced(analysis: Analysis, group: Group, position: int) -> Program:
    program = analysis.program
    nodes = {binding.tensor: name for name, binding in program.bindings.items()}
    changed: dict[str, ResidentTensor] = {}
    for contact in group.consumers:
        dim = contracted_dim(analysis, contact)
        axis = axis_of(analysis, nodes[contact.weight], dim)
        hit = torch.zeros(program.weights[contact.weight].shape[dim], dtype=torch.bool)
        for leaf, index in coords(axis):
            if leaf is group.leaf:
                hit |= index == position
        known = changed.get(contact.weight)
        value = (known.value if known else program.weights.load(contact.weight)).index_fill(
            dim, hit.nonzero().flatten(), 0.0
        )
        changed[contact.weight] = ResidentTensor(value)
    return replace(program, weights=program.weights.updated(changed))
