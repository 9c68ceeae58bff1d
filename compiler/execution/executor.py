"""Run a program in torch: the reference every runtime is compared with.

Weights are loaded when the first node needs them and dropped after the last one, so memory follows the largest node; a byte
budget keeps weights between runs when they fit (calibration and evaluation run the same program many times).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import fx

from compile_sparse.compiler.errors import UsageError
from compile_sparse.compiler.ir.liveness import last_uses
from compile_sparse.compiler.ir.nodes import operator_of
from compile_sparse.compiler.ir.program import Program

__all__ = ["Executor", "Observer", "call", "decoder_inputs", "interpret_graph", "model_input", "weight_only"]

Observer = Callable[[torch.Tensor], torch.Tensor | None]
"""Receives a node's value; a tensor it returns takes the value's place for every node that reads it."""


class Executor:
    """Interprets one program node by node.

    Args:
        program: what to run.
        cache_bytes: weights kept in memory between runs, first come first kept; 0 keeps none.
    """

    def __init__(self, program: Program, *, cache_bytes: int = 1 << 30) -> None:
        self._program = program
        self._budget = cache_bytes
        self._cached: dict[str, torch.Tensor] = {}
        self._cached_bytes = 0
        self._last_use = last_uses(program.graph)
        self._from_weights = weight_only(program)

    def run(
        self, inputs: Mapping[str, torch.Tensor], observe: Mapping[str, Observer] | None = None
    ) -> dict[str, torch.Tensor]:
        """Outputs by name.

        Args:
            inputs: every model input by its public name.
            observe: graph node name -> callback that receives the node's value, and may give another in its place.

        Raises:
            UsageError: CS1033 when an input is missing.
        """
        with torch.no_grad():
            return interpret_graph(
                self._program, inputs, self._weight, observe, dead_after=self._last_use, evaluate=self._evaluate
            )

    def _evaluate(self, node: fx.Node, value_of: Callable[[fx.Node], Any]) -> Any:
        if node in self._from_weights:
            return self._kept(node.name, partial(call, node, value_of))
        return call(node, value_of)

    def _weight(self, name: str) -> torch.Tensor:
        return self._kept(name, partial(self._program.weights.load, name))

    def _kept(self, name: str, compute: Callable[[], Any]) -> Any:
        """``compute()``, remembered between runs while the budget lasts."""
        if name in self._cached:
            return self._cached[name]
        value = compute()
        if isinstance(value, torch.Tensor) and self._cached_bytes + value.nbytes <= self._budget:
            self._cached[name] = value
            self._cached_bytes += value.nbytes
        return value


def interpret_graph(
    program: Program,
    inputs: Mapping[str, torch.Tensor],
    weight: Callable[[str], torch.Tensor],
    observe: Mapping[str, Observer] | None = None,
    *,
    dead_after: Mapping[fx.Node, Sequence[fx.Node]],
    evaluate: Callable[[fx.Node, Callable[[fx.Node], Any]], Any] | None = None,
) -> dict[str, torch.Tensor]:
    """Outputs by name, in the caller's gradient mode; every value is dropped after its last use.

    Args:
        program: what to run.
        inputs: every model input by its public name.
        weight: values of a stored tensor, asked for when the first node needs it.
        observe: graph node name -> callback that receives the node's value, and may give another in its place.
        dead_after: ``last_uses`` of the graph.
        evaluate: computes a call; by default the operator itself.

    Raises:
        UsageError: CS1033 when an input is missing.
    """
    watched, compute = observe or {}, evaluate or call
    by_placeholder = {i.placeholder: i.name for i in program.inputs}
    environment: dict[fx.Node, Any] = {}

    def value_of(node: fx.Node) -> Any:
        if node not in environment:  # a weight, met for the first time
            environment[node] = weight(program.bindings[node.name].tensor)
        return environment[node]

    for node in program.graph.nodes:
        if node.op == "placeholder":
            if node.name in by_placeholder:
                environment[node] = model_input(inputs, by_placeholder[node.name])
        elif node.op == "output":
            results = fx.node.map_arg(node.args[0], value_of)
        else:
            environment[node] = compute(node, value_of)
        if node.name in watched and (replaced := watched[node.name](value_of(node))) is not None:
            environment[node] = replaced
        for dead in dead_after.get(node, ()):
            environment.pop(dead, None)
    return {output.name: value for output, value in zip(program.outputs, results, strict=True)}


def call(node: fx.Node, value_of: Callable[[fx.Node], Any]) -> Any:
    """What the operator of ``node`` makes of its arguments' values."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), value_of)
    return operator_of(node)(*args, **kwargs)


def weight_only(program: Program) -> set[fx.Node]:
    """The weights, and calls that depend on weights alone (dequantization): the same in every run."""
    found: set[fx.Node] = set()
    for node in program.graph.nodes:
        sources = node.all_input_nodes
        computed = node.op == "call_function" and bool(sources) and all(source in found for source in sources)
        if computed or node.name in program.bindings:
            found.add(node)
    return found


def model_input(inputs: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    """The input called ``name``.

    Raises:
        UsageError: CS1033 when it is missing.
    """
    if name not in inputs:
        raise UsageError("CS1033", f"Input {name!r} is missing.", why=f"Given: {', '.join(inputs)}.")
    return inputs[name]


def decoder_inputs(
    program: Program,
    input_ids: torch.Tensor,
    *,
    attention_mask: torch.Tensor | None = None,
    past: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """Every input of a decoder for new tokens ``input_ids [B, S]``.

    Args:
        program: a decoder.
        input_ids: int64 token ids.
        attention_mask: int64 ``[B, P + S]``; all ones when omitted.
        past: outputs of the previous step (``present.*``); an empty cache when omitted.
    """
    batch, length = input_ids.shape
    values: dict[str, torch.Tensor] = {}
    past_length = 0
    for item in program.inputs:
        if item.role in ("past_key", "past_value"):
            if past:
                values[item.name] = past[item.name.replace("past_key_values", "present")]
            else:
                fake = program.node(item.placeholder).meta["val"]
                values[item.name] = torch.zeros(batch, fake.shape[1], 0, fake.shape[3], dtype=fake.dtype)
            past_length = values[item.name].shape[2]
    mask = torch.ones(batch, past_length + length, dtype=torch.long) if attention_mask is None else attention_mask
    for item in program.inputs:
        if item.role == "input_ids":
            values[item.name] = input_ids
        elif item.role == "attention_mask":
            values[item.name] = mask
        elif item.role == "position_ids":
            values[item.name] = torch.arange(past_length, past_length + length).expand(batch, length).contiguous()
        elif item.role == "token_type_ids":
            values[item.name] = torch.zeros_like(input_ids)
    return values
