"""Convolution and its transpose: channels are axes, space is frozen (positions relate to their neighbours)."""

from __future__ import annotations

import torch

from compile_sparse.compiler.axes.algebra import Axis, factors, find, product, regroup
from compile_sparse.compiler.axes.analysis_state import Label
from compile_sparse.compiler.axes.rule_context import RuleContext
from compile_sparse.compiler.axes.rules.registry import Labels, rule
from compile_sparse.compiler.axes.rules.spatial import freeze_space, output_space
from compile_sparse.compiler.ir.gemms import CONVOLUTIONS, gemm_of

__all__: list[str] = []


@rule(*(name.removeprefix("aten::") for name in CONVOLUTIONS))
def convolution(step: RuleContext) -> Labels | None:
    """``y[n, o, ...] = sum_{i, k} x[n, i, ...] W[o, i, k]``; transposed, the weight is ``W[i, o, k]``.

    With ``groups``, channels are ``groups * rest`` on both sides and only the rest is summed over: a whole group may go, or the
    same rest of every group. Depthwise, the rest is 1 and nothing is summed over channels.
    """
    source, weight, groups = step.label("input"), step.label("weight"), step.arguments["groups"]
    gemm = gemm_of(step.node)
    if gemm is None or len(source) != len(weight) or not isinstance(step.value, torch.Tensor):
        return None
    freeze_space(step, [*weight[2:], *source[2:]], "a convolution relates neighbouring positions")
    outputs = _transposed(step, source, weight, groups) if gemm.is_transposed else _plain(step, source, weight, groups)
    if outputs is None:
        return None
    step.role(outputs, "conv_out")
    step.produce(step.arguments["weight"], outputs)
    bias = step.optional("bias")
    if bias is not None:
        step.tie(outputs, bias[0])
    return [source[0], outputs, *output_space(step, step.value, 2, "it counts places in the output of a convolution")]


def _plain(step: RuleContext, source: Label, weight: Label, groups: int) -> Axis | None:
    """``W: [groups * out, in, ...]``, input channels ``groups * in``."""
    if groups == 1:
        _summed(step, step.tie(source[1], weight[1]))
        return weight[0]
    found = _grouped(source[1], groups), _grouped(weight[0], groups)
    if found[0] is None or found[1] is None:
        return None
    (group, inner), (group_out, _) = found[0], found[1]
    step.tie(group, group_out)
    step.role(group, "conv_groups")
    _summed(step, step.tie(inner, weight[1]))
    return weight[0]


def _transposed(step: RuleContext, source: Label, weight: Label, groups: int) -> Axis | None:
    """``W: [groups * in, out, ...]``, input channels ``groups * in``, output channels ``groups * out``."""
    step.tie(source[1], weight[0])
    if groups == 1:
        _summed(step, source[1])
        return weight[1]
    found = _grouped(source[1], groups)
    if found is None:
        return None
    group, inner = found
    step.role(group, "conv_groups")
    _summed(step, inner)
    return product([group, weight[1]])


def _grouped(channels: Axis, groups: int) -> list[Axis] | None:
    size = find(channels).size
    return regroup(factors(channels), [groups, size // groups]) if isinstance(size, int) else None


def _summed(step: RuleContext, axis: Axis) -> None:
    if find(axis).size != 1:
        step.contract(step.arguments["input"], 1, step.arguments["weight"], axis)
        step.role(axis, "conv_in")
