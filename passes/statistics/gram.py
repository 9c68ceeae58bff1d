"""Gram matrices: second moments of the values that linear layers contract."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import fx

from compile_sparse.compiler.execution.calibration import CalibrationStream
from compile_sparse.compiler.execution.layerwise import LayerwiseExecutor
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.progress import Progress, Task

__all__ = ["Gram", "each_gram"]


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


def each_gram(
    program: Program, nodes: Iterable[str], calibration: CalibrationStream, progress: Progress
) -> Iterator[tuple[str, Gram]]:
    """Grams of the values of ``nodes`` over the last dimension, in graph order, each distinct node once.

    One run of the program in all, as far as the last node: all batches are brought to one node after the other. Batches carry no
    padding, so every row counts. GEMMs of one batch are in float32, their sums in float64.

    Memory: ``8 K^2`` bytes of one Gram, beside those the caller keeps, and that of ``LayerwiseExecutor``: the weights between
    two nodes and the live values of all batches.

    Args:
        program: what is run.
        nodes: graph nodes whose values are ``[..., K]`` with static ``K``: the inputs of linears. Layers that read the same
            node (query, key and value) share one Gram.
        calibration: the text.
        progress: one step per node and batch; the caller's work between two Grams counts in its time.

    Raises:
        KeyError: a name is not in the graph.
    """
    wanted = set(nodes)
    found = [node for node in program.graph.nodes if node.name in wanted]
    if missing := wanted - {node.name for node in found}:
        raise KeyError(f"not in the graph: {', '.join(sorted(missing))}")
    walk = LayerwiseExecutor(program, calibration.feeds(program))
    with progress.task("observe inputs", total=len(found) * walk.batches) as task:
        for node in found:
            yield node.name, _gram(walk, node, task)


def _gram(walk: LayerwiseExecutor, node: fx.Node, task: Task) -> Gram:
    sums = _Sums(int(node.meta["val"].shape[-1]))

    def take(batch: int, value: torch.Tensor) -> None:
        sums.add(value)
        task.advance()

    walk.advance(node, inclusive=True, watch={node.name: take})
    return Gram(sums.second, sums.total, sums.count)


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
