"""The ``compile_sparse::`` operators that stand for a raised pattern."""

from __future__ import annotations

from compile_sparse.compiler.axes.algebra import concatenation, factors, find, is_dynamic, leaf, product, regroup
from compile_sparse.compiler.axes.analysis_state import Label
from compile_sparse.compiler.axes.rule_context import RuleContext
from compile_sparse.compiler.axes.rules.registry import Labels, rule
from compile_sparse.compiler.ir.sizes import shape_of

__all__: list[str] = []


@rule("compile_sparse::rms_norm")
def rms_norm(step: RuleContext) -> Labels:
    """Statistics over the last dimension, then a scale per position of it."""
    out = step.label("x")
    step.tie(out[-1], step.label("weight")[0])
    step.role(out[-1], "norm")
    return out


@rule("compile_sparse::residual_rms_norm")
def residual_rms_norm(step: RuleContext) -> Labels:
    """Norm of a sum, and the sum."""
    total = step.broadcast([step.label("x"), step.label("residual")], shape_of(step.value[0]))
    step.tie(total[-1], step.label("weight")[0])
    step.role(total[-1], "norm")
    return (total, list(total))


@rule("compile_sparse::cached_attention")
def cached_attention(step: RuleContext) -> Labels | None:
    """Grouped-query attention on merged heads: query ``K * copies * D``, key ``K * D``, value ``K * E``."""
    query, key, value = step.label("query"), step.label("key"), step.label("value")
    past_key, past_value = step.label("past_key"), step.label("past_value")
    heads, shared = step.arguments["num_heads"], step.arguments["kv_heads"]
    dim, value_dim = find(past_key[3]).size, find(past_value[3]).size
    mask = step.label("attention_mask")
    for axis in (query[1], key[1], value[1], past_key[2], past_value[2], mask[1]):
        if not is_dynamic(axis):
            step.freeze(axis, "its positions are positions in time")
    for axis in (key[0], value[0], past_key[0], past_value[0], mask[0]):
        step.tie(query[0], axis)
    step.tie(past_key[1], past_value[1])
    copies = leaf(heads // shared)
    step.role(copies, "broadcast")
    head_axis = product([past_key[1], copies])
    query_heads, query_dim = regroup(factors(query[2]), [heads, dim])
    key_heads, key_dim = regroup(factors(key[2]), [shared, dim])
    value_heads, value_dim_axis = regroup(factors(value[2]), [shared, value_dim])
    step.tie(query_heads, head_axis)
    step.tie(key_heads, past_key[1])
    step.tie(value_heads, past_key[1])
    step.tie(query_dim, past_key[3])
    step.tie(key_dim, past_key[3])
    step.tie(value_dim_axis, past_value[3])
    for table in (step.optional("cos"), step.optional("sin")):
        if table is not None:
            step.freeze(table[0], "its positions are positions in time")
            step.tie(past_key[3], concatenation([table[1], table[1]]))
    step.role(past_key[1], "attn_heads")
    step.role(copies, "attn_heads")
    step.role(past_key[3], "qk_dim")
    step.role(past_value[3], "v_dim")
    keys, values = shape_of(step.value[1]), shape_of(step.value[2])
    caches: list[Label] = [
        [past_key[0], past_key[1], leaf(keys[2]), past_key[3]],
        [past_value[0], past_value[1], leaf(values[2]), past_value[3]],
    ]
    out = [query[0], query[1], product([head_axis, past_value[3]])]
    return (out, *caches)
