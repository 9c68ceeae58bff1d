"""Bring an exported graph into the form the IR's spec demands.

- ``view`` becomes ``reshape``: a view that is legal now may not be after a pass changed strides.
- casts are ``_to_copy`` to a type and nothing else, ``chunk`` is ``split``: decomposition would write them so.
- attention states its scale: the default depends on a size that pruning may change.
- operations without effect on values are removed (full-range slices, copies, same-type casts, ``* 1.0``, concatenation with
  nothing), and so are assertions, which keep dead values alive.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping

import torch
from torch import fx
from torch.export import ExportedProgram

from compile_sparse.compiler.ir.edit import op_name, schema_arguments
from compile_sparse.compiler.ir.program import Binding

__all__ = ["normalize"]

aten = torch.ops.aten
COPIES = {"clone", "contiguous", "alias", "detach", "lift_fresh_copy", "lift_fresh", "dropout"}
END = 2**62  # export writes "to the end" as the largest int64


def normalize(exported: ExportedProgram, bindings: Mapping[str, Binding]) -> tuple[fx.GraphModule, dict[str, Binding]]:
    """A graph module of our own with the rules above applied, and the bindings under its placeholder names."""
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    result = graph.graph_copy(exported.graph, copied)  # type: ignore[arg-type]
    graph.output(result)
    renamed = {
        copied[n].name: bindings[n.name] for n in exported.graph.nodes if n.op == "placeholder" and n.name in bindings
    }
    for node in list(graph.nodes):
        if node.op == "call_function":
            _normalize_node(node)
    graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))
    graph.lint()
    return fx.GraphModule(torch.nn.Module(), graph), renamed


def _normalize_node(node: fx.Node) -> None:
    name = op_name(node)
    if name in ("view", "_unsafe_view"):
        given = schema_arguments(node)
        node.target, node.args, node.kwargs = aten.reshape.default, (given["self"], list(given["size"])), {}
    elif name in ("to", "_to_copy") and node.meta["val"].dtype != _dtype_before(node):
        node.target, node.args, node.kwargs = aten._to_copy.default, node.args[:1], {"dtype": node.meta["val"].dtype}
    elif node.target is aten.chunk.default:
        _chunk_to_split(node)
    elif name == "scaled_dot_product_attention" and schema_arguments(node)["scale"] is None:
        query = schema_arguments(node)["query"].meta["val"]
        node.kwargs = {**node.kwargs, "scale": 1.0 / math.sqrt(query.shape[-1])}
    elif name == "cat":
        _drop_empty_parts(node)
    elif isinstance(source := node.args[0] if node.args else None, fx.Node) and _has_no_effect(node, name, source):
        node.replace_all_uses_with(source)


def _dtype_before(node: fx.Node) -> torch.dtype:
    value: torch.Tensor = schema_arguments(node)["self"].meta["val"]
    return value.dtype


def _chunk_to_split(node: fx.Node) -> None:
    given = schema_arguments(node)
    size = given["self"].meta["val"].shape[given["dim"]]
    assert isinstance(size, int)  # export makes it a number: how many chunks there are depends on it
    node.target, node.args, node.kwargs = (
        aten.split.Tensor,
        (given["self"], -(-size // given["chunks"]), given["dim"]),
        {},
    )


def _drop_empty_parts(node: fx.Node) -> None:
    """Parts of size 0 say nothing: a model with partial rotation writes them when all of a head is rotated."""
    parts: list[fx.Node] = schema_arguments(node)["tensors"]
    # Only numbers are compared: asking a symbol would pin it.
    kept = [p for p in parts if not any(isinstance(n, int) and n == 0 for n in p.meta["val"].shape)]
    if not kept or len({p.meta["val"].dtype for p in parts}) != 1:  # they may decide the dtype
        return
    if len(kept) == 1:
        node.replace_all_uses_with(kept[0])
    else:
        node.args = (kept, *node.args[1:])


def _has_no_effect(node: fx.Node, name: str, source: fx.Node) -> bool:
    """Whether ``node`` gives its first argument, ``source``, unchanged."""
    if name in COPIES:
        return not (name == "dropout" and schema_arguments(node)["train"])
    value, before = node.meta.get("val"), source.meta.get("val")
    if not isinstance(value, torch.Tensor) or not isinstance(before, torch.Tensor) or value.dtype != before.dtype:
        return False
    if name in ("_to_copy", "to"):
        return True
    if name == "slice":
        arguments = schema_arguments(node)
        end, size = arguments["end"], before.shape[arguments["dim"]]
        whole = end is None or (isinstance(end, int) and end >= (size if isinstance(size, int) else END))
        return arguments["start"] in (None, 0) and arguments["step"] == 1 and whole
    if name in ("pad", "constant_pad_nd"):
        return all(amount == 0 for amount in schema_arguments(node)["pad"])
    if name == "expand":
        return before.ndim == value.ndim and all(size == -1 for size in schema_arguments(node)["size"])
    if node.target is aten.mul.Tensor or node.target is operator.mul:
        return _is_number(node.args[1], 1)
    return node.target is aten.add.Tensor and _is_number(node.args[1], 0)


def _is_number(operand: object, wanted: int) -> bool:
    return isinstance(operand, (int, float)) and not isinstance(operand, bool) and operand == wanted
