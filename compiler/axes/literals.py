"""Size literals of a graph, written anew from the labels.

Literals are never patched by value ("replace 64 by 48"): which axis a number stands for is known from the label of the
dimension it describes. ``-1`` stays; a product of a static and a dynamic size becomes ``-1``.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from compile_sparse.compiler.axes.algebra import Axis, factors, find, regroup
from compile_sparse.compiler.axes.analysis_state import Label
from compile_sparse.compiler.axes.selection import Selection
from compile_sparse.compiler.errors import ModelError
from compile_sparse.compiler.ir.edit import op_name, schema_arguments
from compile_sparse.compiler.ir.gemms import CONVOLUTIONS, gemm_of

__all__ = ["regenerate"]

_SHAPED = ("expand", "full", "zeros", "ones", "empty", "new_full", "new_zeros", "new_ones", "new_empty")


@dataclass
class _Site:
    """One node being rewritten, with the labels it had."""

    node: fx.Node
    selection: Selection
    arguments: dict[str, Any]
    result: Label | tuple[Label, ...]

    def label(self, argument: str) -> Label:
        found = self.selection.analysis.labels[self.arguments[argument].name]
        assert isinstance(found, list)  # several-valued nodes are read through getitem only
        return found

    @property
    def single(self) -> Label:
        assert isinstance(self.result, list)  # the operator has one output
        return self.result

    def set(self, name: str, value: Any) -> None:
        """Write one argument, positional or keyword, by schema name."""
        place = list(self.arguments).index(name)  # in the order of the schema
        if place < len(self.node.args):
            self.node.args = (*self.node.args[:place], value, *self.node.args[place + 1 :])
        else:
            self.node.kwargs = {**self.node.kwargs, name: value}

    def size(self, axis: Any) -> int:
        new = self.selection.size(axis)
        assert isinstance(new, int)  # only static axes are pruned
        return new


_WRITERS: dict[str, Callable[[_Site], None]] = {}


def _writer(*names: str) -> Callable[[Callable[[_Site], None]], Callable[[_Site], None]]:
    def register(function: Callable[[_Site], None]) -> Callable[[_Site], None]:
        _WRITERS.update(dict.fromkeys(names, function))
        return function

    return register


def regenerate(node: fx.Node, selection: Selection) -> None:
    """Rewrite the size literals of one ``call_function`` node in place.

    Raises:
        ModelError: CS2107 when fewer positions are left than a top-k asks for.
    """
    result = selection.analysis.labels.get(node.name)
    if result is None or not isinstance(node.target, torch._ops.OpOverload):
        return
    writer = _WRITERS.get(op_name(node))
    if writer is not None:
        writer(_Site(node, selection, schema_arguments(node), result))


@_writer("view", "_unsafe_view", "reshape")
def _reshape(site: _Site) -> None:
    # Strides change with sizes, so a view that was legal may not be: reshape always is.
    shape = site.arguments["shape" if "shape" in site.arguments else "size"]
    site.node.target = torch.ops.aten.reshape.default
    site.node.args, site.node.kwargs = (site.node.args[0], _new_shape(site, list(shape), site.single)), {}


@_writer(*_SHAPED)
def _shaped(site: _Site) -> None:
    if not any(map(site.selection.touched, site.single)):
        return
    given = list(site.arguments["size"])
    shape = _new_shape(site, list(given), site.single)
    for place, (axis, entry) in enumerate(zip(site.single, given, strict=True)):
        # These operators infer no size: -1 means something else, or nothing.
        if isinstance(entry, fx.Node) and site.selection.touched(axis):
            shape[place] = _rescaled(site, entry, axis)
    site.set("size", shape)


def _rescaled(site: _Site, size: fx.Node, axis: Axis) -> fx.Node:
    """A computed size ``dynamic * old`` as ``dynamic * new``. Export computes sizes from the inputs': none follows by itself."""
    static = [factor for factor in factors(axis) if isinstance(find(factor).size, int)]
    old, new = math.prod(int(find(factor).size) for factor in static), math.prod(map(site.size, static))
    with site.node.graph.inserting_before(site.node):
        dynamic = site.node.graph.call_function(operator.floordiv, (size, old))
        return site.node.graph.call_function(operator.mul, (dynamic, new))


@_writer("unflatten")
def _unflatten(site: _Site) -> None:
    sizes = list(site.arguments["sizes"])
    dim = site.arguments["dim"] % len(site.label("self"))
    site.set("sizes", _new_shape(site, sizes, site.single[dim : dim + len(sizes)]))


def _new_shape(site: _Site, shape: list[Any], label: Label) -> list[Any]:
    for place, axis in enumerate(label):
        if not site.selection.touched(axis) or shape[place] == -1:
            continue
        if isinstance(find(axis).size, int):
            shape[place] = site.size(axis)
            continue
        for other, entry in enumerate(shape):
            if entry == -1 and isinstance(find(label[other]).size, int):
                shape[other] = site.size(label[other])
        shape[place] = -1
    return shape


@_writer("slice")
def _slice(site: _Site) -> None:
    source = site.label("self")
    kept = site.selection.mask(source[site.arguments.get("dim", 0) % len(source)])
    if kept is None or site.arguments.get("step", 1) != 1:
        return
    size = len(kept)
    start, end = site.arguments.get("start"), site.arguments.get("end")
    if isinstance(start, int) and start:
        site.set("start", int(kept[: start if start > 0 else max(start + size, 0)].sum()))
    if isinstance(end, int) and end < size:
        site.set("end", int(kept[: end if end >= 0 else end + size].sum()))


@_writer("narrow")
def _narrow(site: _Site) -> None:
    source = site.label("self")
    kept = site.selection.mask(source[site.arguments["dim"] % len(source)])
    if kept is not None:
        start = site.arguments["start"] % len(kept)
        site.set("length", int(kept[start : start + site.arguments["length"]].sum()))
        site.set("start", int(kept[:start].sum()))


@_writer("split", "split_with_sizes", "chunk")
def _split(site: _Site) -> None:
    source = site.label("self")
    dim = site.arguments.get("dim", 0) % len(source)
    if site.selection.touched(source[dim]):  # equal parts may become unequal
        sizes = [site.size(label[dim]) for label in site.result if isinstance(label, list)]
        site.node.target = torch.ops.aten.split_with_sizes.default
        site.node.args, site.node.kwargs = (site.node.args[0], sizes, dim), {}


@_writer("layer_norm", "native_layer_norm", "rms_norm")
def _norm(site: _Site) -> None:
    if "normalized_shape" in site.arguments:
        count = len(site.arguments["normalized_shape"])
        site.set("normalized_shape", [site.size(axis) for axis in site.label("input")[-count:]])


@_writer(*(name.removeprefix("aten::") for name in CONVOLUTIONS))
def _convolution(site: _Site) -> None:
    gemm = gemm_of(site.node)
    if gemm is not None and site.arguments["groups"] > 1:
        channels, inner = (site.single if gemm.is_transposed else site.label("input"))[1], site.label("weight")[1]
        site.set("groups", site.size(channels) // site.size(inner))


@_writer("channel_shuffle")
def _channel_shuffle(site: _Site) -> None:
    channels, groups = site.label("self")[1], site.arguments["groups"]
    size = find(channels).size
    assert isinstance(size, int)  # the rule refuses dynamic channels
    outer, _ = regroup(factors(channels), [groups, size // groups])
    site.set("groups", site.size(outer))


@_writer("group_norm")
def _group_norm(site: _Site) -> None:
    channels, groups = site.single[1], site.arguments["num_groups"]
    size = find(channels).size
    assert isinstance(size, int)  # the rule refuses dynamic channels
    outer, _ = regroup(factors(channels), [groups, size // groups])
    site.set("num_groups", site.size(outer))


@_writer("repeat_interleave")
def _repeat_interleave(site: _Site) -> None:
    source = site.label("self")
    dim = site.arguments["dim"] % len(source)
    if site.selection.touched(site.single[dim]):
        old, new = site.selection.size(source[dim]), site.selection.size(site.single[dim])
        if isinstance(old, int) and isinstance(new, int):
            site.set("repeats", new // old)


@_writer("repeat")
def _repeat(site: _Site) -> None:
    source, repeats = site.label("self"), list(site.arguments["repeats"])
    offset = len(repeats) - len(source)
    for dim, axis in enumerate(site.single):
        if isinstance(repeats[dim], int) and site.selection.touched(axis):
            before = site.size(source[dim - offset]) if dim >= offset else 1
            repeats[dim] = site.size(axis) // before
    site.set("repeats", repeats)


@_writer("scaled_dot_product_attention")
def _attention(site: _Site) -> None:
    # The default scale is 1/sqrt(current head size); the model was trained with the old one.
    query = site.label("query")[-1]
    if site.selection.touched(query) and site.arguments.get("scale") is None:
        size = find(query).size
        assert isinstance(size, int)  # only static axes are touched
        site.set("scale", 1.0 / math.sqrt(size))


@_writer("cached_attention")
def _cached_attention(site: _Site) -> None:
    heads = site.size(site.label("past_key")[1])
    query, dim = site.size(site.label("query")[2]), site.size(site.label("past_key")[3])
    site.set("kv_heads", heads)
    site.set("num_heads", query // dim)


@_writer("topk")
def _topk(site: _Site) -> None:
    source = site.label("self")
    axis = source[site.arguments["dim"] % len(source)]
    if site.selection.touched(axis) and site.size(axis) < site.arguments["k"]:
        raise ModelError(
            "CS2107",
            "Too few positions are left to choose from.",
            where=site.node.name,
            why=f"The model chooses the best {site.arguments['k']} of {site.size(axis)} kept.",
            hint="Remove fewer experts.",
        )


@_writer("histc")
def _histc(site: _Site) -> None:
    if site.selection.touched(site.single[0]):
        bins = site.size(site.single[0])
        site.set("bins", bins)
        site.set("max", bins - 1)


@_writer("one_hot")
def _one_hot(site: _Site) -> None:
    if site.selection.touched(site.single[-1]):
        site.set("num_classes", site.size(site.single[-1]))
