"""Config fields that may explain why dimensions changed size.

A dimension is a product of sizes (``heads * head_dim``) or a multiple of one (three projections in one tensor). When it goes
from ``D`` to ``E``, every integer field whose value ``v`` divides ``D`` may be the factor that changed, to ``v * E / D``.
Which one it was is decided by trying.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from compile_sparse.backends.checkpoint.architecture import Path
from compile_sparse.backends.checkpoint.tensors import Stack

__all__ = ["Cache", "Change", "candidates", "sliced_lists"]


MAX_STAGES = 8
"""Lists of up to this length may give the widths of a network's stages; longer ones speak of layers or tokens."""


@dataclass(frozen=True)
class Change:
    """A field, its value and its new value."""

    path: Path
    old: int
    new: int


@dataclass(frozen=True)
class Cache:
    """What a program's key-value cache says.

    Attributes:
        heads: numbers of cached heads, over all layers.
        head_dim: size of a cached head, which no field may contradict; None without a cache.
    """

    heads: frozenset[int] = frozenset()
    head_dim: int | None = None


def candidates(
    config: Mapping[str, Any], resized: Iterable[tuple[int, int]], stacks: Iterable[Stack], cache: Cache
) -> list[Change]:
    """Every single change worth trying.

    Args:
        config: plain data.
        resized: (old, new) sizes of dimensions.
        stacks: where blocks were removed.
        cache: of the program.
    """
    found: dict[Change, None] = {}
    resized, counts = sorted(set(resized)), {(stack.old, len(stack.kept)) for stack in stacks}
    for path, value in _integers(config):
        for old, new in counts:
            if value == old:
                found[Change(path, old, new)] = None
        for old, new in resized:
            scaled = Fraction(value * new, old)
            if value > 1 and old % value == 0 and scaled.denominator == 1 and scaled >= 1:
                found[Change(path, value, int(scaled))] = None
        if any(old % value == 0 for old, _ in resized if value > 1):
            # In a tensor that holds projections of several sizes no ratio shows how many heads are left; the cache does.
            found |= {Change(path, value, heads): None for heads in sorted(cache.heads) if heads < value}
    return [c for c in found if cache.head_dim is None or c.path[-1] != "head_dim" or c.new == cache.head_dim]


def _integers(config: Mapping[str, Any], above: Path = ()) -> Iterator[tuple[Path, int]]:
    for key, value in config.items():
        if isinstance(value, int) and not isinstance(value, bool):
            yield (*above, key), value
        elif isinstance(value, Mapping) and key.endswith("_config"):
            yield from _integers(value, (*above, key))
        elif isinstance(value, (list, tuple)) and len(value) <= MAX_STAGES:
            for place, entry in enumerate(value):
                if isinstance(entry, int) and not isinstance(entry, bool):
                    yield (*above, key, place), entry


def sliced_lists(config: Mapping[str, Any], stacks: Iterable[Stack]) -> dict[Path, list[Any]]:
    """Lists with one entry per block (kinds of attention, for example) without the entries of removed blocks."""
    kept: dict[int, set[tuple[int, ...]]] = {}
    for stack in stacks:
        kept.setdefault(stack.old, set()).add(stack.kept)
    certain = {old: next(iter(sets)) for old, sets in kept.items() if len(sets) == 1}
    return {path: [value[i] for i in certain[len(value)]] for path, value in _lists(config) if len(value) in certain}


def _lists(config: Mapping[str, Any], above: Path = ()) -> Iterator[tuple[Path, list[Any]]]:
    for key, value in config.items():
        if isinstance(value, (list, tuple)):
            yield (*above, key), list(value)
        elif isinstance(value, Mapping) and key.endswith("_config"):
            yield from _lists(value, (*above, key))
