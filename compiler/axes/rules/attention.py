"""Scaled dot-product attention, kept whole by capture."""

from __future__ import annotations

from compile_sparse.compiler.axes.algebra import find, is_dynamic, leaf, product
from compile_sparse.compiler.axes.rule_context import RuleContext
from compile_sparse.compiler.axes.rules.registry import Labels, rule
from compile_sparse.compiler.ir.sizes import shape_of

__all__: list[str] = []


@rule("scaled_dot_product_attention")
def attention(step: RuleContext) -> Labels | None:
    """``softmax(q k^T * scale + mask) v``; ``q: [..., H, S, D]``, ``k: [..., K, T, D]``, ``v: [..., K, T, E]``.

    With ``enable_gqa``, query heads are ``K * queries per key head``, in that order.
    """
    if step.arguments.get("dropout_p"):
        return None
    query, key, value = step.label("query"), step.label("key"), step.label("value")
    step.tie(query[-1], key[-1])
    step.role(query[-1], "qk_dim")
    step.role(value[-1], "v_dim")
    step.tie(key[-2], value[-2])
    attended = [key[-2], query[-2]] if step.arguments.get("is_causal") else [key[-2]]
    for axis in attended:
        if not is_dynamic(axis):
            step.freeze(axis, "its positions are positions in time")
    key_batch, value_batch = key[:-2], value[:-2]
    if step.arguments.get("enable_gqa") and find(query[-3]).size != find(key[-3]).size:
        heads, shared = find(query[-3]).size, find(key[-3]).size
        if not (isinstance(heads, int) and isinstance(shared, int)) or heads % shared:
            return None
        step.tie(key[-3], value[-3])
        copies = leaf(heads // shared)
        step.role(copies, "broadcast")
        key_batch[-1] = value_batch[-1] = product([key[-3], copies])
    sizes = shape_of(step.value)
    batch = step.broadcast([query[:-2], key_batch, value_batch], sizes[:-2])
    mask = step.optional("attn_mask")
    if mask is not None:
        logits = [*batch, query[-2], key[-2]]
        step.broadcast([mask, logits], [find(axis).size for axis in logits])
    if batch:
        step.role(batch[-1], "attn_heads")
    return [*batch, query[-2], value[-1]]
