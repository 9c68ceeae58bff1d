"""Reshaping, moving, cutting and joining."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from compile_sparse.backends.onnx.emission import Emission, Unsupported, emits
from compile_sparse.compiler.ir.edit import schema_arguments
from compile_sparse.compiler.ir.nodes import dimensions, same_dimension

__all__: list[str] = []

_TO_THE_END = 2**63 - 1


def _target_shape(source: fx.Node, node: fx.Node, wanted: Sequence[Any]) -> list[Any]:
    """A target shape for ``Reshape`` with as few run-time sizes as possible.

    ONNX copies an input size where the target has 0 and infers one size written -1. Both keep the shape constant, which
    saves a handful of nodes per reshape.
    """
    before, after = dimensions(source), dimensions(node)
    shape = list(wanted)
    for index, size in enumerate(shape):
        dynamic = isinstance(size, fx.Node)
        if dynamic and index < len(before) and same_dimension(before[index], after[index]):
            shape[index] = 0
    unknown = [index for index, size in enumerate(shape) if isinstance(size, fx.Node)]
    if len(unknown) == 1 and -1 not in shape:
        shape[unknown[0]] = -1
    return shape


def _reshape_to(emission: Emission, source: fx.Node, node: fx.Node, shape: Sequence[Any]) -> str:
    target = emission.integers(_target_shape(source, node, shape))
    return emission.graph.call("Reshape", [emission.value(source), target], hint=node.name)


@emits("aten::reshape", "aten::view", "aten::_unsafe_view")
def _reshape(emission: Emission, node: fx.Node) -> str:
    return _reshape_to(emission, node.args[0], node, node.args[1])  # type: ignore[arg-type]


@emits("aten::flatten")
def _flatten(emission: Emission, node: fx.Node) -> str:
    given = schema_arguments(node)
    source = given["self"]
    first, last = (emission.axis(source, given[name]) for name in ("start_dim", "end_dim"))
    rest = dimensions(source)[last + 1 :]
    if not all(isinstance(size, int) for size in rest):
        raise Unsupported("flattening in front of a dynamic dimension")
    return _reshape_to(emission, source, node, [0] * first + [-1, *rest])


@emits("aten::unflatten")
def _unflatten(emission: Emission, node: fx.Node) -> str:
    given = schema_arguments(node)
    source = given["self"]
    dim = emission.axis(source, given["dim"])
    rest = dimensions(source)[dim + 1 :]
    if not all(isinstance(size, int) for size in rest):
        raise Unsupported("unflattening in front of a dynamic dimension")
    return _reshape_to(emission, source, node, [0] * dim + [*given["sizes"], *rest])


@emits("aten::expand")
def _expand(emission: Emission, node: fx.Node) -> str:
    source, sizes = node.args[:2]
    before, after = dimensions(source), dimensions(node)  # type: ignore[arg-type]
    lead = len(after) - len(before)
    shape = []
    for index, size in enumerate(sizes):  # type: ignore[arg-type]
        kept = index >= lead and (size == -1 or same_dimension(before[index - lead], after[index]))
        shape.append(1 if kept else size)
    if all(size == 1 for size in shape) and not lead:
        return emission.value(source)  # type: ignore[arg-type]
    return emission.graph.call("Expand", [emission.value(source), emission.integers(shape)], hint=node.name)  # type: ignore[arg-type]


@emits("aten::repeat")
def _repeat(emission: Emission, node: fx.Node) -> str:
    given = schema_arguments(node)
    source, repeats = emission.value(given["self"]), list(given["repeats"])
    lead = len(repeats) - emission.rank(given["self"])
    if lead:
        source = emission.graph.call("Unsqueeze", [source, emission.graph.constant(list(range(lead)))])
    return emission.graph.call("Tile", [source, emission.integers(repeats)], hint=node.name)


@emits("aten::unsqueeze")
def _unsqueeze(emission: Emission, node: fx.Node) -> str:
    source, dim = node.args
    axis = int(dim) % (emission.rank(source) + 1)  # type: ignore[arg-type, call-overload]
    return emission.graph.call("Unsqueeze", [emission.value(source), emission.graph.constant([axis])], hint=node.name)  # type: ignore[arg-type]


@emits("aten::squeeze")
def _squeeze(emission: Emission, node: fx.Node) -> str:
    given = schema_arguments(node)
    source, dim = given["self"], given.get("dim")
    wanted = range(emission.rank(source)) if dim is None else [dim] if isinstance(dim, int) else dim
    sizes = dimensions(source)
    axes = [a for a in (emission.axis(source, d) for d in wanted) if isinstance(sizes[a], int) and sizes[a] == 1]
    if not axes:
        return emission.value(source)
    return emission.graph.call("Squeeze", [emission.value(source), emission.graph.constant(axes)], hint=node.name)


@emits("aten::transpose", "aten::t")
def _transpose(emission: Emission, node: fx.Node) -> str:
    source: Any = node.args[0]
    order = list(range(emission.rank(source)))
    if len(order) < 2:
        return emission.value(source)
    first, second = (emission.axis(source, d) for d in (node.args[1:3] if len(node.args) > 1 else (0, 1)))  # type: ignore[arg-type]
    order[first], order[second] = order[second], order[first]
    return emission.graph.call("Transpose", [emission.value(source)], hint=node.name, perm=order)


@emits("aten::permute")
def _permute(emission: Emission, node: fx.Node) -> str:
    source: Any = node.args[0]
    order = [emission.axis(source, d) for d in node.args[1]]  # type: ignore[arg-type, union-attr]
    return emission.graph.call("Transpose", [emission.value(source)], hint=node.name, perm=order)


@emits("aten::slice")
def _slice(emission: Emission, node: fx.Node) -> str:
    given = schema_arguments(node)
    source = given["self"]
    bounds = [given["start"] or 0, _TO_THE_END if given["end"] is None else given["end"]]
    inputs = [emission.value(source), *(emission.integers([bound]) for bound in bounds)]
    inputs += [emission.graph.constant([emission.axis(source, given["dim"])]), emission.integers([given["step"]])]
    return emission.graph.call("Slice", inputs, hint=node.name)


@emits("aten::select")
def _select(emission: Emission, node: fx.Node) -> str:
    given = schema_arguments(node)
    source, index = given["self"], given["index"]
    picked = emission.graph.constant(index) if isinstance(index, int) else emission.tensor(index)
    return emission.graph.call(
        "Gather", [emission.value(source), picked], hint=node.name, axis=emission.axis(source, given["dim"])
    )


@emits("aten::split", "aten::split_with_sizes", "aten::chunk")
def _split(emission: Emission, node: fx.Node) -> list[str]:
    given = schema_arguments(node)
    source = given["self"]
    axis = emission.axis(source, given["dim"])
    sizes = [dimensions_of[axis] for dimensions_of in (tuple(part.shape) for part in node.meta["val"])]
    if not all(isinstance(size, int) for size in sizes):
        raise Unsupported("splitting a dynamic dimension")
    inputs = [emission.value(source), emission.graph.constant(sizes)]
    return emission.graph.call_many("Split", inputs, len(sizes), hint=node.name, axis=axis)


@emits("aten::cat")
def _cat(emission: Emission, node: fx.Node) -> str:
    given, dtype = schema_arguments(node), emission.dtype(node)
    parts = [emission.tensor(part, dtype) for part in given["tensors"]]
    return emission.graph.call("Concat", parts, hint=node.name, axis=emission.axis(node, given["dim"]))


@emits("aten::stack")
def _stack(emission: Emission, node: fx.Node) -> str:
    given, dtype = schema_arguments(node), emission.dtype(node)
    axis = emission.axis(node, given["dim"])
    where = emission.graph.constant([axis])
    parts = [emission.graph.call("Unsqueeze", [emission.tensor(part, dtype), where]) for part in given["tensors"]]
    return emission.graph.call("Concat", parts, hint=node.name, axis=axis)


@emits("aten::unbind")
def _unbind(emission: Emission, node: fx.Node) -> list[str]:
    given = schema_arguments(node)
    source = given["self"]
    axis = emission.axis(source, given["dim"])
    name = emission.value(source)
    return [
        emission.graph.call("Gather", [name, emission.graph.constant(place)], hint=f"{node.name}_{place}", axis=axis)
        for place in range(len(node.meta["val"]))
    ]


@emits("aten::roll")
def _roll(emission: Emission, node: fx.Node) -> str:
    """The end of each dimension in front of its beginning."""
    given = schema_arguments(node)
    if not given["dims"]:
        raise Unsupported("rolling over all dimensions at once")
    name = emission.value(given["self"])
    for dim, shift in zip(given["dims"], given["shifts"], strict=True):
        size = dimensions(given["self"])[dim]
        if not isinstance(shift, int) or not isinstance(size, int):
            raise Unsupported("rolling a dynamic dimension")
        if shift % size:
            axis, cut = emission.axis(given["self"], dim), size - shift % size
            sizes = emission.graph.constant([cut, size - cut])
            front, back = emission.graph.call_many("Split", [name, sizes], 2, axis=axis)
            name = emission.graph.call("Concat", [back, front], hint=node.name, axis=axis)
    return name


_PAD_MODES = {"constant": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}


@emits("aten::pad", "aten::constant_pad_nd")
def _pad(emission: Emission, node: fx.Node) -> str:
    """torch gives pairs from the last dimension on; ONNX begins, then ends."""
    given, dtype = schema_arguments(node), emission.dtype(node)
    amounts = list(given["pad"])
    count = len(amounts) // 2
    axes = [emission.rank(node) - 1 - place for place in range(count)]
    mode = _PAD_MODES[given.get("mode", "constant")]
    value = emission.tensor(given["value"] or 0, dtype) if mode == "constant" else ""
    inputs = [emission.tensor(given["self"], dtype), emission.integers(amounts[0::2] + amounts[1::2]), value]
    return emission.graph.call("Pad", [*inputs, emission.graph.constant(axes)], hint=node.name, mode=mode)


@emits("aten::repeat_interleave")
def _repeat_interleave(emission: Emission, node: fx.Node) -> str:
    """Each position ``repeats`` times in a row: a new dimension beside it, expanded and merged."""
    given = schema_arguments(node)
    source, repeats = given["self"], given["repeats"]
    if not isinstance(repeats, int) or given.get("dim") is None:
        raise Unsupported("repeating positions a varying number of times")
    axis, shape = emission.axis(source, given["dim"]), list(source.meta["val"].shape)
    if not all(isinstance(size, int) for size in shape[axis + 1 :]):
        raise Unsupported("repeating positions before a dynamic dimension")
    graph = emission.graph
    spread = graph.call("Unsqueeze", [emission.value(source), graph.constant([axis + 1])])
    copies = [1] * (len(shape) + 1)
    copies[axis + 1] = repeats
    expanded = graph.call("Expand", [spread, graph.constant(copies)])
    merged = [0] * axis + [-1] + [int(size) for size in shape[axis + 1 :]]
    return graph.call("Reshape", [expanded, graph.constant(merged)], hint=node.name)
