"""Tensors made from sizes and numbers."""

from __future__ import annotations

from typing import Any

from torch import fx

from compile_sparse.backends.onnx.emission import Emission, Unsupported, emits
from compile_sparse.compiler.ir.edit import schema_arguments

__all__: list[str] = []


@emits("aten::arange")
def _arange(emission: Emission, node: fx.Node) -> str:
    given, dtype = schema_arguments(node), emission.dtype(node)
    bounds = [given.get("start") or 0, given["end"], given.get("step") or 1]
    return emission.graph.call("Range", [emission.tensor(bound, dtype) for bound in bounds], hint=node.name)


def _filled(emission: Emission, node: fx.Node, number: Any, shape: str | None) -> str:
    """``number`` broadcast to an int64 shape; without one the result is a scalar."""
    value = emission.tensor(number, emission.dtype(node))
    return value if shape is None else emission.graph.call("Expand", [value, shape], hint=node.name)


def _shape(emission: Emission, sizes: Any) -> str | None:
    return emission.integers(list(sizes)) if sizes else None


@emits("aten::full", "aten::new_full")
def _full(emission: Emission, node: fx.Node) -> str:
    given = schema_arguments(node)
    return _filled(emission, node, given["fill_value"], _shape(emission, given["size"]))


@emits("aten::ones", "aten::new_ones")
def _ones(emission: Emission, node: fx.Node) -> str:
    return _filled(emission, node, 1, _shape(emission, schema_arguments(node)["size"]))


@emits("aten::zeros", "aten::new_zeros")
def _zeros(emission: Emission, node: fx.Node) -> str:
    return _filled(emission, node, 0, _shape(emission, schema_arguments(node)["size"]))


@emits("aten::scalar_tensor")
def _scalar(emission: Emission, node: fx.Node) -> str:
    return _filled(emission, node, node.args[0], None)


@emits("aten::ones_like", "aten::zeros_like", "aten::full_like")
def _like(emission: Emission, node: fx.Node) -> str:
    given = schema_arguments(node)
    name = node.target._schema.name  # type: ignore[union-attr]
    number = given["fill_value"] if "fill_value" in given else int(name == "aten::ones_like")
    source = given["self"]
    if not emission.rank(source):
        return _filled(emission, node, number, None)
    return _filled(emission, node, number, emission.graph.call("Shape", [emission.value(source)]))


@emits("aten::cumsum")
def _cumsum(emission: Emission, node: fx.Node) -> str:
    given = schema_arguments(node)
    source = emission.tensor(given["self"], emission.dtype(node))
    return emission.graph.call("CumSum", [source, emission.graph.constant(given["dim"])], hint=node.name)


@emits("aten::embedding")
def _embedding(emission: Emission, node: fx.Node) -> str:
    given = schema_arguments(node)
    return emission.graph.call(
        "Gather", [emission.value(given["weight"]), emission.value(given["indices"])], hint=node.name
    )


@emits("aten::index_select")
def _index_select(emission: Emission, node: fx.Node) -> str:
    given = schema_arguments(node)
    inputs = [emission.value(given["self"]), emission.value(given["index"])]
    return emission.graph.call("Gather", inputs, hint=node.name, axis=emission.axis(given["self"], given["dim"]))


@emits("aten::gather")
def _gather(emission: Emission, node: fx.Node) -> str:
    given = schema_arguments(node)
    inputs = [emission.value(given["self"]), emission.value(given["index"])]
    return emission.graph.call(
        "GatherElements", inputs, hint=node.name, axis=emission.axis(given["self"], given["dim"])
    )


@emits("aten::index")
def _index(emission: Emission, node: fx.Node) -> str:
    """``x[i]``, ``x[:, i]`` and ``x[i, j, ...]`` with indices that broadcast against each other."""
    source, given = node.args[:2]
    indices: list[Any] = list(given)  # type: ignore[arg-type]
    used = [position for position, index in enumerate(indices) if index is not None]
    if any(emission.dtype(indices[position]).is_floating_point or _is_bool(indices[position]) for position in used):
        raise Unsupported("indexing with a mask")
    if len(used) == 1:
        inputs = [emission.value(source), emission.value(indices[used[0]])]  # type: ignore[arg-type]
        return emission.graph.call("Gather", inputs, hint=node.name, axis=used[0])
    if used != list(range(len(used))):
        raise Unsupported("several indices after a whole dimension")
    rank = max(emission.rank(indices[position]) for position in used)
    common = emission.graph.call("Shape", [_sum(emission, [indices[p] for p in used])])
    last = emission.graph.constant([rank])
    columns = []
    for position in used:
        wide = emission.graph.call("Expand", [emission.tensor(indices[position]), common])
        columns.append(emission.graph.call("Unsqueeze", [wide, last]))
    stacked = emission.graph.call("Concat", columns, axis=rank)
    return emission.graph.call("GatherND", [emission.value(source), stacked], hint=node.name)  # type: ignore[arg-type]


def _is_bool(index: fx.Node) -> bool:
    return str(index.meta["val"].dtype) in ("torch.bool", "torch.uint8")


def _sum(emission: Emission, nodes: list[fx.Node]) -> str:
    """Any element-wise operation gives the broadcast shape; addition is one every type has."""
    total = emission.value(nodes[0])
    for node in nodes[1:]:
        total = emission.graph.call("Add", [total, emission.value(node)])
    return total
