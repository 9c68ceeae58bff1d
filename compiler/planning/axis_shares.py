"""The groups of a program in numbers, for plans: how many there are, and how much of the model goes through them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from compile_sparse.compiler.axes.algebra import Axis, find, leaves, segments
from compile_sparse.compiler.axes.analysis import Analysis
from compile_sparse.compiler.axes.groups import Group
from compile_sparse.compiler.ir.storage import bytes_by_tensor
from compile_sparse.compiler.planning.token_cost import TokenCost

__all__ = ["group_rows"]


def group_rows(analysis: Analysis, cost: TokenCost) -> list[dict[str, Any]]:
    """One row per kind, size, unit and reason for freezing, in order of first weight.

    A weight goes through a group when one of its dimensions is made of the group's axis; of a fused weight only the segments
    that are. A matrix has two dimensions, so shares of different rows overlap: they don't add up to one.

    Returns:
        Plain data: ``kind``, ``count``, ``size``, ``unit`` (``query`` for query heads within a key-value head, else
        ``position``), ``frozen`` (the reason with its place in the model's code, or None), ``parameters``, ``bytes`` and
        ``flops`` (per token or sample) that go through the groups of the row, and each as a share of the model
        (``parameter_share``, ``byte_share``, ``flop_share``). Linear in the number of weight dimensions.
    """
    merged: dict[tuple[str, int, str, str], list[Group]] = {}
    for group in analysis.groups:
        if group.size > 1:
            reason = group.frozen[0].reason if group.frozen else ""
            merged.setdefault((group.kind, group.size, _unit(group), reason), []).append(group)
    program = analysis.program
    elements = {
        binding.tensor: program.weights.elements(binding.tensor)
        for binding in program.bindings.values()
        if binding.kind == "parameter"
    }
    totals = {"parameter": elements, "byte": bytes_by_tensor(program), "flop": cost.flops}
    labels = {binding.tensor: analysis.labels[node] for node, binding in program.bindings.items()}
    rows = []
    for (kind, size, unit, _), groups in merged.items():
        row: dict[str, Any] = {
            "kind": kind,
            "count": len(groups),
            "size": size,
            "unit": unit,
            "frozen": _why(groups[0]),
        }
        covered = _covered(groups, labels)
        for name, amounts in totals.items():
            through = sum(share * amounts.get(tensor, 0) for tensor, share in covered.items())
            row["bytes" if name == "byte" else f"{name}s"] = round(through)
            row[f"{name}_share"] = through / max(1, sum(amounts.values()))
        rows.append(row)
    return rows


def _unit(group: Group) -> str:
    return "query" if group.kind == "heads" and "broadcast" in group.roles else "position"


def _why(group: Group) -> str | None:
    """The first cause, with the model's line when it is known and the graph's node when not."""
    if not group.frozen:
        return None
    cause = group.frozen[0]
    return f"{cause.reason} ({cause.source or cause.node})"


def _covered(groups: Sequence[Group], labels: Mapping[str, Any]) -> dict[str, float]:
    """Tensor -> share of its elements in a dimension's segment that one of the groups is in."""
    within: dict[tuple[str, int], set[Axis]] = {}
    for group in groups:
        for place in group.members:
            within.setdefault(place, set()).add(find(group.leaf))
    outside: dict[str, float] = {}
    for (tensor, dim), found in within.items():
        parts = segments(labels[tensor][dim])
        sizes = [int(find(part).size) for part in parts]
        inside = sum(size for part, size in zip(parts, sizes, strict=True) if not found.isdisjoint(leaves(part)))
        outside[tensor] = outside.get(tensor, 1.0) * (1.0 - inside / math.fsum(sizes))
    return {tensor: 1.0 - share for tensor, share in outside.items()}
