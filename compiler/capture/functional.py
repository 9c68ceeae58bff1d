"""Whether an export is functional as it is. Decomposing it traces the model again, which is half of the time of a capture."""

from __future__ import annotations

import torch
from torch import fx

from compile_sparse.compiler.ir.edit import schema_arguments

__all__ = ["is_functional"]

aten = torch.ops.aten
_NORMALIZED = frozenset(
    {
        *(aten.to.dtype, aten.to.device, aten.to.dtype_layout),
        *(aten.reshape.default, aten.contiguous.default, aten.chunk.default),
    }
)
"""Composite operators that ``normalize`` writes, or removes, as it does what decomposition makes of them."""


def is_functional(graph: fx.Graph) -> bool:
    """Whether decomposition with an empty table would give ``graph`` again, but for names and what ``normalize`` rewrites."""
    return all(_stays(node) for node in graph.nodes)


def _stays(node: fx.Node) -> bool:
    """The rule of ``torch.export``: what writes, what may, and composite views are taken apart; sub-graphs are inlined."""
    if node.op != "call_function":
        return node.op != "get_attr"
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return not isinstance(target, torch._ops.HigherOrderOperator)
    if target is aten.dropout.default:
        return not schema_arguments(node)["train"]
    if target._schema.is_mutable or torch.Tag.maybe_aliasing_or_mutating in target.tags:
        return False
    if target in _NORMALIZED:
        return True
    views = any(argument.alias_info is not None for argument in target._schema.arguments)
    return not (views and target._can_decompose())
