"""Which groups of a kind may be pruned, and how many positions each can keep."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from compile_sparse.compiler.axes.algebra import Axis, factors, find, leaves, segments
from compile_sparse.compiler.axes.analysis import Analysis
from compile_sparse.compiler.axes.groups import Group, Kind
from compile_sparse.compiler.diagnostics import Diagnostic
from compile_sparse.compiler.extension.pass_contract import PassContext

__all__ = ["Prunable", "eligible_groups", "nearest_size", "prunable_groups"]

FAR = 0.125
"""A later quantization's group size is kept to when that moves a kept size by no more than this share of the dense size."""


@dataclass(frozen=True)
class Prunable:
    """A group, and the sizes it may get.

    Attributes:
        group: of one analysis.
        step: kept sizes are multiples of this many positions.
        kept: the multiple of ``step`` nearest to what was asked for.
        parameters: stored elements that go with one position.
    """

    group: Group
    step: int
    kept: int
    parameters: float


def eligible_groups(
    analysis: Analysis, kind: Kind, wanted: Callable[[Group], bool] = lambda group: True
) -> tuple[list[Group], list[Diagnostic]]:
    """Free groups of one kind, and the reasons for the others.

    Two axes that form a grid (experts times channels of one tensor are not one; query heads within key heads are) are never
    both taken: removing a share of each would remove more than was asked for.
    """
    diagnostics: list[Diagnostic] = []
    groups: list[Group] = []
    for group in analysis.groups:
        if group.kind != kind or not wanted(group):
            continue
        if group.frozen:
            diagnostics.append(Diagnostic(str(group.anchor), "CS2104", f"The axis may not change: {group.frozen[0]}."))
        elif group.size > 1:
            groups.append(group)
    taken: set[Axis] = set()
    for group in groups:
        if _crosses(analysis, group, taken):
            why = "It forms a grid with an axis already chosen; removing both would remove more than was asked for."
            diagnostics.append(Diagnostic(str(group.anchor), "CS2109", why))
        else:
            taken.add(group.leaf)
    return [group for group in groups if group.leaf in taken], diagnostics


def prunable_groups(
    analysis: Analysis, groups: Sequence[Group], fraction: float, context: PassContext
) -> tuple[list[Prunable], list[Diagnostic], list[str]]:
    """Sizes for every group; groups without an aligned size are left alone, with the arithmetic.

    Returns:
        What can be pruned, what cannot, and sentences about sizes that are not what was asked for.
    """
    # Tensor parallelism splits channels and heads: every GPU's part is aligned, and as many positions as any other's.
    gpus = context.settings.tensor_parallel
    alignment = context.target.alignment * gpus
    found: list[Prunable] = []
    diagnostics: list[Diagnostic] = []
    notes: dict[str, None] = {}
    for group in groups:
        inner = _inner_sizes(analysis, group)
        whole = _step(_outer_sizes(analysis, group), gpus)
        step = math.lcm(_step(inner, alignment), whole)
        kept = nearest_size(group.size, fraction, step)
        if kept is None:
            diagnostics.append(_unaligned(group, fraction, inner, step, context))
            continue
        wide = math.lcm(_step(inner, math.lcm(alignment, context.contraction_multiple * gpus)), whole)
        wider = nearest_size(group.size, fraction, wide)
        wanted = group.size * (1.0 - fraction)
        if wider is not None and abs(wider - wanted) <= max(FAR * group.size, abs(kept - wanted)):
            step, kept = wide, wider
        elif wide != step:
            notes[
                f"No multiple of {wide} near {wanted:g} of {group.size} positions: the later quantization's groups of "
                f"{context.contraction_multiple} do not divide what is kept, and the last one is padded."
            ] = None
        if abs(kept - wanted) >= min(1.0, 0.1 * group.size):
            notes[f"{wanted:g} of {group.size} positions were asked for; {kept} is the nearest multiple of {step}."] = (
                None
            )
        found.append(Prunable(group, step, kept, _parameters_per_position(analysis, group)))
    return found, diagnostics, list(notes)


def nearest_size(size: int, fraction: float, step: int) -> int | None:
    """Multiple of ``step`` nearest to ``size * (1 - fraction)``, below ``size``.

    Ties keep more. None when there is no multiple below ``size``, or the nearest is nothing at all.
    """
    nearest = int(size * (1.0 - fraction) / step + 0.5) * step
    return min(nearest, (size - 1) // step * step) or None


def _step(inner: Sequence[int], multiple: int) -> int:
    """Fewest positions that make every contraction size a multiple of ``multiple``."""
    return math.lcm(*(multiple // math.gcd(multiple, size) for size in inner))


def _inner_sizes(analysis: Analysis, group: Group) -> list[int]:
    """Elements of each contracted dimension that go with one position: heads bring their whole head size."""
    sizes: set[int] = set()
    for part in _contracted(analysis, group):
        size = find(part).size
        others = [factor for factor in factors(part) if group.leaf in leaves(factor)]
        own = find(others[0]).size if others else group.size
        if isinstance(size, int) and isinstance(own, int):
            sizes.add(size // own)
    return sorted(sizes) or [0]


def _outer_sizes(analysis: Analysis, group: Group) -> list[int]:
    """How many times the positions occur in each contracted dimension: query heads, once in every key-value head."""
    counts: set[int] = set()
    for part in _contracted(analysis, group):
        outer = list(itertools.takewhile(lambda factor: group.leaf not in leaves(factor), factors(part)))
        sizes = [size for factor in outer if isinstance(size := find(factor).size, int)]
        if len(sizes) == len(outer):
            counts.add(math.prod(sizes))
    return sorted(counts) or [1]


def _contracted(analysis: Analysis, group: Group) -> Iterator[Axis]:
    """Contracted dimensions the positions lie in, and of concatenations the parts."""
    for contact in group.consumers:
        axis = analysis.labels[contact.operand][contact.dim]
        if isinstance(axis, Axis):
            yield from (part for part in segments(axis) if group.leaf in leaves(part))


def _parameters_per_position(analysis: Analysis, group: Group) -> float:
    weights = analysis.program.weights
    return sum(weights.elements(tensor) for tensor, _ in group.members) / group.size


def _crosses(analysis: Analysis, group: Group, taken: set[Axis]) -> bool:
    """Whether some weight dimension is a product of this leaf and one already taken."""
    nodes = {binding.tensor: name for name, binding in analysis.program.bindings.items()}
    for tensor, dim in group.members:
        axis = analysis.labels[nodes[tensor]][dim]
        if not isinstance(axis, Axis):
            continue
        for part in segments(axis):
            found = set(leaves(part))
            if group.leaf in found and found & taken:
                return True
    return False


def _unaligned(group: Group, fraction: float, inner: Sequence[int], step: int, context: PassContext) -> Diagnostic:
    gpus = context.settings.tensor_parallel
    elements = f" ({inner[0]} elements each)" if inner[0] > 1 else ""
    wanted = f"{fraction:g} of {group.size} positions{elements} leaves {group.size * (1.0 - fraction):g}"
    if step > 1:
        split = f" on each of {gpus} GPUs" if gpus > 1 else ""
        wanted += f"; the target's alignment is {context.target.alignment}{split}, so sizes are multiples of {step}"
    if step < group.size:
        return Diagnostic(str(group.anchor), "CS2105", f"{wanted}; the nearest is 0.", "Remove less.")
    why = f"{wanted}, and no multiple of {step} is below {group.size}."
    hint = "Choose a target with a smaller alignment" + (", or fewer GPUs." if gpus > 1 else ".")
    return Diagnostic(str(group.anchor), "CS2105", why, hint)
