"""Keep tables applied to axes: which positions of a dimension stay, and how large it becomes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import torch

from compile_sparse.compiler.axes.algebra import Axis, coords, factors, find, leaves
from compile_sparse.compiler.axes.analysis import Analysis
from compile_sparse.compiler.axes.analysis_state import Label
from compile_sparse.compiler.axes.groups import Anchor
from compile_sparse.compiler.errors import ModelError
from compile_sparse.compiler.ir.sizes import Size, total

__all__ = ["Keep", "KeepTables", "Selection"]

Keep: TypeAlias = torch.Tensor | tuple["Axis | Anchor", torch.Tensor]
"""``keep[p]`` bool over a leaf's positions; or ``(outer, keep[o, p])``: another choice for each position of an outer axis."""

KeepTables: TypeAlias = Mapping[Axis | Anchor, Keep]


class Selection:
    """Validated keep tables of one analysis.

    Raises:
        ModelError: CS2104 for a frozen axis; CS2106 for a table that does not fit its axis.
    """

    def __init__(self, analysis: Analysis, keep: KeepTables) -> None:
        self.analysis = analysis
        self._flat: dict[Axis, torch.Tensor] = {}
        self._nested: dict[Axis, tuple[Axis, torch.Tensor]] = {}
        self._masks: dict[Axis, torch.Tensor | None] = {}
        for key, table in keep.items():
            leaf = analysis.resolve(key)
            causes = analysis.frozen.get(leaf)
            if causes:
                raise ModelError(
                    "CS2104",
                    f"The axis {key} cannot be pruned.",
                    where=str(key),
                    why=f"{causes[0]}.",
                    hint="Leave it out, or change what freezes it.",
                )
            if isinstance(table, tuple):
                self._nested[leaf] = (analysis.resolve(table[0]), _checked(key, leaf, table[1]))
                self._check_nested(key, leaf)
            else:
                self._flat[leaf] = _checked(key, leaf, table)

    def _check_nested(self, key: Axis | Anchor, leaf: Axis) -> None:
        outer, table = self._nested[leaf]
        counts = table.sum(1)
        if table.ndim != 2 or table.shape[0] != outer.size or int(counts.min()) != int(counts.max()):
            raise _misfit(key, "each outer position must keep the same number, in a table [outer, inner]")
        stored = set(self.analysis.program.bindings)
        for name, label in self.analysis.carried():
            inside = [set(leaves(axis)) for axis in label]
            if leaf not in set().union(*inside):
                continue
            if outer not in set().union(*inside):
                raise _misfit(
                    key, f"value '{name}' has the axis without its outer axis, so the choice cannot depend on it"
                )
            if name in stored and any(leaf in own and outer not in own for own in inside):
                raise _misfit(key, f"weight '{name}' has the two axes in different dimensions")

    @property
    def has_nested(self) -> bool:
        """Whether any table depends on an outer axis."""
        return bool(self._nested)

    def touched(self, axis: Axis) -> bool:
        """Whether any position of the axis may go."""
        return any(found in self._flat or found in self._nested for found in leaves(axis))

    def mask(self, axis: Axis) -> torch.Tensor | None:
        """Kept positions of a static dimension as a bool tensor, or None when it is untouched or dynamic."""
        root = find(axis)
        if root not in self._masks:
            self._masks[root] = self._mask(root) if isinstance(root.size, int) and self.touched(root) else None
        return self._masks[root]

    def _mask(self, root: Axis) -> torch.Tensor:
        assert isinstance(root.size, int)  # the caller checks
        columns = coords(root)
        kept = torch.ones(root.size, dtype=torch.bool)
        for leaf, index in columns:
            present = index >= 0
            if leaf in self._flat:
                kept &= torch.where(present, self._flat[leaf][index], True)
            elif leaf in self._nested:
                outer, table = self._nested[leaf]
                outers = [own for other, own in columns if other is outer]
                # Without the outer axis in the same dimension only the count matters: rows are already in place.
                rows = outers[0] if outers else torch.zeros_like(index)
                table = table if outers else _first(table)
                kept &= torch.where(present, table[rows, index], True)
        return kept

    def size(self, axis: Axis) -> Size:
        """Size after deletion."""
        root = find(axis)
        if isinstance(root.size, int):
            kept = self.mask(root)
            return root.size if kept is None else int(kept.sum())
        if root.kind == "product":
            return total(self.size(factor) for factor in factors(root))
        return root.size

    def shape(self, label: Label) -> list[Size]:
        """Shape after deletion."""
        return [self.size(axis) for axis in label]

    def indices(self, label: Label) -> dict[int, torch.Tensor]:
        """Kept positions of every dimension that changes."""
        masks = {dim: self.mask(axis) for dim, axis in enumerate(label)}
        return {dim: mask.nonzero().flatten() for dim, mask in masks.items() if mask is not None}

    def gather(self, value: torch.Tensor, label: Label) -> torch.Tensor:
        """The kept part of a dense value."""
        for dim, index in self.indices(label).items():
            value = value.index_select(dim, index)
        return value


def _first(table: torch.Tensor) -> torch.Tensor:
    row = torch.arange(table.shape[1]) < int(table[0].sum())
    return row[None]


def _checked(key: Axis | Anchor, leaf: Axis, table: torch.Tensor) -> torch.Tensor:
    if table.dtype != torch.bool or table.shape[-1] != leaf.size:
        raise _misfit(key, f"it needs {leaf.size} booleans, the table has {tuple(table.shape)} {table.dtype}")
    if not bool(table.any(-1).all()):
        raise _misfit(key, "nothing would be left of it")
    return table


def _misfit(key: Axis | Anchor, why: str) -> ModelError:
    return ModelError(
        "CS2106", f"The keep table of axis {key} cannot be applied.", where=str(key), why=f"{why[0].upper()}{why[1:]}."
    )
