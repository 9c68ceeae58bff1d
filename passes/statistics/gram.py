"""Gram matrices: second moments of the values that linear layers contract."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from compile_sparse.compiler.execution.calibration import CalibrationStream
from compile_sparse.compiler.execution.executor import Executor
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.progress import Progress

__all__ = ["Gram", "each_gram", "input_grams"]

BUDGET_BYTES = 2 << 30
"""Accumulators held during one pass over the calibration text; wider models take several passes."""


@dataclass(frozen=True)
class Gram:
    """Sums over ``count`` rows (tokens) of a value ``x: [..., K]``, float64.

    Attributes:
        second: ``sum x x^T``, ``[K, K]``, symmetric and positive semidefinite.
        total: ``sum x``, ``[K]``.
        count: number of rows.
    """

    second: torch.Tensor
    total: torch.Tensor
    count: int

    @property
    def moment(self) -> torch.Tensor:
        """``E[x x^T]``, ``[K, K]``."""
        return self.second / max(self.count, 1)

    @property
    def mean(self) -> torch.Tensor:
        """``E[x]``, ``[K]``."""
        return self.total / max(self.count, 1)

    @property
    def covariance(self) -> torch.Tensor:
        """``E[(x - E x)(x - E x)^T]``, ``[K, K]``."""
        return self.moment - torch.outer(self.mean, self.mean)


def input_grams(
    program: Program,
    nodes: Iterable[str],
    calibration: CalibrationStream,
    progress: Progress,
    *,
    budget_bytes: int = BUDGET_BYTES,
) -> dict[str, Gram]:
    """Every Gram at once, by node name: ``8 K^2`` bytes each. See ``each_gram`` for a stream of them."""
    return dict(each_gram(program, nodes, calibration, progress, budget_bytes=budget_bytes))


def each_gram(
    program: Program,
    nodes: Iterable[str],
    calibration: CalibrationStream,
    progress: Progress,
    *,
    budget_bytes: int = BUDGET_BYTES,
) -> Iterator[tuple[str, Gram]]:
    """Grams of the values of ``nodes`` over the last dimension, in graph order, each distinct node once.

    Batches carry no padding, so every row counts. Products of one batch are taken in float32 and summed in float64. At most
    ``budget_bytes`` of accumulators (or one, if that alone is larger) exist at a time, each group of them taking one pass over
    the text; a Gram the caller has dropped is freed before the next pass.

    Args:
        program: what is run.
        nodes: graph nodes whose values are ``[..., K]`` with static ``K``: the inputs of linears. Layers that read the same
            node (query, key and value) share one Gram.
        calibration: the text.
        progress: told of every batch.
        budget_bytes: bound on accumulators in one pass.
    """
    wanted = set(nodes)
    widths = {n.name: int(n.meta["val"].shape[-1]) for n in program.graph.nodes if n.name in wanted}
    if missing := wanted - set(widths):
        raise KeyError(f"not in the graph: {', '.join(sorted(missing))}")
    groups = _groups(widths, budget_bytes)
    executor = Executor(program)
    for place, group in enumerate(groups, 1):
        sums = {name: _Sums(widths[name]) for name in group}
        observe: dict[str, Callable[[torch.Tensor], None]] = {name: each.add for name, each in sums.items()}
        label = "observe inputs" + (f", {place} of {len(groups)}" if len(groups) > 1 else "")
        with progress.task(label, total=len(calibration)) as task:
            for inputs in calibration.feeds(program):
                executor.run(inputs, observe=observe)
                task.advance()
        observe.clear()
        for name in group:
            yield name, sums.pop(name).gram()


class _Sums:
    """The running sums of one value."""

    def __init__(self, width: int) -> None:
        self.second = torch.zeros(width, width, dtype=torch.float64)
        self.total = torch.zeros(width, dtype=torch.float64)
        self.count = 0

    def add(self, value: torch.Tensor) -> None:
        rows = value.reshape(-1, value.shape[-1]).float()
        self.second += rows.T @ rows
        self.total += rows.sum(dim=0, dtype=torch.float64)
        self.count += rows.shape[0]

    def gram(self) -> Gram:
        return Gram(self.second, self.total, self.count)


def _groups(widths: dict[str, int], budget_bytes: int) -> Sequence[Sequence[str]]:
    """Consecutive names whose accumulators fit the budget together; one that never fits is alone."""
    groups: list[list[str]] = []
    room = 0
    for name, width in widths.items():
        size = 8 * width * width
        if not groups or size > room:
            groups.append([])
            room = budget_bytes
        groups[-1].append(name)
        room -= size
    return groups
