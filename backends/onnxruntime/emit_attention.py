"""The grouped-query kernel for raised attention."""

from __future__ import annotations

from torch import fx

from compile_sparse.backends.onnx.element_types import element_type
from compile_sparse.backends.onnx.emission import Emission
from compile_sparse.backends.onnxruntime.dialect import MICROSOFT, emits
from compile_sparse.compiler.ir.edit import schema_arguments
from compile_sparse.compiler.lowering import AttentionShape

__all__ = ["GROUPED", "refuse_attention"]

GROUPED = "GroupQueryAttention"


def refuse_attention(shape: AttentionShape) -> str:
    """Why the grouped-query kernel cannot run this shape, or an empty string (for ``RaiseAttention``)."""
    if shape.head_size != shape.value_size:
        return f"GroupQueryAttention needs equal key and value sizes, got {shape.head_size} and {shape.value_size}."
    if shape.head_size % 8 or (shape.rotary and shape.head_size % 16):
        return (
            f"GroupQueryAttention needs head sizes in multiples of {16 if shape.rotary else 8}, got {shape.head_size}."
        )
    if shape.num_heads % shape.kv_heads:
        return f"GroupQueryAttention needs {shape.num_heads} query heads to be a multiple of {shape.kv_heads}."
    return ""


@emits("compile_sparse::cached_attention")
def _cached_attention(emission: Emission, node: fx.Node) -> list[str]:
    given = schema_arguments(node)
    inputs = [emission.value(given[k]) for k in ("query", "key", "value", "past_key", "past_value")]
    inputs += _lengths(emission, given["attention_mask"])
    rotary = given["cos"] is not None
    if rotary:
        inputs += [emission.value(given["cos"]), emission.value(given["sin"])]
    emission.count(GROUPED)
    return emission.graph.call_many(
        GROUPED,
        inputs,
        3,
        hint=node.name,
        domain=MICROSOFT,
        num_heads=given["num_heads"],
        kv_num_heads=given["kv_heads"],
        scale=float(given["scale"]),
        do_rotary=int(rotary),
        rotary_interleaved=0,
        # Both count the query's own position: a window of 1 sees only itself.
        local_window_size=given["window"] or -1,
    )


def _lengths(emission: Emission, mask: fx.Node) -> list[str]:
    """``seqlens_k`` (valid positions of each row, minus one) and the total length, int32; shared by all layers."""
    key = ("lengths", mask)
    if key not in emission.shared:
        graph, name = emission.graph, emission.value(mask)
        one = graph.constant([1])
        valid = graph.call("ReduceSum", [name, one], keepdims=0)
        rows = graph.call("Cast", [graph.call("Sub", [valid, one])], hint="seqlens_k", to=element_type("int32"))
        total = graph.call("Squeeze", [graph.call("Shape", [name], start=1, end=2)])
        emission.shared[key] = [rows, graph.call("Cast", [total], hint="total_length", to=element_type("int32"))]
    return list(emission.shared[key])
