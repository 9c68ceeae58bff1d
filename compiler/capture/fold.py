"""Evaluate what depends on neither the inputs nor the trained weights, once.

Position tables, rotary frequencies and the like then are plain buffers: ops whose value depends on a size (``arange``) no
longer stand between them and the rest, so pruning can slice them.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import fx

from compile_sparse.compiler.ir.edit import add_weight
from compile_sparse.compiler.ir.program import Binding, Program
from compile_sparse.compiler.ir.weights import ResidentTensor, TensorSource

__all__ = ["fold_constants"]

MAX_ELEMENTS = 1 << 24
"""A folded result larger than this (64 MB of float32) stays an expression."""


def fold_constants(program: Program) -> Program:
    """Replace the frontier of the input-independent region by buffers. Edits ``program``'s graph in place."""
    known: dict[fx.Node, Any] = {}
    for node in program.graph.nodes:
        name = program.tensor_of(node)
        if name is not None and program.bindings[node.name].kind == "buffer":
            source = program.weights[name]
            if isinstance(source, ResidentTensor):
                known[node] = source.value
        elif _foldable(node, known):
            known[node] = _evaluate(node, known)
    frontier = [
        node
        for node, value in known.items()
        if node.op == "call_function"
        and isinstance(value, torch.Tensor)
        and any(user not in known for user in node.users)
    ]
    bindings = dict(program.bindings)
    added: dict[str, TensorSource] = {}
    for index, node in enumerate(frontier):
        name = f"folded_{index}"
        source = ResidentTensor(known[node].contiguous())
        placeholder = add_weight(program, bindings, name, Binding(name, "buffer"), source)
        added[name] = source
        node.replace_all_uses_with(placeholder)
    return replace(program, bindings=bindings, weights=program.weights.updated(added))


def _foldable(node: fx.Node, known: dict[fx.Node, Any]) -> bool:
    value = node.meta.get("val")
    values = value if isinstance(value, (tuple, list)) else (value,)
    if node.op != "call_function" or not all(isinstance(item, torch.Tensor) and _is_small(item) for item in values):
        return False
    tags = getattr(node.target, "tags", ())
    return torch.Tag.nondeterministic_seeded not in tags and all(n in known for n in node.all_input_nodes)


def _is_small(value: torch.Tensor) -> bool:
    return all(isinstance(size, int) for size in value.shape) and prod(value.shape) <= MAX_ELEMENTS


def _evaluate(node: fx.Node, known: dict[fx.Node, Any]) -> Any:
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: known[n])
    return node.target(*args, **kwargs)  # type: ignore[operator]
