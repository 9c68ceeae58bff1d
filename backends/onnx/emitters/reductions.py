"""Reductions and softmax."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from compile_sparse.backends.onnx.dialect import Emitted
from compile_sparse.backends.onnx.emission import Emission, Emitter, Unsupported, emits
from compile_sparse.compiler.ir.edit import schema_arguments

__all__: list[str] = []


def _reduction(op: str) -> Emitter:
    def emit(emission: Emission, node: fx.Node) -> str:
        given = schema_arguments(node)
        source = emission.tensor(given["self"], emission.dtype(node))
        dims: Any = given.get("dim")
        dims = [dims] if isinstance(dims, int) else list(dims or ())
        inputs = [source] + ([emission.graph.constant(dims)] if dims else [])
        return emission.graph.call(op, inputs, hint=node.name, keepdims=int(bool(given.get("keepdim"))))

    return emit


for _op, _names in {
    "ReduceMean": ("aten::mean",),
    "ReduceSum": ("aten::sum",),
    "ReduceMax": ("aten::amax",),
    "ReduceMin": ("aten::amin",),
}.items():
    emits(*_names)(_reduction(_op))


@emits("aten::any", "aten::all")
def _any_or_all(emission: Emission, node: fx.Node) -> str:
    """Over 0 and 1 as int32: any is the maximum, all is the minimum."""
    given = schema_arguments(node)
    op = "ReduceMax" if node.target._schema.name == "aten::any" else "ReduceMin"  # type: ignore[union-attr]
    dims: Any = given.get("dim")
    dims = [dims] if isinstance(dims, int) else list(dims or ())
    inputs = [emission.tensor(given["self"], torch.int32)] + ([emission.graph.constant(dims)] if dims else [])
    reduced = emission.graph.call(op, inputs, keepdims=int(bool(given.get("keepdim"))))
    return emission.graph.call("Cast", [reduced], hint=node.name, to=9)


@emits("aten::softmax", "aten::_softmax", "aten::log_softmax", "aten::_log_softmax")
def _softmax(emission: Emission, node: fx.Node) -> str:
    given = schema_arguments(node)
    source = emission.tensor(given["self"], emission.dtype(node))
    op = "LogSoftmax" if "log" in node.target._schema.name else "Softmax"  # type: ignore[union-attr]
    return emission.graph.call(op, [source], hint=node.name, axis=emission.axis(node, given["dim"]))


@emits("aten::linalg_vector_norm")
def _vector_norm(emission: Emission, node: fx.Node) -> Emitted:
    if schema_arguments(node)["ord"] != 2:
        raise Unsupported("a vector norm other than the Euclidean")
    return _reduction("ReduceL2")(emission, node)


@emits("aten::max", "aten::min")
def _extreme(emission: Emission, node: fx.Node) -> str:
    given = schema_arguments(node)
    name = "Max" if node.target._schema.name == "aten::max" else "Min"  # type: ignore[union-attr]
    if "other" in given:
        operands = [emission.tensor(given[k], emission.dtype(node)) for k in ("self", "other")]
        return emission.graph.call(name, operands, hint=node.name)
    if given.get("dim") is not None:
        raise Unsupported("the position of a maximum")
    return emission.graph.call(f"Reduce{name}", [emission.value(given["self"])], hint=node.name, keepdims=0)


@emits("aten::topk")
def _topk(emission: Emission, node: fx.Node) -> list[str]:
    given = schema_arguments(node)
    inputs = [emission.value(given["self"]), emission.graph.constant([given["k"]])]
    axis, largest, ordered = emission.axis(given["self"], given["dim"]), int(given["largest"]), int(given["sorted"])
    return emission.graph.call_many("TopK", inputs, 2, hint=node.name, axis=axis, largest=largest, sorted=ordered)
