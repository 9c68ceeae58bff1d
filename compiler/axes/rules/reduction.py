"""Reductions, scans and normalisations.

Pruning a reduced axis is defined as reducing over the kept positions: a mean divides by the kept count, a softmax normalises
over kept logits. That is what the pruned graph computes by itself, and what the masked oracle computes on the dense one.
"""

from __future__ import annotations

import torch

from compile_sparse.compiler.axes.algebra import factors, find, is_dynamic, leaf, one, regroup
from compile_sparse.compiler.axes.analysis_state import Label
from compile_sparse.compiler.axes.rule_context import RuleContext
from compile_sparse.compiler.axes.rules import pointwise
from compile_sparse.compiler.axes.rules.registry import Labels, rule
from compile_sparse.compiler.ir.sizes import shape_of

__all__: list[str] = []


@rule("mean", "sum", "amax", "amin", "var", "std", "any", "all", "prod", "logsumexp", "linalg_vector_norm", "norm")
def reduce(step: RuleContext) -> Labels:
    """The reduced dimensions go, or become size 1 with ``keepdim``."""
    source = step.label(step.first)
    asked = step.arguments.get("dim")
    dims = (
        list(range(len(source))) if asked is None or asked == [] else [asked] if isinstance(asked, int) else list(asked)
    )
    return _reduced(step, source, [dim % len(source) for dim in dims] if source else [])


def _reduced(step: RuleContext, source: Label, dims: list[int]) -> Label:
    for dim in dims:
        step.role(source[dim], f"reduce_{step.name}")
    if step.arguments.get("keepdim", False):
        return [one() if place in dims else axis for place, axis in enumerate(source)]
    return [axis for place, axis in enumerate(source) if place not in dims]


@rule("max", "min")
def extremum(step: RuleContext) -> Labels | None:
    """Three operators in one name: pointwise with ``other``, values and positions with ``dim``, or over everything."""
    if "other" in step.arguments:
        return pointwise.labels(step)
    source = step.label(step.first)
    if "dim" not in step.arguments:
        return _reduced(step, source, list(range(len(source))))
    dim = step.arguments["dim"] % len(source)
    step.set_domain(source[dim], output=1)
    out = _reduced(step, source, [dim])
    return (out, list(out))


@rule("argmax", "argmin")
def position(step: RuleContext) -> Labels | None:
    """Positions along the reduced axis: its values index that axis."""
    source, dim = step.label(step.first), step.arguments.get("dim")
    if not isinstance(dim, int):
        return None
    step.set_domain(source[dim % len(source)])
    return _reduced(step, source, [dim % len(source)])


@rule("softmax", "_softmax", "log_softmax", "_log_softmax", "_safe_softmax")
def softmax(step: RuleContext) -> Labels:
    """Normalised over ``dim``."""
    out = step.label(step.first)
    step.role(out[step.arguments["dim"] % len(out)], "softmax")
    return out


@rule("cumsum", "cumprod", "logcumsumexp")
def scan(step: RuleContext) -> Labels:
    """Running sums or products over the kept positions."""
    out = step.label(step.first)
    step.role(out[step.arguments["dim"] % len(out)], "scan")
    return out


@rule("layer_norm", "rms_norm", "native_layer_norm")
def norm(step: RuleContext) -> Labels:
    """Statistics over the last dimensions, then a scale and shift per position of them."""
    source = step.label("input")
    count = len(step.arguments["normalized_shape"])
    for name in ("weight", "bias"):
        own = step.optional(name)
        if own is not None:
            for parameter, axis in zip(own, source[-count:], strict=True):
                step.tie(parameter, axis)
    for axis in source[-count:]:
        step.role(axis, "norm")
    if step.name == "native_layer_norm":
        statistics = source[:-count] + [one() for _ in range(count)]
        return (source, statistics, list(statistics))
    return source


@rule("group_norm")
def group_norm(step: RuleContext) -> Labels | None:
    """Channels are ``groups * rest``; statistics over the rest and space. A whole group may go, or the same rest in each."""
    source, groups = step.label("input"), step.arguments["num_groups"]
    channels = find(source[1]).size
    if not isinstance(channels, int) or channels % groups:
        return None
    _, inner = regroup(factors(source[1]), [groups, channels // groups])
    for name in ("weight", "bias"):
        own = step.optional(name)
        if own is not None:
            step.tie(own[0], source[1])
    step.role(inner, "norm")
    step.role(source[1], "conv_out")
    for axis in source[2:]:
        if not is_dynamic(axis):
            step.freeze(axis, "group norm averages over space")
    return source


@rule("batch_norm", "_native_batch_norm_legit_no_training")
def batch_norm(step: RuleContext) -> Labels | None:
    """Per channel with stored statistics (evaluation)."""
    if step.arguments.get("training"):
        return None
    source = step.label("input")
    for name in ("weight", "bias", "running_mean", "running_var"):
        own = step.optional(name)
        if own is not None:
            step.tie(own[0], source[1])
    if isinstance(step.value, torch.Tensor):
        return source
    return (source, *([leaf(size) for size in shape_of(saved)] for saved in step.value[1:]))


@rule("instance_norm")
def instance_norm(step: RuleContext) -> Labels | None:
    """Per sample and channel, with statistics over space or stored ones."""
    if step.arguments["use_input_stats"] and step.arguments["running_mean"] is not None:  # training: updates them
        return None
    source = step.label("input")
    for name in ("weight", "bias", "running_mean", "running_var"):
        own = step.optional(name)
        if own is not None:
            step.tie(own[0], source[1])
    step.role(source[1], "conv_out")
    for axis in source[2:]:
        if not is_dynamic(axis):
            step.freeze(axis, "instance norm averages over space")
    return source
