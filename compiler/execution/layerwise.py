"""Run a program over many batches in stages, so that weights may change between the nodes that read them.

Calibrated repair walks a network front to back: what a layer should compute depends on the layers before it as they *now*
are. Running every batch from the start for each layer would cost a square of the depth; here each batch's live values are
kept where the walk stands, and every node runs once per batch. Weights are loaded when the walk reaches them and released
when it has passed, so memory is one stage's weights plus the live values of all batches (for a transformer between blocks:
tokens times hidden size).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import fx

from compile_sparse.compiler.ir.liveness import last_uses
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.ir.weights import TensorSource

__all__ = ["LayerwiseExecutor"]

STAGE_BYTES = 1 << 30
"""Weights held at once; a longer way is walked in parts."""

Watcher = Callable[[int, torch.Tensor], None]


class LayerwiseExecutor:
    """One program on several batches, advanced node by node.

    Args:
        program: what to run.
        feeds: complete model inputs by public name, one mapping per batch.
    """

    def __init__(self, program: Program, feeds: Iterable[Mapping[str, torch.Tensor]]) -> None:
        self._program = program
        self._nodes = list(program.graph.nodes)
        self._place = {node: index for index, node in enumerate(self._nodes)}
        self._dead_after = last_uses(program.graph, outputs=False)  # nobody asks for the outputs
        self._next = 0
        self._replaced: dict[str, TensorSource] = {}
        names = {entry.placeholder: entry.name for entry in program.inputs}
        inputs = [node for node in self._nodes if node.name in names]
        self._live: list[dict[fx.Node, Any]] = [{n: feed[names[n.name]] for n in inputs} for feed in feeds]

    @property
    def batches(self) -> int:
        """Number of batches."""
        return len(self._live)

    def replace(self, tensor: str, source: TensorSource) -> None:
        """Use other values for a weight from here on."""
        self._replaced[tensor] = source

    def value(self, batch: int, node: fx.Node) -> torch.Tensor:
        """A value that is live where the walk stands; KeyError otherwise."""
        return self._live[batch][node]

    def is_live(self, node: fx.Node) -> bool:
        """Whether ``node`` has been computed and a later node needs it."""
        return bool(self._live) and node in self._live[0]

    def passed(self, node: fx.Node) -> bool:
        """Whether the walk is beyond ``node``."""
        return self._place[node] < self._next

    def advance(self, stop: fx.Node, *, inclusive: bool = False, watch: Mapping[str, Watcher] | None = None) -> None:
        """Run every batch up to ``stop``.

        Args:
            stop: the walk stands before this node afterwards, or behind it with ``inclusive``.
            watch: node name -> callback given the batch number and the node's value as it is computed.
        """
        end = self._place[stop] + (1 if inclusive else 0)
        for stage in self._stages(end):
            self._run(stage, watch or {})
        self._next = max(self._next, end)

    def _stages(self, end: int) -> Iterator[list[fx.Node]]:
        """What is left up to ``end``, in parts whose weights fit in ``STAGE_BYTES`` (or are one node's)."""
        stage: list[fx.Node] = []
        size, weights = 0, self._program.weights
        for node in self._nodes[self._next : end]:
            if node.op != "call_function":
                continue
            bindings = [
                self._program.bindings[n.name] for n in node.all_input_nodes if n.name in self._program.bindings
            ]
            own = sum(weights.nbytes(binding.tensor) for binding in bindings)
            if stage and size + own > STAGE_BYTES:
                yield stage
                stage, size = [], 0
            stage.append(node)
            size += own
        yield stage

    def _run(self, stage: list[fx.Node], watch: Mapping[str, Watcher]) -> None:
        weights: dict[fx.Node, torch.Tensor] = {}
        with torch.no_grad():
            for batch, live in enumerate(self._live):
                for node in stage:
                    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: self._read(n, live, weights))  # noqa: B023
                    live[node] = node.target(*args, **kwargs)  # type: ignore[operator]
                    if node.name in watch:
                        watch[node.name](batch, live[node])
                    for dead in self._dead_after.get(node, ()):
                        live.pop(dead, None)

    def _read(self, node: fx.Node, live: Mapping[fx.Node, Any], weights: dict[fx.Node, torch.Tensor]) -> Any:
        if node in live:
            return live[node]
        if node not in weights:
            tensor = self._program.bindings[node.name].tensor
            weights[node] = self._replaced.get(tensor, self._program.weights[tensor]).load()
        return weights[node]
