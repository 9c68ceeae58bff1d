"""Sensitivity: what the loss on calibration text says about removing a position, to first and second order.

With a gate ``a[p] = 1`` on everything position ``p`` couples, ``dL/da[p] = sum of w dL/dw`` over its slices. Removing the
position sets the gate to zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch

from compile_sparse.compiler.axes.algebra import Axis
from compile_sparse.compiler.axes.analysis import Analysis
from compile_sparse.compiler.axes.groups import Group
from compile_sparse.compiler.execution.calibration import CalibrationStream
from compile_sparse.compiler.execution.training import ProgramModule, language_loss
from compile_sparse.compiler.progress import Progress
from compile_sparse.passes.criteria.positions import add_positions, coupled_parameters, zeros

__all__ = ["fisher_scores", "taylor_scores"]


def taylor_scores(
    analysis: Analysis, groups: Sequence[Group], calibration: CalibrationStream, progress: Progress
) -> dict[Axis, torch.Tensor]:
    """``score[p] = mean over windows of |sum over coupled tensors and elements of w dL/dw|``, float64, by leaf.

    First-order estimate of how much removing position ``p`` changes the loss ``L`` (mean cross-entropy of the window, nats per
    token). Sums within a window keep their sign, as in the vector form of LLM-Pruner (arXiv:2305.11627) and in torch-pruning;
    windows are added without, so that gains on one text do not hide losses on another. (Signed sums over all text rank worse
    than magnitude on a trained model: its mean gradient is noise.)

    One backward per window, whatever the size of a batch. Memory: every weight, a copy of the coupled ones, the activations of
    one window, and one tensor's gradient at a time.

    Raises:
        ModelError: CS2401 when an operator of the graph has no derivative.
    """
    scores = zeros(groups)
    for gates in _gate_gradients(analysis, groups, calibration, progress, "score by taylor"):
        for leaf, gradient in gates.items():
            scores[leaf] += gradient.abs() / len(calibration.windows)
    return scores


def fisher_scores(
    analysis: Analysis, groups: Sequence[Group], calibration: CalibrationStream, progress: Progress
) -> dict[Axis, torch.Tensor]:
    """``score[p] = mean over windows of (sum over coupled tensors and elements of w dL/dw)^2``, float64, by leaf.

    The diagonal of the empirical Fisher information of the gates, one sample per window: near a minimum, twice the increase of
    the loss to second order (arXiv:1801.05787; gates of heads and channels in arXiv:2204.09656). Cost as for ``taylor_scores``.

    Raises:
        ModelError: CS2401 when an operator of the graph has no derivative.
    """
    scores = zeros(groups)
    for gates in _gate_gradients(analysis, groups, calibration, progress, "score by fisher"):
        for leaf, gradient in gates.items():
            scores[leaf] += gradient.square() / len(calibration.windows)
    return scores


def _gate_gradients(
    analysis: Analysis, groups: Sequence[Group], calibration: CalibrationStream, progress: Progress, what: str
) -> Iterator[dict[Axis, torch.Tensor]]:
    """``dL/da`` of every position for each window; the tensors are reused."""
    program, single = analysis.program, replace(calibration, tokens_per_batch=1)  # one window always fits
    gates = zeros(groups)
    coupled = coupled_parameters(analysis, gates)
    module = ProgramModule(program, trainable=coupled)

    def consumer(dims: Sequence[tuple[int, Axis]]) -> Callable[[torch.Tensor], None]:
        def consume(parameter: torch.Tensor) -> None:
            assert parameter.grad is not None  # the hook runs after it was accumulated
            product = parameter.detach().float() * parameter.grad.float()
            for dim, axis in dims:
                others = [other for other in range(product.ndim) if other != dim]
                add_positions(gates, axis, product.sum(others, dtype=torch.float64) if others else product)
            parameter.grad = None  # freed before the next tensor's gradient exists

        return consume

    for tensor, dims in coupled.items():
        module.tensor(tensor).register_post_accumulate_grad_hook(consumer(dims))
    with progress.task(what, total=len(single)) as task:
        for inputs in single.feeds(program):
            language_loss(program, module(inputs), inputs).backward()
            yield gates
            for gate in gates.values():
                gate.zero_()
            task.advance()
