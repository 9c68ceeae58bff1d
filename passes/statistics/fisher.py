"""Fisher information of layer outputs: in which directions an output may err before the loss notices."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from compile_sparse.compiler.errors import UsageError
from compile_sparse.compiler.execution.calibration import CalibrationStream
from compile_sparse.compiler.execution.training import ProgramModule, language_loss
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.progress import Progress

__all__ = ["output_fisher", "output_fisher_diagonal"]


def output_fisher(
    program: Program,
    nodes: Iterable[str],
    calibration: CalibrationStream,
    progress: Progress,
    *,
    max_windows: int | None = None,
) -> dict[str, torch.Tensor]:
    """``G = mean over tokens of g g^T``, ``[N, N]`` float64, symmetric and positive semidefinite, by node name.

    ``g = dL/dy`` at the token's output ``y: [N]`` of the node, ``L`` the *sum* of the next-token losses of its window (nats), so
    that a token's effect on later tokens counts and its scale does not depend on batch or window size. ``0.5 e^T G e`` estimates
    the loss that an error ``e`` of one token's output adds to its window. This is the output factor of K-FAC
    (arXiv:1503.05671) with the empirical Fisher: the labels are the text's own.

    Memory: every weight, the activations of one batch, and ``8 N^2`` bytes per node; for wide outputs see
    ``output_fisher_diagonal``. No gradient of a weight is computed.

    Args:
        program: a decoder in floating point.
        nodes: graph nodes whose values are ``[..., N]`` with static ``N``, one row per token: linear layers.
        calibration: the text.
        progress: told of every batch.
        max_windows: use this many windows, spread evenly over the text; all when omitted.

    Raises:
        UsageError: CS1127 when the program has no next-token loss.
        ModelError: CS2401 when an operator of the graph has no derivative.
    """

    def second_moment(rows: torch.Tensor) -> torch.Tensor:
        return rows.T @ rows

    return _mean_over_tokens(
        program, nodes, calibration, progress, max_windows, second_moment, lambda width: (width, width)
    )


def output_fisher_diagonal(
    program: Program,
    nodes: Iterable[str],
    calibration: CalibrationStream,
    progress: Progress,
    *,
    max_windows: int | None = None,
) -> dict[str, torch.Tensor]:
    """The diagonals of ``output_fisher``'s matrices, ``[N]`` float64 by node name, without forming the matrices."""

    def squares(rows: torch.Tensor) -> torch.Tensor:
        return rows.square().sum(0)

    return _mean_over_tokens(program, nodes, calibration, progress, max_windows, squares, lambda width: (width,))


def _mean_over_tokens(
    program: Program,
    nodes: Iterable[str],
    calibration: CalibrationStream,
    progress: Progress,
    max_windows: int | None,
    statistic: Callable[[torch.Tensor], torch.Tensor],
    shape: Callable[[int], tuple[int, ...]],
) -> dict[str, torch.Tensor]:
    """``statistic`` of the rows ``g [tokens, N]`` of every batch, summed and divided by the number of tokens.

    GEMMs of one batch are in float32, their sums in float64. A node that the loss does not depend on gets zeros.
    """
    if all(output.role != "logits" for output in program.outputs):
        raise UsageError(
            "CS1127",
            "The Fisher information of this model's outputs is unknown.",
            why=f"It is a {program.kind} model: without a next-token loss there is nothing to differentiate.",
            hint="Use a criterion that needs no loss.",
        )
    wanted = set(nodes)
    widths = {n.name: int(n.meta["val"].shape[-1]) for n in program.graph.nodes if n.name in wanted}
    if missing := wanted - set(widths):
        raise KeyError(f"not in the graph: {', '.join(sorted(missing))}")
    sums = {name: torch.zeros(shape(width), dtype=torch.float64) for name, width in widths.items()}

    def observer(name: str) -> Callable[[torch.Tensor], None]:
        def take(gradient: torch.Tensor) -> None:
            sums[name] += statistic(gradient.reshape(-1, gradient.shape[-1]).float())

        def observe(value: torch.Tensor) -> None:
            if not value.requires_grad:  # nothing before it is watched: differentiation starts here
                value.requires_grad_()
            value.register_hook(take)

        return observe

    text = calibration if max_windows is None else calibration.spread(max_windows)
    module, observers = ProgramModule(program, trainable=()), {name: observer(name) for name in widths}
    with progress.task("differentiate layer outputs", total=len(text)) as task:
        for inputs in text.feeds(program):
            ids = inputs[next(entry.name for entry in program.inputs if entry.role == "input_ids")]
            loss = language_loss(program, module(inputs, observers), inputs)
            (loss * (ids.numel() - ids.shape[0])).backward()  # of the mean over predicted tokens, the sum
            task.advance()
    return {name: total / text.tokens for name, total in sums.items()}
