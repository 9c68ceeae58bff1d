"""Run a program over many batches, node by node, so that weights may change between the nodes that read them.

Calibrated reconstruction walks a network front to back: what a layer should compute depends on the layers before it as they
*now* are. Running every batch from the start for each layer would cost a square of the depth; here each batch's live values
are kept where the walk stands, and every node runs once per batch. Weights are loaded when the walk reaches them and released
when it has passed, so memory is one stage's weights plus the live values of all batches (for a transformer between blocks:
tokens times hidden size).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import fx

from compile_sparse.compiler.execution.executor import call, model_input, weight_only
from compile_sparse.compiler.ir.liveness import last_uses
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.ir.weights import TensorSource

__all__ = ["LayerwiseExecutor", "Watcher"]

STAGE_BYTES = 1 << 30
"""Weights held at once, and what is computed from them alone; a longer way is walked in stages."""

Watcher = Callable[[int, torch.Tensor], None]
Constants = dict[fx.Node, Any]
"""Weights, and what depends on weights alone: the same for every batch of a stage."""


class LayerwiseExecutor:
    """One program on several batches, advanced node by node.

    Args:
        program: what to run.
        feeds: complete model inputs by public name, one mapping per batch.

    Raises:
        UsageError: CS1033 when an input is missing.
    """

    def __init__(self, program: Program, feeds: Iterable[Mapping[str, torch.Tensor]]) -> None:
        self._program = program
        self._nodes = [node for node in program.graph.nodes if node.op != "output"]
        self._place = {node: index for index, node in enumerate(self._nodes)}
        self._dead_after = last_uses(program.graph, outputs=False)  # nobody asks for the outputs
        self._weight_only = weight_only(program)
        self._next = 0
        self._replaced: dict[str, TensorSource] = {}
        names = {entry.placeholder: entry.name for entry in program.inputs}
        inputs = {node: names[node.name] for node in self._nodes if node.name in names}
        self._live: list[dict[fx.Node, Any]] = [
            {node: model_input(feed, name) for node, name in inputs.items()} for feed in feeds
        ]

    @property
    def batches(self) -> int:
        """Number of batches."""
        return len(self._live)

    def replace(self, tensor: str, source: TensorSource) -> None:
        """Use other values for a weight from here on."""
        self._replaced[tensor] = source

    def value(self, batch: int, node: fx.Node) -> torch.Tensor:
        """A value that is live where the walk stands, or depends on weights alone; KeyError otherwise."""
        with torch.no_grad():
            return self._read(batch, {}, node)

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
            watch: node name -> callback given the batch number and the node's value as it is computed; batches come in order.
        """
        end = self._place[stop] + (1 if inclusive else 0)
        for stage in self._stages(end):
            self._run(stage, watch or {})
        self._next = max(self._next, end)

    def _stages(self, end: int) -> Iterator[list[fx.Node]]:
        """What is left up to ``end``, in parts whose constants fit in ``STAGE_BYTES`` (or are one node's)."""
        stage: list[fx.Node] = []
        held: set[fx.Node] = set()
        size = 0
        for node in self._nodes[self._next : end]:
            needed = set() if node in self._weight_only else self._constants_of(node)
            own = sum(map(self._bytes, needed - held))
            if stage and size + own > STAGE_BYTES:
                yield stage
                stage, held, size = [], set(), 0
                own = sum(map(self._bytes, needed))
            stage.append(node)
            held |= needed
            size += own
        yield stage

    def _constants_of(self, node: fx.Node) -> set[fx.Node]:
        found: set[fx.Node] = set()
        waiting = list(node.all_input_nodes)
        while waiting:
            source = waiting.pop()
            if source in self._weight_only and source not in found:
                found.add(source)
                waiting += source.all_input_nodes
        return found

    def _bytes(self, constant: fx.Node) -> int:
        if constant.name in self._program.bindings:
            return self._program.weights.nbytes(self._program.bindings[constant.name].tensor)
        value = constant.meta.get("val")
        return value.nbytes if isinstance(value, torch.Tensor) else 0

    def _run(self, stage: list[fx.Node], watch: Mapping[str, Watcher]) -> None:
        constants: Constants = {}
        with torch.no_grad():
            for batch, live in enumerate(self._live):
                read = partial(self._read, batch, constants)
                for node in stage:
                    if node.op == "call_function" and node not in self._weight_only:
                        live[node] = call(node, read)
                    if node.name in watch:
                        watch[node.name](batch, read(node))
                    for dead in self._dead_after.get(node, ()):
                        live.pop(dead, None)

    def _read(self, batch: int, constants: Constants, node: fx.Node) -> Any:
        return self._live[batch][node] if node in self._live[batch] else self._constant(constants, node)

    def _constant(self, constants: Constants, node: fx.Node) -> Any:
        if node not in self._weight_only:
            raise KeyError(f"{node.name} is not live where the walk stands")
        if node not in constants:
            if node.name in self._program.bindings:
                tensor = self._program.bindings[node.name].tensor
                constants[node] = self._replaced.get(tensor, self._program.weights[tensor]).load()
            else:
                constants[node] = call(node, partial(self._constant, constants))
        return constants[node]
