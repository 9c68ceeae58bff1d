"""Compute one node of a program on concrete inputs, running only what it depends on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from compile_sparse.compiler.ir.program import Program

__all__ = ["Point", "evaluate", "sample_inputs", "valid_queries"]


@dataclass(frozen=True)
class Point:
    """Sizes to evaluate at: ``batch`` rows, ``length`` new positions after ``past`` cached ones.

    ``padded`` shortens every second row from the right by ``length // 2`` positions.
    """

    batch: int
    length: int
    past: int
    padded: bool = False


def valid_queries(point: Point) -> torch.Tensor:
    """Bool ``[B, S]``: which new positions are not padding."""
    lengths = torch.full((point.batch, 1), point.length)
    if point.padded:
        lengths[1::2] -= point.length // 2
    return torch.arange(point.length)[None, :] < lengths


def sample_inputs(program: Program, point: Point) -> dict[str, torch.Tensor]:
    """Inputs by placeholder name as a runtime gives them: right padding, position ids that continue the cache.

    Cache tensors are one element expanded, so a long past costs no memory.

    Raises:
        LookupError: the program has an input whose values cannot be made up.
    """
    past = torch.ones(point.batch, point.past, dtype=torch.int64)
    mask = torch.cat([past, valid_queries(point).long()], 1)
    positions = torch.arange(point.past, point.past + point.length).expand(point.batch, -1)
    placeholders = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    made: dict[str, torch.Tensor] = {}
    for entry in program.inputs:
        if entry.role in ("past_key", "past_value"):
            shape = placeholders[entry.placeholder].meta["val"].shape
            made[entry.placeholder] = torch.zeros(()).expand(point.batch, int(shape[1]), point.past, int(shape[3]))
        elif entry.role == "attention_mask":
            made[entry.placeholder] = mask
        elif entry.role == "position_ids":
            made[entry.placeholder] = positions
        elif entry.role in ("input_ids", "token_type_ids"):
            made[entry.placeholder] = torch.zeros(point.batch, point.length, dtype=torch.int64)
        else:
            raise LookupError(f"input {entry.name} has no known meaning")
    return made


def evaluate(program: Program, wanted: fx.Node, inputs: Mapping[str, torch.Tensor]) -> Any:
    """Value of ``wanted``; weights it depends on are loaded, everything else is left alone."""
    needed = _ancestors(wanted)
    values: dict[fx.Node, Any] = {}
    with torch.no_grad():
        for node in program.graph.nodes:
            if node not in needed:
                continue
            if node.op == "placeholder":
                tensor = program.tensor_of(node)
                values[node] = program.weights.load(tensor) if tensor is not None else inputs[node.name]
            else:
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
                values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return values[wanted]


def _ancestors(node: fx.Node) -> set[fx.Node]:
    seen, pending = {node}, [node]
    while pending:
        for parent in pending.pop().all_input_nodes:
            if parent not in seen:
                seen.add(parent)
                pending.append(parent)
    return seen
