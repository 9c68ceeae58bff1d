"""The decoder's interface: a key-value cache of static length that is written in place.

    input_ids        int64 [batch, sequence]
    write_indices    int64 [batch]: tokens already in the cache of each row; new ones are written behind them
    past_key_values.{i}.key, .value   [batch, kv_heads, max_length, head_size], bound to the same memory as present.{i}.*

Position ids and the causal mask follow from ``write_indices`` and are computed in the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import fx

from compile_sparse.backends.onnx.element_types import kind_of
from compile_sparse.backends.onnx.emission import Emission
from compile_sparse.backends.onnx.graph_writer import GraphWriter, NodeRecord, ValueRecord
from compile_sparse.backends.onnx.interface import Interface
from compile_sparse.compiler.errors import Refusal
from compile_sparse.compiler.ir.edit import schema_arguments
from compile_sparse.compiler.ir.nodes import is_op
from compile_sparse.compiler.ir.program import Program

__all__ = ["StaticCache", "aliases_of", "static_cache_interface"]

BATCH, SEQUENCE = "batch", "sequence"
WRITE_INDICES = "write_indices"


class StaticCache:
    """What every attention of a decoder shares.

    Attributes:
        length: positions of the buffers.
        write_indices: name of the input.
        positions: int64 ``[batch, sequence]``, position of every new token.
        aliases: cache output -> the input whose memory it must share.
    """

    def __init__(self, graph: GraphWriter, length: int) -> None:
        self.length, self.write_indices = length, WRITE_INDICES
        self.aliases: dict[str, str] = {}
        size = graph.call("Squeeze", [graph.call("Shape", ["input_ids"], start=1, end=2)])
        steps = graph.call("Range", [graph.constant(0), size, graph.constant(1)])
        starts = graph.call("Unsqueeze", [WRITE_INDICES, graph.constant([1])])
        self.positions = graph.call("Add", [starts, steps], hint="positions")
        self._masks: dict[int, str] = {}

    def mask(self, graph: GraphWriter, window: int) -> str:
        """Bool ``[batch, 1, sequence, length]``: which cached positions each new token sees; one per window size."""
        if window not in self._masks:
            rows = graph.call("Unsqueeze", [self.positions, graph.constant([1, 3])])
            columns = graph.weight(
                "compile_sparse.columns",
                (1, 1, 1, self.length),
                "int64",
                lambda: np.arange(self.length, dtype=np.int64).reshape(1, 1, 1, -1),
            )
            seen = graph.call("LessOrEqual", [columns, rows], hint="causal_mask")
            if window:
                first = graph.call("Sub", [rows, graph.constant(window)])
                seen = graph.call("And", [seen, graph.call("Greater", [columns, first])], hint="window_mask")
            self._masks[window] = seen
        return self._masks[window]


def static_cache_interface(length: int) -> Interface:
    """A decoder's interface with buffers of ``length`` positions."""

    def declare(emission: Emission) -> Callable[[], None]:
        _add_inputs(emission, length)
        return partial(_add_outputs, emission)

    return declare


def aliases_of(emission: Emission) -> Mapping[str, str]:
    """Cache output -> the input whose memory it must share; empty for models without a cache."""
    return emission.shared[StaticCache].aliases if StaticCache in emission.shared else {}


def _require_static(program: Program) -> None:
    """Only a raised attention may look at the cache or its length: anything else would see the whole buffer.

    Raises:
        Refusal: CS4411, naming what else reads it.
    """
    looked_at = {e.placeholder for e in program.inputs if e.role in ("past_key", "past_value", "attention_mask")}
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in looked_at:
            for user in node.users:
                if not is_op(user, "compile_sparse::cached_attention") and not _is_batch_size(user):
                    raise Refusal(
                        "CS4411",
                        "This decoder's cache cannot be a static buffer.",
                        where=user.name,
                        why=f"{user.name} reads {node.name} outside of an attention that was recognised.",
                        hint="Compile it for ort-cpu, which grows the cache, or for a vllm target.",
                    )


def _is_batch_size(node: fx.Node) -> bool:
    return is_op(node, "aten::sym_size") and schema_arguments(node)["dim"] == 0


def _add_inputs(emission: Emission, length: int) -> None:
    """Declare the inputs and bind the program's: cache buffers, token ids, and what is computed from the write indices."""
    program, graph = emission.program, emission.graph
    _require_static(program)
    for name, shape in (("input_ids", (BATCH, SEQUENCE)), (WRITE_INDICES, (BATCH,))):
        graph.inputs.append(ValueRecord(graph.reserve(name), "int64", shape))
    cache = emission.shared[StaticCache] = StaticCache(graph, length)
    batch = graph.call("Shape", ["input_ids"], start=0, end=1, hint="batch_size")
    for entry in program.inputs:
        node = program.node(entry.placeholder)
        for user in node.users:
            if _is_batch_size(user):
                emission.bind(user, batch)
        if entry.role in ("past_key", "past_value"):
            value: torch.Tensor = node.meta["val"]
            shape_of: tuple[Any, ...] = (BATCH, int(value.shape[1]), length, int(value.shape[3]))
            graph.inputs.append(ValueRecord(graph.reserve(entry.name), kind_of(value.dtype), shape_of))
            emission.bind(node, entry.name)
        elif entry.role == "input_ids":
            emission.bind(node, "input_ids")
        elif entry.role == "position_ids":
            emission.bind(node, cache.positions)


def _add_outputs(emission: Emission) -> None:
    """Declare logits and the cache."""
    program, graph = emission.program, emission.graph
    produced = {name for node in graph.nodes for name in node.outputs}
    renamed: dict[str, str] = {}
    aliases = emission.shared[StaticCache].aliases
    shapes = {value.name: value.shape for value in graph.inputs}
    for entry, node in zip(program.outputs, program.output_nodes, strict=True):
        source, value = emission.value(node), node.meta["val"]
        graph.reserve(entry.name)
        if source in produced and source not in renamed:
            renamed[source] = entry.name
        else:
            graph.nodes.append(NodeRecord("Identity", [renamed.get(source, source)], [entry.name], "", {}))
        if entry.role in ("present_key", "present_value"):
            past = entry.name.replace("present", "past_key_values")
            aliases[entry.name], shape = past, shapes[past]
        else:
            shape = (BATCH, SEQUENCE, *(int(size) for size in value.shape[2:]))
        graph.outputs.append(ValueRecord(entry.name, kind_of(value.dtype), shape))
    graph.rename(renamed)
    graph.drop_dead_nodes()
