"""Small edits on a program's graph that every pass needs: add a weight, drop what is dead."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from compile_sparse.compiler.ir.program import Binding, Program
from compile_sparse.compiler.ir.weights import TensorSource

__all__ = ["add_weight", "eliminate_dead_code", "fake_mode_of", "is_pure", "op_name", "schema_arguments"]


def fake_mode_of(program: Program) -> FakeTensorMode:
    """The fake-tensor mode the graph's meta values live in."""
    for node in program.graph.nodes:
        value = node.meta.get("val")
        mode = getattr(value, "fake_mode", None)
        if mode is not None:
            return mode
    raise RuntimeError("program has no fake values")


def op_name(node: fx.Node) -> str:
    """Bare operator name, ``aten.add.Tensor`` -> ``add``; empty for placeholders and the output."""
    schema = getattr(node.target, "_schema", None)
    if schema is not None:
        return str(schema.name).split("::")[-1]
    return getattr(node.target, "__name__", "") if node.op == "call_function" else ""


def schema_arguments(node: fx.Node) -> dict[str, Any]:
    """Arguments of an ATen node by schema name, defaults filled in."""
    assert isinstance(node.target, torch._ops.OpOverload)
    declared = node.target._schema.arguments
    values = {a.name: a.default_value if a.has_default_value() else None for a in declared}
    values.update({a.name: v for a, v in zip(declared, node.args, strict=False)})
    values.update(node.kwargs)
    return values


def is_pure(node: fx.Node) -> bool:
    """True when a node without users may be deleted.

    torch's own test keeps random-seeded ops such as attention alive; here only mutation and I/O count. Assertions are dropped
    because they keep dead values alive and the verifier makes stronger ones.
    """
    if node.op in ("placeholder", "output"):
        return False
    return not getattr(getattr(node.target, "_schema", None), "is_mutable", False)


def add_weight(
    program: Program, bindings: dict[str, Binding], name: str, binding: Binding, source: TensorSource
) -> fx.Node:
    """Insert a weight placeholder at the top of the graph and record it in ``bindings``.

    The caller adds ``source`` to the weight store under ``binding.tensor``.
    """
    first = next(iter(program.graph.nodes))
    with program.graph.inserting_before(first):
        node = program.graph.placeholder(name)
    node.meta["val"] = _fake(fake_mode_of(program), source.shape, source.dtype)
    bindings[node.name] = binding
    return node


def _fake(mode: FakeTensorMode, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    with mode:
        return torch.empty(shape, dtype=dtype)


def eliminate_dead_code(program: Program, *, bindings: Mapping[str, Binding] | None = None) -> Program:
    """Remove dead nodes and weight placeholders without users; model inputs stay. Edits the graph in place.

    Returns the program with ``bindings`` and ``weights`` restricted to what is left.
    """
    wanted = dict(program.bindings if bindings is None else bindings)
    for node in reversed(list(program.graph.nodes)):
        if node.users or not (is_pure(node) or node.name in wanted):
            continue
        wanted.pop(node.name, None)
        program.graph.erase_node(node)
    order = [node.name for node in program.graph.nodes if node.op == "placeholder"]
    kept = {name: wanted[name] for name in order if name in wanted}
    names = {binding.tensor for binding in kept.values()}
    program.graph.lint()
    program.graph_module.recompile()
    return replace(
        program,
        bindings=kept,
        weights=program.weights.updated({}, keep=names),
        masks={name: mask for name, mask in program.masks.items() if name in names},
    )
