"""Operators on the space behind batch and channels: pooling, resampling, and moves between channels and space.

Space is frozen: a position means nothing without its neighbours. Batch and channels pass through.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from compile_sparse.compiler.axes.algebra import Axis, factors, find, is_dynamic, product, regroup
from compile_sparse.compiler.axes.analysis_state import Label
from compile_sparse.compiler.axes.rule_context import RuleContext
from compile_sparse.compiler.axes.rules.registry import Labels, rule
from compile_sparse.compiler.ir.sizes import shape_of

__all__ = ["freeze_space", "output_space"]

_POOLS = ("max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool")
_INNER = "the order of positions inside a patch is fixed"
_PLACES = "it counts places in space"


def freeze_space(step: RuleContext, axes: Iterable[Axis], reason: str) -> None:
    """Static dimensions of space may not change."""
    for axis in axes:
        if not is_dynamic(axis):
            step.freeze(axis, reason)
            step.role(axis, "space")


def output_space(step: RuleContext, value: torch.Tensor, lead: int, reason: str) -> Label:
    """Frozen axes for the dimensions after the first ``lead``."""
    out = [step.frozen(size, reason) for size in shape_of(value)[lead:]]
    for axis in out:
        step.role(axis, "space")
    return out


def _spatial(step: RuleContext, rank: int, what: str) -> Labels | None:
    """The last ``rank`` dimensions are replaced, what stands before them passes; several outputs are alike."""
    source = step.label(step.first)
    lead = len(source) - rank
    if lead not in (1, 2):  # channels, with or without a batch
        return None
    freeze_space(step, source[lead:], f"{what} relates neighbouring positions")
    several = not isinstance(step.value, torch.Tensor)
    outputs = [
        source[:lead] + output_space(step, value, lead, f"it counts places in the output of {what}")
        for value in (step.value if several else [step.value])
    ]
    return tuple(outputs) if several else outputs[0]


@rule(
    *(f"{pool}{rank}d" for pool in _POOLS for rank in (1, 2, 3)),
    *(f"max_pool{rank}d_with_indices" for rank in (2, 3)),
    *(f"_adaptive_avg_pool{rank}d" for rank in (2, 3)),
)
def pool(step: RuleContext) -> Labels | None:
    """Maximum or mean over patches of space; positions of maxima are positions in space."""
    return _spatial(step, int(step.name.partition("d_with")[0].rstrip("d")[-1]), "pooling")


@rule(
    *(f"upsample_{mode}{rank}d" for mode in ("nearest", "_nearest_exact") for rank in (1, 2, 3)),
    *(f"_upsample_nearest_exact{rank}d" for rank in (1, 2, 3)),
    "upsample_linear1d",
    "upsample_bilinear2d",
    "_upsample_bilinear2d_aa",
    "upsample_bicubic2d",
    "_upsample_bicubic2d_aa",
    "upsample_trilinear3d",
)
def resample(step: RuleContext) -> Labels | None:
    """Interpolation over space."""
    return _spatial(step, int(step.name.removesuffix("_aa")[-2]), "interpolation")


@rule("im2col")
def im2col(step: RuleContext) -> Labels | None:
    """``[n, c, h, w] -> [n, c * patch, windows]``."""
    source = step.label(step.first)
    if len(source) != 4:
        return None
    freeze_space(step, source[2:], "unfolding relates neighbouring positions")
    height, width = step.arguments["kernel_size"]
    patch = step.frozen(height * width, _INNER)
    return [source[0], product([source[1], patch]), *output_space(step, step.value, 2, "it counts windows")]


@rule("col2im")
def col2im(step: RuleContext) -> Labels | None:
    """``[n, c * patch, windows] -> [n, c, h, w]``, overlaps added."""
    source = step.label(step.first)
    if len(source) != 3:
        return None
    height, width = step.arguments["kernel_size"]
    channels = _outer_of(step, source[1], height * width)
    freeze_space(step, source[2:], "folding relates neighbouring positions")
    return None if channels is None else [source[0], channels, *output_space(step, step.value, 2, _PLACES)]


@rule("pixel_shuffle")
def pixel_shuffle(step: RuleContext) -> Labels | None:
    """``[..., c * r * r, h, w] -> [..., c, h * r, w * r]``."""
    source = step.label(step.first)
    channels = _outer_of(step, source[-3], step.arguments["upscale_factor"] ** 2)
    freeze_space(step, source[-2:], "pixel shuffle interleaves space with channels")
    lead = len(source) - 2
    return None if channels is None else [*source[:-3], channels, *output_space(step, step.value, lead, _PLACES)]


@rule("pixel_unshuffle")
def pixel_unshuffle(step: RuleContext) -> Labels:
    """``[..., c, h * r, w * r] -> [..., c * r * r, h, w]``."""
    source = step.label(step.first)
    freeze_space(step, source[-2:], "pixel unshuffle moves space into channels")
    inner = step.frozen(step.arguments["downscale_factor"] ** 2, _INNER)
    lead = len(source) - 2
    return [*source[:-3], product([source[-3], inner]), *output_space(step, step.value, lead, _PLACES)]


def _outer_of(step: RuleContext, axis: Axis, inner: int) -> Axis | None:
    size = find(axis).size
    if not isinstance(size, int):
        return None
    outer, rest = regroup(factors(axis), [size // inner, inner])
    step.freeze(rest, _INNER)
    return outer


@rule("channel_shuffle")
def channel_shuffle(step: RuleContext) -> Labels | None:
    """Channels ``groups * rest`` become ``rest * groups``."""
    source = step.label(step.first)
    size, groups = find(source[1]).size, step.arguments["groups"]
    if not isinstance(size, int):
        return None
    outer, rest = regroup(factors(source[1]), [groups, size // groups])
    return [source[0], product([rest, outer]), *source[2:]]


@rule("unfold")
def unfold(step: RuleContext) -> Labels:
    """Windows along one dimension, which is frozen; their positions are a new last dimension."""
    out = step.label(step.first)
    dim = step.arguments["dimension"] % len(out)
    freeze_space(step, [out[dim]], "op 'unfold' relates neighbouring positions")
    sizes = shape_of(step.value)
    out[dim] = step.frozen(sizes[dim], "it counts windows")
    return [*out, step.frozen(sizes[-1], _INNER)]
