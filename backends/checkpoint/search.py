"""Which changes of the config give tensors of the shapes a program has.

Every candidate is tried alone first: how each dimension responds to it predicts what a set of changes does (factors multiply,
concatenated parts add). Only sets that predict every dimension are instantiated, the fewest changes first.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from fractions import Fraction
from itertools import combinations
from math import prod

from compile_sparse.backends.checkpoint.candidates import Change
from compile_sparse.backends.checkpoint.tensors import pattern

__all__ = ["ShapesOf", "matching"]

Shapes = Mapping[str, tuple[int, ...]]
ShapesOf = Callable[[Sequence[Change], bool], Shapes | None]
"""Shapes of the state dict under some changes, or None where the class rejects them; True skips the config's own validation."""

MAX_CHANGES = 6
MAX_TRIES = 200


def matching(
    changes: Sequence[Change], wanted: Shapes, shapes_of: ShapesOf, *, allowed: Collection[str] = ()
) -> Iterator[tuple[Change, ...]]:
    """Sets of changes whose shapes equal ``wanted``, the fewest changes first.

    Args:
        changes: candidates; a set holds at most one per field.
        wanted: shape by name.
        shapes_of: instantiates the class.
        allowed: all names there may be: further blocks, whose names differ from one of these in a number only, are refused.
    """
    dense = shapes_of((), True)
    if dense is None:
        return
    alone = [shapes_of((change,), True) for change in changes]
    rows = _rows(wanted, dense, alone)
    surplus = _surplus(allowed, dense)
    removed = [surplus - set(dense if found is None else found) for found in alone]
    tries = 0
    for size in range(min(MAX_CHANGES, len({change.path for change in changes})) + 1):
        for chosen in combinations(range(len(changes)), size):
            if len({changes[i].path for i in chosen}) < size or not all(row.predicted(chosen) for row in rows):
                continue
            if surplus - set().union(*(removed[i] for i in chosen)):
                continue
            if tries == MAX_TRIES:
                return
            tries += 1
            some = tuple(changes[i] for i in chosen)
            found = shapes_of(some, False)
            if found is not None and _fits(wanted, found) and not _surplus(allowed, found):
                yield some


def _fits(wanted: Shapes, found: Shapes) -> bool:
    return all(found.get(name) == shape for name, shape in wanted.items())


def _surplus(allowed: Collection[str], found: Shapes) -> set[str]:
    patterns = {pattern(name) for name in allowed}
    return {name for name in found if name not in allowed and pattern(name) in patterns}


class _Row:
    """One dimension: its size as captured, as wanted, and under each change alone (None where that is unknown)."""

    def __init__(self, old: int, new: int, responses: tuple[int | None, ...]) -> None:
        self.old, self.new, self.responses = old, new, responses

    def predicted(self, chosen: Sequence[int]) -> bool:
        sizes = [self.old if (size := self.responses[i]) is None else size for i in chosen]
        scaled = self.old * prod((Fraction(size, max(self.old, 1)) for size in sizes), start=Fraction(1))
        return self.new in (scaled, self.old + sum(size - self.old for size in sizes))


def _rows(wanted: Shapes, dense: Shapes, alone: Sequence[Shapes | None]) -> list[_Row]:
    """Distinct rows over all dimensions. Where blocks were removed, a dimension may exist in only some of the models."""
    found: dict[tuple[int, int, tuple[int | None, ...]], None] = {}
    for name, shape in wanted.items():
        if len(dense.get(name, ())) != len(shape):
            continue
        for dim, new in enumerate(shape):
            responses = tuple(None if s is None or name not in s else s[name][dim] for s in alone)
            found[dense[name][dim], new, responses] = None
    return [_Row(*row) for row in found]
