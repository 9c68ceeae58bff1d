"""The ``compile_sparse::`` quantize and dequantize operators.

Values that share a scale are a group: a channel, a run along the contraction, or a square block. A group is a fixed number of
positions counted from the start, so whole ones may go (those behind move up together with their scales), while removing some
positions of one would move values into the neighbour's scale. Where a single group covers the whole dimension there is no
neighbour, and any position may go.
"""

from __future__ import annotations

from compile_sparse.compiler.axes.algebra import (
    Axis,
    Conflict,
    concatenation,
    factors,
    find,
    one,
    regroup,
    split_sum,
)
from compile_sparse.compiler.axes.rule_context import RuleContext
from compile_sparse.compiler.axes.rules.registry import Labels, rule
from compile_sparse.compiler.ir.ops.quantization import FAKE_QUANTIZE_GROUPS, NVFP4_GROUP

__all__: list[str] = []


@rule("compile_sparse::dequantize_weight")
def dequantize_weight(step: RuleContext) -> Labels | None:
    """``(q - zero_point) * scale``: one scale per output channel, or per group of its weights along the contraction."""
    q, scale = step.label("q"), step.label("scale")
    axis, group = step.arguments["axis"], step.arguments["group_size"]
    step.tie(scale[0], q[1 - axis])
    if step.arguments["zero_point"] is not None:
        for mine, other in zip(step.label("zero_point"), scale, strict=True):
            step.tie(mine, other)
    if group:
        _whole_groups(step, q[axis], group, scale[1])
    return q


@rule("compile_sparse::dequantize_block")
def dequantize_block(step: RuleContext) -> Labels:
    """``q * scale[n // block, k // block]``: whole rows and whole columns of blocks may go."""
    q, scale = step.label("q"), step.label("scale")
    axis, block = step.arguments["axis"], step.arguments["block"]
    _whole_groups(step, q[1 - axis], block, scale[0])
    _whole_groups(step, q[axis], block, scale[1])
    return q


@rule("compile_sparse::dequantize_nvfp4")
def dequantize_nvfp4(step: RuleContext) -> Labels:
    """``e2m1(codes) * scale / global_scale``: a scale per output channel and group; the divisor has no axis."""
    codes, scale = step.label("codes"), step.label("scale")
    axis = step.arguments["axis"]
    step.tie(scale[0], codes[1 - axis])
    _whole_groups(step, codes[axis], NVFP4_GROUP, scale[1])
    return codes


@rule("compile_sparse::fake_quantize")
def fake_quantize(step: RuleContext) -> Labels:
    """Run-time scales are taken over the kept positions of a row; groups within a row may not lose some of theirs."""
    source = step.label("x")
    name = step.arguments["format"]
    group = FAKE_QUANTIZE_GROUPS.get(name, 0)
    if group and not _one_group(source[-1], group):
        _whole_groups(step, source[-1], group)
    elif not name.endswith("-static"):
        step.role(source[-1], "reduce_range")
    return source


def _one_group(axis: Axis, group: int) -> bool:
    size = find(axis).size
    return isinstance(size, int) and size <= group


def _whole_groups(step: RuleContext, axis: Axis, group: int, scales: Axis | None = None) -> None:
    """Let only whole groups of ``axis`` go, each with its position of ``scales``; a shorter group at the end stays."""
    if _one_group(axis, group):
        return
    try:
        groups, within = _grouped(axis, group)
    except Conflict:  # a group holds parts of several heads, say
        groups, within = None, [axis] if scales is None else [axis, scales]
    for part in within:
        step.freeze(part, "quantization groups have a fixed size")
    if groups is not None and scales is not None:
        step.tie(scales, groups)


def _grouped(axis: Axis, group: int) -> tuple[Axis, list[Axis]]:
    """The axis that counts groups, and what may not change: positions within a group, and the shorter group at the end."""
    size = find(axis).size
    if not isinstance(size, int):
        raise Conflict("a dynamic axis has no groups")
    count, rest = divmod(size, group)
    full, tail = split_sum(axis, count * group) if rest else (factors(axis), [])
    groups, within = regroup([concatenation(full)] if rest else full, [count, group])
    return concatenation([groups, one()]) if rest else groups, [within, *tail]
