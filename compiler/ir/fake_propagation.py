"""Run nodes on fake tensors: what a call gives for the shapes it is given, and the proof that a whole graph fits together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from compile_sparse.compiler.errors import CompileSparseError
from compile_sparse.compiler.ir.edit import fake_mode_of
from compile_sparse.compiler.ir.nodes import operator_of, same_dimension
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.ir.sizes import Size, same_size, shape_of

__all__ = ["FakeError", "Shapes", "fake_result", "propagate_fake_tensors"]

Shapes = Sequence[Size] | tuple[Sequence[Size], ...]
"""Expected shape of a node, or of each output of a node with several."""


class FakeError(Exception):
    """An operator rejects the shapes, types or arguments it is given; the message is the operator's own."""


def fake_result(node: fx.Node, mode: FakeTensorMode, value_of: Callable[[fx.Node], Any]) -> Any:
    """What a ``call_function`` node gives on fake values; ``value_of`` gives those of its inputs.

    The node remembers it with the very call, because symbolic sizes make a call take milliseconds: after a pass only what it
    touched is computed.

    Raises:
        FakeError: the operator does not take them.
    """
    arguments, keywords = fx.map_arg((node.args, node.kwargs), value_of)
    asked = (mode, operator_of(node), arguments, keywords)
    known = node.meta.get(_KNOWN)
    if known is not None and _same_call(known[0], asked):
        return known[1]
    # Without torch's Python rules some operators (padding) turn dynamic sizes into numbers.
    with enable_python_dispatcher(), mode, torch.no_grad():
        try:
            result = operator_of(node)(*arguments, **keywords)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise FakeError(str(error)) from error
    node.meta[_KNOWN] = (asked, result)
    return result


_KNOWN = "compile_sparse_fake_call"


def _same_call(known: Any, asked: Any) -> bool:
    """Equal numbers of the same type and the same fake values: comparing symbols would add guards."""
    if known is asked:
        return True
    if type(known) is not type(asked) or isinstance(known, _BY_IDENTITY):
        return False
    if isinstance(known, dict):
        return known.keys() == asked.keys() and all(_same_call(known[key], asked[key]) for key in known)
    if isinstance(known, (tuple, list)):
        return len(known) == len(asked) and all(map(_same_call, known, asked))
    return bool(known == asked)


_BY_IDENTITY = (torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool, FakeTensorMode)


def _kept(before: Any, now: Any) -> Any:
    """``before`` where it is the same value, so that calls which read it are remembered."""
    if isinstance(now, (tuple, list)):
        same = type(before) is type(now) and len(before) == len(now)
        return before if same and all(_kept(a, b) is a for a, b in zip(before, now, strict=True)) else now
    if isinstance(now, torch.SymInt):
        return before if same_dimension(before, now) else now
    if not isinstance(now, FakeTensor) or not isinstance(before, FakeTensor):
        return now
    places = zip((*before.shape, *before.stride()), (*now.shape, *now.stride()), strict=False)
    same = before.fake_mode is now.fake_mode and (before.dtype, before.device) == (now.dtype, now.device)
    return before if same and before.ndim == now.ndim and all(same_dimension(a, b) for a, b in places) else now


def propagate_fake_tensors(program: Program, expected: Mapping[str, Shapes] | None = None) -> Program:
    """Recompute ``meta["val"]`` of every node from the placeholders' and check the shapes.

    Nodes are computed from fake placeholders only, so this is independent of whatever a pass believed. Also checks that
    weight placeholders have the shape and dtype of the stored tensor.

    Args:
        program: its graph's meta values are replaced in place; symbolic sizes of inputs stay symbolic.
        expected: node name -> predicted shape. Nodes not named are only run.

    Returns:
        The same program.

    Raises:
        CompileSparseError: CS2190, an internal error naming the node; a pass produced a graph that does not fit.
    """
    expected = expected or {}
    values: dict[fx.Node, Any] = {}
    mode = fake_mode_of(program)
    for node in program.graph.nodes:
        if node.op == "output":
            break
        if node.op == "placeholder":
            values[node] = node.meta.get("val")
            _check_weight(program, node)
        elif node.op == "call_function":
            try:
                values[node] = _kept(node.meta.get("val"), fake_result(node, mode, values.__getitem__))
            except FakeError as error:
                raise _internal(node, f"The operator rejects its arguments: {error}") from error
            node.meta["val"] = values[node]
        else:
            values[node] = node.meta.get("val")
        if node.name in expected:
            _check_shape(node, values[node], expected[node.name])
    return program


def _check_weight(program: Program, node: fx.Node) -> None:
    tensor = program.tensor_of(node)
    if tensor is None:
        return
    source, value = program.weights[tensor], node.meta["val"]
    if tuple(value.shape) != source.shape or value.dtype != source.dtype:
        raise _internal(
            node, f"The graph has {tuple(value.shape)} {value.dtype}, the stored tensor {source.shape} {source.dtype}."
        )


def _check_shape(node: fx.Node, value: Any, want: Shapes) -> None:
    wanted = want if isinstance(want, tuple) else (want,)
    got = value if isinstance(value, (tuple, list)) else (value,)
    for shape, item in zip(wanted, got, strict=True):
        if not isinstance(item, torch.Tensor):
            continue
        found = shape_of(item)
        if len(found) != len(shape) or not all(same_size(a, b) for a, b in zip(found, shape, strict=True)):
            raise _internal(node, f"Predicted shape {list(shape)}, computed {found}.")


def _internal(node: fx.Node, why: str) -> CompileSparseError:
    return CompileSparseError(
        "CS2190",
        "Internal error: a graph edit does not fit together.",
        where=f"node '{node.name}' ({node.target})",
        why=why,
        hint="Please report this with the model's config and the recipe.",
    )
