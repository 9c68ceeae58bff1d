"""Gram matrices: second moments of the values that linear layers contract."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import fx

from compile_sparse.compiler.execution.calibration import CalibrationStream
from compile_sparse.compiler.execution.layerwise import LayerwiseExecutor, Watcher
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.progress import Progress, Task
from compile_sparse.passes.statistics.row_weights import row_weights

__all__ = ["Gram", "each_gram"]


@dataclass(frozen=True)
class Gram:
    """Sums over ``count`` rows (tokens) of a value ``x: [..., K]``, float64; weighted where ``each_gram`` was asked to.

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
    program: Program,
    nodes: Iterable[str],
    calibration: CalibrationStream,
    progress: Progress,
    *,
    relative_to: Mapping[str, str] | None = None,
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
        relative_to: node -> later node with as many rows, a residual sum: rows are summed with its ``row_weights``.

    Raises:
        KeyError: a name is not in the graph.
    """
    wanted, others = set(nodes), relative_to or {}
    found = [node for node in program.graph.nodes if node.name in wanted]
    if missing := wanted - {node.name for node in found}:
        raise KeyError(f"not in the graph: {', '.join(sorted(missing))}")
    by_name = {node.name: node for node in program.graph.nodes}
    walk = LayerwiseExecutor(program, calibration.feeds(program))
    with progress.task("observe inputs", total=len(found) * walk.batches) as task:
        observers = {node.name: _Observer(node, others.get(node.name), task) for node in found}
        watch = _watchers(observers)
        for node in found:
            observer = observers.pop(node.name)
            walk.advance(by_name[observer.last], inclusive=True, watch=watch)
            yield node.name, observer.finish()


class _Observer:
    """Sums of one node's value; of its rows as they count for a later value, where there is one."""

    def __init__(self, node: fx.Node, relative_to: str | None, task: Task) -> None:
        self.name, self.last = node.name, relative_to or node.name
        self._width, self._task = int(node.meta["val"].shape[-1]), task
        self._waiting: dict[int, torch.Tensor] = {}
        self._sums: _Sums | None = None

    def see(self, batch: int, value: torch.Tensor) -> None:
        if self.last == self.name:
            self._add(value, None)
        else:
            self._waiting[batch] = value

    def see_last(self, batch: int, value: torch.Tensor) -> None:
        self._add(self._waiting.pop(batch), row_weights(value))

    def finish(self) -> Gram:
        sums, self._sums = self._sums or _Sums(self._width), None
        return Gram(sums.second, sums.total, sums.count)

    def _add(self, value: torch.Tensor, weights: torch.Tensor | None) -> None:
        self._sums = self._sums or _Sums(self._width)
        self._sums.add(value, weights)
        self._task.advance()


def _watchers(observers: Mapping[str, _Observer]) -> dict[str, Watcher]:
    """What is to be called with the value of each node: branches side by side may reach one Gram before another is done."""
    seen: dict[str, list[Watcher]] = {}
    for observer in observers.values():
        seen.setdefault(observer.name, []).append(observer.see)
        if observer.last != observer.name:
            seen.setdefault(observer.last, []).append(observer.see_last)

    def together(watchers: list[Watcher]) -> Watcher:
        def watch(batch: int, value: torch.Tensor) -> None:
            for each in watchers:
                each(batch, value)

        return watch

    return {name: together(watchers) for name, watchers in seen.items()}


class _Sums:
    """The running sums of one value."""

    def __init__(self, width: int) -> None:
        self.second = torch.zeros(width, width, dtype=torch.float64)
        self.total = torch.zeros(width, dtype=torch.float64)
        self.count = 0

    def add(self, value: torch.Tensor, weights: torch.Tensor | None) -> None:
        rows = value.reshape(-1, value.shape[-1]).float()
        root = None if weights is None else weights.sqrt()
        scaled = rows if root is None else rows * root
        self.second += scaled.T @ scaled
        self.total += (scaled if root is None else scaled * root).sum(dim=0, dtype=torch.float64)
        self.count += rows.shape[0]
