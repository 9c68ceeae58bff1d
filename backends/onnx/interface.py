"""Inputs and outputs of the graph: public names, element types and symbolic dimensions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from compile_sparse.backends.onnx.element_types import kind_of
from compile_sparse.backends.onnx.emission import Emission
from compile_sparse.backends.onnx.graph_writer import NodeRecord, ValueRecord
from compile_sparse.compiler.ir.program import Input, Program

__all__ = ["Interface", "dynamic_interface"]

Interface = Callable[[Emission], Callable[[], None]]
"""Declares a graph's inputs and binds the program's to them. What it returns declares the outputs once everything is emitted."""

_DYNAMIC = {
    "input_ids": ("batch_size", "sequence_length"),
    "position_ids": ("batch_size", "sequence_length"),
    "token_type_ids": ("batch_size", "sequence_length"),
    "pixel_values": ("batch_size", "channels", "height", "width"),
    "input_features": ("batch_size", "bins", "frames"),
    "past_key": ("batch_size", "heads", "past_sequence_length", "head_size"),
    "past_value": ("batch_size", "heads", "past_sequence_length", "head_size"),
}
_PRESENT = ("batch_size", "heads", "total_sequence_length", "head_size")


def dynamic_interface(emission: Emission) -> Callable[[], None]:
    """The program's own inputs and outputs, every size of which that may differ is a named dimension."""
    return partial(_add_outputs, emission, _add_inputs(emission))


def _add_inputs(emission: Emission) -> dict[str, str]:
    """Declare every model input; returns symbolic expression -> dimension name for the outputs."""
    program = emission.program
    symbols: dict[str, str] = {}
    for entry in program.inputs:
        node = program.node(entry.placeholder)
        value: torch.Tensor = node.meta["val"]
        names = _names(entry, program)
        shape: list[int | str] = []
        for index, size in enumerate(value.shape):
            if isinstance(size, int):
                shape.append(size)
                continue
            name = names[index] if index < len(names) else f"{entry.name}_dim_{index}"
            symbols.setdefault(str(size.node.expr), name)
            shape.append(name)
        emission.bind(node, emission.graph.reserve(entry.name))
        emission.graph.inputs.append(ValueRecord(entry.name, kind_of(value.dtype), tuple(shape)))
    return symbols


def _names(entry: Input, program: Program) -> tuple[str, ...]:
    if entry.role == "attention_mask":
        return "batch_size", "total_sequence_length" if program.kind == "decoder" else "sequence_length"
    return _DYNAMIC.get(entry.role, ())


def _add_outputs(emission: Emission, symbols: dict[str, str]) -> None:
    """Declare every output under its public name and drop what nothing needs, an unread position_ids input included.

    Values are renamed rather than copied: a copy of the cache would cost as much as attention itself.
    """
    program, graph = emission.program, emission.graph
    produced = {name for node in graph.nodes for name in node.outputs}
    renamed: dict[str, str] = {}
    for entry, node in zip(program.outputs, program.output_nodes, strict=True):
        graph.reserve(entry.name)
        source = emission.value(node)
        if source in produced and source not in renamed:
            renamed[source] = entry.name
        else:
            graph.nodes.append(_copy(renamed.get(source, source), entry.name))
        value: torch.Tensor = node.meta["val"]
        shape: list[Any] = []
        for index, size in enumerate(value.shape):
            if isinstance(size, int):
                shape.append(size)
            elif entry.role in ("present_key", "present_value"):
                shape.append(_PRESENT[index])
            else:
                shape.append(symbols.get(str(size.node.expr), f"{entry.name}_dim_{index}"))
        graph.outputs.append(ValueRecord(entry.name, kind_of(value.dtype), tuple(shape)))
    graph.rename(renamed)
    graph.drop_dead_nodes()
    read = {name for node in graph.nodes for name in node.inputs}
    optional = {entry.name for entry in program.inputs if entry.role == "position_ids"}
    graph.inputs[:] = [value for value in graph.inputs if value.name in read or value.name not in optional]


def _copy(source: str, name: str) -> NodeRecord:
    return NodeRecord("Identity", [source], [name], "", {})
