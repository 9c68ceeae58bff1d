"""Shapes only: reshape, permute, expand, cat, slice, split and the operators that depend on positions."""

from __future__ import annotations

from typing import Any

from compile_sparse.compiler.axes.algebra import (
    Axis,
    Conflict,
    concatenation,
    factors,
    find,
    is_dynamic,
    leaf,
    one,
    product,
    regroup,
    segment,
)
from compile_sparse.compiler.axes.analysis_state import Label
from compile_sparse.compiler.axes.rule_context import RuleContext
from compile_sparse.compiler.axes.rules.registry import Labels, rule
from compile_sparse.compiler.ir.sizes import Size, is_static, quotient, same_size, shape_of, size_of, total

__all__: list[str] = []


@rule("view", "reshape", "_unsafe_view", "flatten", "unflatten")
def reshape(step: RuleContext) -> Labels | None:
    """Match old and new dimensions in minimal runs of equal size; each run is a product, regrouped.

    A run that cannot be aligned freezes only its own dimensions.
    """
    source, new = step.label(step.first), shape_of(step.value)
    old = [find(axis).size for axis in source]
    if 0 in old or 0 in new:
        return None
    step.pass_domain(step.first)
    out: Label = []
    i = j = 0
    while i < len(old) or j < len(new):
        if i < len(old) and old[i] == 1:
            i += 1
        elif j < len(new) and new[j] == 1:
            out.append(one())
            j += 1
        else:
            end_i, end_j = _run(old, new, i, j)
            out += _regrouped(step, source[i:end_i], new[j:end_j])
            i, j = end_i, end_j
    return out


def _run(old: list[Size], new: list[Size], i: int, j: int) -> tuple[int, int]:
    """Ends of the shortest runs from ``i`` and ``j`` with equal products."""
    if i >= len(old) or j >= len(new):
        raise Conflict("a reshape changes the number of elements")
    left, right = old[i], new[j]
    i, j = i + 1, j + 1
    while not same_size(left, right):
        numbers = isinstance(left, int) and isinstance(right, int)
        grow_left = left < right if numbers else quotient(right, left) is not None
        if i < len(old) and (grow_left or j >= len(new)):
            left = total([left, old[i]])
            i += 1
        elif j < len(new):
            right = total([right, new[j]])
            j += 1
        else:
            raise Conflict("a reshape changes the number of elements")
    return i, j


def _regrouped(step: RuleContext, axes: Label, sizes: list[Size]) -> Label:
    if len(sizes) == 1:
        return [product(axes)]
    try:
        return regroup([factor for axis in axes for factor in factors(axis)], sizes)
    except Conflict as conflict:
        reason = f"op '{step.name}' regroups dimensions: {conflict}"
        for axis in axes:
            step.freeze(axis, reason)
        return [step.frozen(size, reason) for size in sizes]


@rule("expand")
def expand(step: RuleContext) -> Labels:
    """Stretched dimensions are new axes: copies that may be thinned without touching the source."""
    source = step.label(step.first)
    padded = [one()] * (step.value.ndim - len(source)) + source
    out: Label = []
    for axis, size in zip(padded, shape_of(step.value), strict=True):
        if same_size(find(axis).size, size):
            out.append(axis)
        else:
            out.append(leaf(size))
            if is_static(size):  # a dynamic one may turn out to be heads folded into the batch
                step.role(out[-1], "broadcast")
    step.pass_domain(step.first)
    return out


@rule("unsqueeze")
def unsqueeze(step: RuleContext) -> Labels:
    """A new dimension of size 1."""
    out = step.label(step.first)
    out.insert(step.arguments["dim"] % step.value.ndim, one())
    step.pass_domain(step.first)
    return out


@rule("squeeze")
def squeeze(step: RuleContext) -> Labels:
    """Dimensions of size 1 go."""
    source = step.label(step.first)
    asked = step.arguments.get("dim")
    dims = (
        range(len(source))
        if asked is None
        else [d % len(source) for d in ([asked] if isinstance(asked, int) else asked)]
    )
    step.pass_domain(step.first)
    return [axis for place, axis in enumerate(source) if not (place in dims and find(axis).size == 1)]


@rule("transpose")
def transpose(step: RuleContext) -> Labels:
    """Two dimensions change places."""
    out = step.label(step.first)
    a, b = step.arguments["dim0"] % len(out), step.arguments["dim1"] % len(out)
    out[a], out[b] = out[b], out[a]
    step.pass_domain(step.first)
    return out


@rule("t", "numpy_T")
def reverse_dimensions(step: RuleContext) -> Labels:
    """All dimensions in reverse."""
    step.pass_domain(step.first)
    return step.label(step.first)[::-1]


@rule("permute")
def permute(step: RuleContext) -> Labels:
    """Dimensions in another order."""
    source = step.label(step.first)
    step.pass_domain(step.first)
    return [source[dim] for dim in step.arguments["dims"]]


@rule("cat", "concat")
def cat(step: RuleContext) -> Labels:
    """Concatenation: a sum along ``dim``, ties along every other dimension."""
    # Legacy empty tensors of shape [0] may be mixed in; they add nothing.
    labels = [step.label(node) for node in step.arguments["tensors"] if node.meta["val"].ndim == step.value.ndim]
    dim = step.arguments.get("dim", 0) % step.value.ndim
    sizes = shape_of(step.value)
    out: Label = []
    for place, size in enumerate(sizes):
        meeting = [label[place] for label in labels]
        if place == dim:
            if all(is_static(find(axis).size) for axis in meeting):
                out.append(concatenation([axis for axis in meeting if find(axis).size != 0]))
            else:  # a growing cache: the pieces are positions in time, never pruned
                for axis in meeting:
                    if not is_dynamic(axis):
                        step.freeze(axis, "it is concatenated with a dynamic dimension")
                out.append(leaf(size))
        else:
            out.append(step.broadcast([[axis] for axis in meeting], [size])[0])
    return out


@rule("stack")
def stack(step: RuleContext) -> Labels:
    """Equal shapes side by side in a new dimension: a list of operands, none of which may go."""
    labels = [step.label(node) for node in step.arguments["tensors"]]
    dim = step.arguments.get("dim", 0) % step.value.ndim
    sizes = shape_of(step.value)
    out = step.broadcast(labels, sizes[:dim] + sizes[dim + 1 :])
    out.insert(dim, step.frozen(len(labels), "each of its positions is computed on its own"))
    return out


@rule("slice")
def slice_(step: RuleContext) -> Labels | None:
    """A run of positions is a part of a sum; a stride is the outer axis of ``outer * step``."""
    out = step.label(step.first)
    dim = step.arguments.get("dim", 0) % len(out)
    size, new = find(out[dim]).size, size_of(step.value.shape[dim])
    start, end, stride = step.arguments.get("start"), step.arguments.get("end"), step.arguments.get("step", 1)
    step.pass_domain(step.first)
    start = 0 if start is None else start
    if not isinstance(size, int) or not isinstance(start, int) or not isinstance(end, int | None):
        if same_size(size, new):
            return out
        if isinstance(size, int):
            step.freeze(out[dim], "a slice of it depends on the size of an input")
        out[dim] = step.frozen(new, "a slice of it depends on the size of an input")
        return out
    start = max(start + size, 0) if start < 0 else min(start, size)
    end = size if end is None else max(end + size, 0) if end < 0 else min(end, size)
    if (start, end, stride) == (0, size, 1):
        return out
    if stride != 1:
        if size % stride or start >= stride or end != size:
            reason = "a strided slice reads fixed positions of it"
            step.freeze(out[dim], reason)
            out[dim] = step.frozen(new, reason)
            return out
        out[dim], inner = regroup(factors(out[dim]), [size // stride, stride])
        step.freeze(inner, "a strided slice reads fixed positions of it")
        return out
    # An empty slice has nothing to couple (a fully rotary head has no part that is not rotated).
    out[dim] = _part(step, out[dim], start, end) if start < end else leaf(0)
    return out


def _part(step: RuleContext, axis: Axis, start: int, stop: int) -> Axis:
    """Positions ``start .. stop - 1``; an axis that cannot be cut there (windows of a padded image) freezes alone."""
    try:
        return segment(axis, start, stop)
    except Conflict as conflict:
        reason = f"op '{step.name}' takes a part of it: {conflict}"
        step.freeze(axis, reason)
        return step.frozen(stop - start, reason)


@rule("narrow")
def narrow(step: RuleContext) -> Labels | None:
    """``length`` positions from ``start``."""
    out = step.label(step.first)
    dim = step.arguments["dim"] % len(out)
    start, length = step.arguments["start"], step.arguments["length"]
    size = find(out[dim]).size
    if not (isinstance(size, int) and isinstance(start, int) and isinstance(length, int)) or length == 0:
        return None
    start = start + size if start < 0 else start
    step.pass_domain(step.first)
    out[dim] = _part(step, out[dim], start, start + length)
    return out


@rule("select")
def select(step: RuleContext) -> Labels:
    """One fixed position: that dimension may not change."""
    out = step.label(step.first)
    dim = step.arguments["dim"] % len(out)
    _freeze_static(step, out[dim], "a fixed position of it is selected")
    del out[dim]
    step.pass_domain(step.first)
    return out


@rule("unbind")
def unbind(step: RuleContext) -> Labels:
    """Every position on its own: that dimension may not change."""
    source = step.label(step.first)
    dim = step.arguments.get("dim", 0) % len(source)
    _freeze_static(step, source[dim], "each of its positions is read on its own")
    del source[dim]
    return tuple(list(source) for _ in step.value)


@rule("split", "split_with_sizes", "chunk")
def split(step: RuleContext) -> Labels | None:
    """Consecutive parts of a sum."""
    source = step.label(step.first)
    dim = step.arguments.get("dim", 0) % len(source)
    outputs: list[Label] = []
    offset = 0
    for part in step.value:
        size = size_of(part.shape[dim])
        if not isinstance(size, int) or size == 0:
            return None
        label = list(source)
        label[dim] = _part(step, source[dim], offset, offset + size)
        offset += size
        outputs.append(label)
    return tuple(outputs)


@rule("repeat_interleave")
def repeat_interleave(step: RuleContext) -> Labels | None:
    """Each position ``repeats`` times in a row: ``x * copies``."""
    repeats, dim = step.arguments.get("repeats"), step.arguments.get("dim")
    if not isinstance(repeats, int) or not isinstance(dim, int):
        return None
    out = step.label(step.first)
    copies = leaf(repeats)
    step.role(copies, "broadcast")
    out[dim % len(out)] = product([out[dim % len(out)], copies])
    step.pass_domain(step.first)
    return out


@rule("repeat")
def repeat(step: RuleContext) -> Labels:
    """The whole tensor again and again: ``copies * x``, and copies may be thinned without touching the source."""
    source = step.label(step.first)
    padded = [one()] * (step.value.ndim - len(source)) + source
    out: Label = []
    for axis, count, size in zip(padded, step.arguments["repeats"], shape_of(step.value), strict=True):
        out.append(axis if count == 1 else _copies(step, axis, count, size))
    step.pass_domain(step.first)
    return out


def _copies(step: RuleContext, axis: Axis, count: Any, size: Size) -> Axis:
    if isinstance(count, int) and count > 0:
        copies = leaf(count)
        step.role(copies, "broadcast")
        return product([copies, axis])
    times = quotient(size, find(axis).size)
    if not isinstance(count, int) and times is not None:
        return product([leaf(times), axis])
    if find(axis).size != 1:
        _freeze_static(step, axis, "it is repeated a dynamic number of times")
    return leaf(size)


@rule("tril", "triu", "flip", "roll", "constant_pad_nd", "pad", "diff")
def positional(step: RuleContext) -> Labels:
    """What happens depends on the position, so no position may go. Dimensions not named by the operator are unaffected."""
    source = step.label(step.first)
    touched = _positional_dimensions(step, len(source))
    reason = f"op '{step.name}' depends on positions"
    out: Label = []
    for place, (axis, size) in enumerate(zip(source, shape_of(step.value), strict=True)):
        if place in touched:
            _freeze_static(step, axis, reason)
            out.append(axis if same_size(find(axis).size, size) else step.frozen(size, reason))
        else:
            out.append(axis)
    return out


def _positional_dimensions(step: RuleContext, rank: int) -> set[int]:
    every = set(range(rank))
    if step.name in ("tril", "triu"):
        return {rank - 2, rank - 1}
    if step.name in ("flip", "roll"):
        return {dim % rank for dim in step.arguments["dims"]} or every
    if step.name in ("constant_pad_nd", "pad"):
        amounts = step.arguments["pad"]  # pairs, last dimension first; nothing happens to a dimension padded by 0
        return {rank - 1 - place // 2 for place, amount in enumerate(amounts) if amount != 0}
    return every


def _freeze_static(step: RuleContext, axis: Axis, reason: str) -> None:
    if not is_dynamic(axis):
        step.freeze(axis, reason)
