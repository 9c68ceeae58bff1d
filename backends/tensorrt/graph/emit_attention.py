"""Attention over a cache of static length: rotary embedding, scatter into the buffer, attention under a mask.

    q, k, v [B, S, heads * D]  ->  [B, heads, S, D], rotated at positions write_indices + 0 .. S - 1
    cache [B, kv, L, D]        ->  the same buffer with k (v) written at those positions (ONNX TensorScatter-24)
    Attention(q, keys, values, mask): column c is seen from position p when c <= p (and c > p - window)

Rows of a batch may have different lengths: what lies behind a row's position is never seen, and is overwritten later.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from compile_sparse.backends.onnx.element_types import kind_of, raw_values
from compile_sparse.backends.onnx.emission import Emission
from compile_sparse.backends.onnx.emitters.attention import STANDARD_ATTENTION, attention_call
from compile_sparse.backends.tensorrt.graph.cache import StaticCache
from compile_sparse.backends.tensorrt.graph.dialect import DECOMPOSABLE, emits
from compile_sparse.compiler.ir.edit import schema_arguments
from compile_sparse.compiler.ir.nodes import dimensions
from compile_sparse.compiler.lowering import AttentionShape

__all__ = ["refuse_attention"]

_LARGEST_HEAD, _HEAD_MULTIPLE = 256, 16


def refuse_attention(shape: AttentionShape) -> str:
    """Why TensorRT's attention cannot run this shape, or an empty string (for ``RaiseAttention``)."""
    if shape.head_size != shape.value_size:
        return f"TensorRT's attention needs keys and values of one size, got {shape.head_size} and {shape.value_size}."
    if shape.num_heads % shape.kv_heads:
        return f"TensorRT's attention needs {shape.num_heads} query heads to be a multiple of {shape.kv_heads}."
    return ""


@emits("compile_sparse::cached_attention")
def _cached_attention(emission: Emission, node: fx.Node) -> list[str]:
    given, graph = schema_arguments(node), emission.graph
    cache: StaticCache = emission.shared[StaticCache]
    query = _heads(emission, given["query"], given["num_heads"])
    key, value = (_heads(emission, given[name], given["kv_heads"]) for name in ("key", "value"))
    if given["cos"] is not None:
        tables = [
            _table(emission, given[name], cache.length, emission.dtype(given["query"])) for name in ("cos", "sin")
        ]
        query, key = (
            graph.call("RotaryEmbedding", [x, *tables, cache.positions], hint=f"{node.name}_rotated")
            for x in (query, key)
        )
    keys, values = (
        graph.call("TensorScatter", [emission.value(given[past]), new, cache.write_indices], axis=2, mode="linear")
        for past, new in (("past_key", key), ("past_value", value))
    )
    mask = cache.mask(graph, int(given["window"]))
    size = int(dimensions(given["past_key"])[3])
    out = _attention(emission, node, [query, keys, values, mask], size, scale=float(given["scale"]))
    rows = graph.call("Transpose", [out], perm=[0, 2, 1, 3])
    width = int(given["num_heads"]) * int(dimensions(given["past_value"])[3])
    return [graph.call("Reshape", [rows, graph.constant([0, 0, width])], hint=node.name), keys, values]


def _heads(emission: Emission, x: fx.Node, heads: int) -> str:
    """``[B, S, heads * D]`` as ``[B, heads, S, D]``."""
    split = emission.graph.call("Reshape", [emission.value(x), emission.graph.constant([0, 0, heads, -1])])
    return emission.graph.call("Transpose", [split], perm=[0, 2, 1, 3])


def _table(emission: Emission, table: fx.Node, length: int, dtype: torch.dtype) -> str:
    """The first ``length`` rows of a table of cosines or sines, in the type of what it rotates."""

    def rows(values: torch.Tensor) -> np.ndarray[Any, Any]:
        return raw_values(values[:length].to(dtype))

    shape = (length, int(dimensions(table)[1]))
    return emission.stored(table, "", shape, kind_of(dtype), rows)


@emits("aten::scaled_dot_product_attention")
def _plain(emission: Emission, node: fx.Node) -> str:
    operands, attributes = attention_call(emission, node)
    return _attention(emission, node, operands, dimensions(schema_arguments(node)["query"])[-1], **attributes)


def _attention(emission: Emission, node: fx.Node, operands: Sequence[str], size: Any, **attributes: Any) -> str:
    """Head sizes without a dedicated kernel may be built from single operators; others must not, because that is slower."""
    dedicated = isinstance(size, int) and size % _HEAD_MULTIPLE == 0 and size <= _LARGEST_HEAD
    if not dedicated or emission.dtype(node) == torch.float32:
        attributes[DECOMPOSABLE] = 1
    emission.count(STANDARD_ATTENTION if dedicated else f"{STANDARD_ATTENTION}, decomposed")
    return emission.graph.call(STANDARD_ATTENTION, operands, hint=node.name, **attributes)
