"""Convolution and pooling: channels are axes, space is frozen (positions relate to their neighbours)."""

from __future__ import annotations

import torch

from compile_sparse.compiler.axes.algebra import factors, find, is_dynamic, regroup
from compile_sparse.compiler.axes.rules.registry import Labels, rule
from compile_sparse.compiler.axes.sizes import shape_of
from compile_sparse.compiler.axes.step import Step

__all__: list[str] = []


@rule("convolution", "conv1d", "conv2d", "conv3d")
def convolution(step: Step) -> Labels | None:
    """``y[n, o, ...] = sum_{i, ...} x[n, i, ...] W[o, i, ...]``; with groups, channels are ``groups * rest`` on both sides."""
    source, weight, groups = step.label("input"), step.label("weight"), step.arguments["groups"]
    if step.arguments.get("transposed") or len(source) != len(weight):
        return None
    inputs, outputs = find(source[1]).size, find(weight[0]).size
    if not (isinstance(inputs, int) and isinstance(outputs, int)):
        return None
    for axis in [*weight[2:], *source[2:]]:
        if not is_dynamic(axis):
            step.freeze(axis, "a convolution relates neighbouring positions")
    if groups == 1:
        step.tie(source[1], weight[1])
        step.contract(step.arguments["input"], 1, step.arguments["weight"], weight[1])
        step.role(weight[1], "conv_in")
    else:
        group_in, inner_in = regroup(factors(source[1]), [groups, inputs // groups])
        group_out, _ = regroup(factors(weight[0]), [groups, outputs // groups])
        step.tie(group_in, group_out)
        step.tie(inner_in, weight[1])
        step.role(group_in, "conv_groups")
    step.role(weight[0], "conv_out")
    step.produce(step.arguments["weight"], weight[0])
    bias = step.optional("bias")
    if bias is not None:
        step.tie(weight[0], bias[0])
    return [source[0], weight[0], *(step.frozen(size, "convolution output space") for size in shape_of(step.value)[2:])]


@rule("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "_adaptive_avg_pool2d", "max_pool2d_with_indices")
def pool(step: Step) -> Labels | None:
    """Space only; batch and channels pass through."""
    source = step.label(step.first)
    if len(source) != 4:
        return None
    for axis in source[2:]:
        if not is_dynamic(axis):
            step.freeze(axis, "pooling relates neighbouring positions")
    several = not isinstance(step.value, torch.Tensor)
    outputs = [
        source[:2] + [step.frozen(size, "pooling output space") for size in shape_of(value)[2:]]
        for value in (step.value if several else [step.value])
    ]
    return tuple(outputs) if several else outputs[0]
