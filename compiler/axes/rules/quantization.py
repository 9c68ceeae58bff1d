"""The ``compile_sparse::`` quantize and dequantize operators."""

from __future__ import annotations

from compile_sparse.compiler.axes.algebra import factors, find, regroup
from compile_sparse.compiler.axes.rule_context import RuleContext
from compile_sparse.compiler.axes.rules.registry import Labels, rule

__all__: list[str] = []


@rule("compile_sparse::dequantize_weight")
def dequantize_weight(step: RuleContext) -> Labels | None:
    """``q * scale``: output channels share the scale's first axis; whole groups may go, positions within a group may not."""
    q, scale = step.label("q"), step.label("scale")
    axis, group = step.arguments["axis"], step.arguments["group_size"]
    step.tie(scale[0], q[1 - axis])
    if step.arguments["zero_point"] is not None:
        for mine, other in zip(step.label("zero_point"), scale, strict=True):
            step.tie(mine, other)
    if group:
        size = find(q[axis]).size
        reason = "quantization groups have a fixed size"
        if isinstance(size, int) and size % group == 0:
            groups, inner = regroup(factors(q[axis]), [size // group, group])
            step.tie(scale[1], groups)
            step.freeze(inner, reason)
        else:
            step.freeze(q[axis], reason)
            step.freeze(scale[1], reason)
    return q


@rule("compile_sparse::quantize_dynamic")
def quantize_dynamic(step: RuleContext) -> Labels:
    """Codes with one scale for the whole tensor: its range is taken over the kept positions."""
    source = step.label("x")
    for axis in source:
        step.role(axis, "reduce_range")
    return (source, [], [])


@rule("compile_sparse::dequantize_activation")
def dequantize_activation(step: RuleContext) -> Labels:
    """Element by element."""
    return step.label("codes")


@rule("compile_sparse::fake_quantize")
def fake_quantize(step: RuleContext) -> Labels:
    """Run-time scales are taken over the kept positions of a row; groups within a row may not lose some of theirs."""
    source = step.label("x")
    name = step.arguments["format"]
    if name.endswith("-group") or name == "fp4":
        step.freeze(source[-1], "quantization groups have a fixed size")
    elif not name.endswith("-static"):
        step.role(source[-1], "reduce_range")
    return source
