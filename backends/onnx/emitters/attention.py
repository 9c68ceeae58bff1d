"""Attention without a cache: the opset's own operator."""

from __future__ import annotations

from typing import Any

from torch import fx

from compile_sparse.backends.onnx.emission import Emission, Unsupported, emits
from compile_sparse.compiler.ir.edit import schema_arguments

__all__ = ["STANDARD_ATTENTION", "attention_call"]

STANDARD_ATTENTION = "Attention"


def attention_call(emission: Emission, node: fx.Node) -> tuple[list[str], dict[str, Any]]:
    """Operands and attributes of ``Attention`` for a ``scaled_dot_product_attention``.

    Raises:
        Unsupported: it has dropout.
    """
    given = schema_arguments(node)
    if given["dropout_p"]:
        raise Unsupported("attention with dropout")
    inputs = [emission.value(given[k]) for k in ("query", "key", "value")]
    if given["attn_mask"] is not None:
        inputs.append(emission.value(given["attn_mask"]))
    return inputs, {"scale": float(given["scale"]), "is_causal": int(bool(given["is_causal"]))}


@emits("aten::scaled_dot_product_attention")
def _attention(emission: Emission, node: fx.Node) -> str:
    inputs, attributes = attention_call(emission, node)
    emission.count(STANDARD_ATTENTION)
    return emission.graph.call(STANDARD_ATTENTION, inputs, hint=node.name, **attributes)
