"""Questions about a node that every pattern asks, and insertion of a node with its fake value."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

__all__ = [
    "dimensions",
    "fake_tensor",
    "insert_call",
    "is_op",
    "module_of",
    "node_argument",
    "operand_pairs",
    "operator_of",
    "qualified_name",
    "same_dimension",
    "traced_module",
]


def qualified_name(node: Any) -> str:
    """``aten::mul`` for operators, ``python::add`` for arithmetic on sizes, empty for anything else."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return ""
    schema = getattr(node.target, "_schema", None)
    return str(schema.name) if schema is not None else f"python::{getattr(node.target, '__name__', node.target)}"


def is_op(node: Any, *names: str) -> bool:
    """True when ``node`` calls one of the qualified ``names``."""
    return qualified_name(node) in names


def node_argument(node: fx.Node, place: int = 0) -> fx.Node:
    """The positional argument at ``place``, which the operator's schema says is a value of the graph."""
    found = node.args[place]
    assert isinstance(found, fx.Node)
    return found


def operator_of(node: fx.Node) -> Callable[..., Any]:
    """What a ``call_function`` node calls."""
    assert callable(node.target)  # only placeholders and the output have a name instead
    return node.target


def operand_pairs(node: fx.Node) -> Iterator[tuple[Any, Any]]:
    """Both orders of a commutative node's two operands."""
    left, right = node.args[:2]
    yield left, right
    yield right, left


def fake_tensor(node: fx.Node) -> torch.Tensor:
    """The fake value of a node that is one tensor."""
    value = node.meta["val"]
    assert isinstance(value, torch.Tensor)
    return value


def dimensions(node: fx.Node) -> tuple[Any, ...]:
    """Shape of a node's value; symbolic sizes stay symbolic. Empty for values that are no tensor."""
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


def same_dimension(left: Any, right: Any) -> bool:
    """Whether two sizes are the same number or the same symbolic expression; never adds a guard."""
    if isinstance(left, int) and isinstance(right, int):
        return left == right
    if isinstance(left, torch.SymInt) and isinstance(right, torch.SymInt):
        return bool(left.node.expr == right.node.expr)
    return False


def insert_call(graph: fx.Graph, target: Any, args: tuple[Any, ...], value: Any = None) -> fx.Node:
    """Add a call at the graph's insertion point with its fake value: ``value``, or the result of calling on fake values."""
    node = graph.call_function(target, args)
    node.meta["val"] = target(*fx.node.map_arg(args, lambda a: a.meta["val"])) if value is None else value
    return node


def traced_module(node: fx.Node) -> str:
    """Path of the module whose code a node was traced in; empty when that is not known."""
    stack = node.meta.get("nn_module_stack") or {}
    return next((str(entry[0]) for entry in reversed(stack.values()) if isinstance(entry, tuple)), "")


def module_of(node: fx.Node) -> dict[str, Any]:
    """Meta data that say which module a node came from, for the node that replaces it."""
    stack = node.meta.get("nn_module_stack")
    return {"nn_module_stack": stack} if stack else {}
