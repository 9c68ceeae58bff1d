"""Axis expressions: what every dimension of every value is made of.

An axis is one of

* a **leaf** ``n``: ``n`` positions that have no known structure;
* a **product** ``a * b`` (outer first): position ``p`` is ``(p // |b|, p % |b|)``, as a reshape merges dimensions;
* a **sum** ``a + b``: the positions of ``a``, then those of ``b``, as a concatenation does.

Axes live in a union-find, so "these two dimensions are the same" is one pointer, and refining a leaf into a product or a sum
refines every dimension that shares it. Size-1 axes are the empty product. Nothing here looks at a weight.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Literal

import torch

from compile_sparse.compiler.ir.sizes import Size, is_static, quotient, same_size, total

__all__ = [
    "Axis",
    "Conflict",
    "concatenation",
    "coords",
    "factors",
    "find",
    "is_dynamic",
    "leaf",
    "leaves",
    "one",
    "product",
    "regroup",
    "segment",
    "segments",
    "split_sum",
    "unify",
]

_serials = itertools.count()


class Conflict(Exception):
    """Two axes have no common refinement. The caller freezes them; it is never an error shown to people."""


class Axis:
    """One union-find node. ``size``, ``kind`` and ``children`` are meaningful on the root only (see ``find``)."""

    __slots__ = ("children", "kind", "parent", "serial", "size")

    def __init__(
        self, size: Size, kind: Literal["leaf", "product", "sum"] = "leaf", children: Iterable[Axis] = ()
    ) -> None:
        self.serial = next(_serials)
        self.parent: Axis | None = None
        self.kind = kind
        self.size = size
        self.children = list(children)

    def __repr__(self) -> str:
        root = find(self)
        if root.kind == "leaf":
            return f"a{root.serial}:{root.size}"
        sign = "*" if root.kind == "product" else "+"
        return "(" + sign.join(map(repr, root.children)) + ")" if root.children else "1"


def find(axis: Axis) -> Axis:
    """Root of the axis's class, with path compression."""
    root = axis
    while root.parent is not None:
        root = root.parent
    while axis.parent is not None:
        axis.parent, axis = root, axis.parent
    return root


def one() -> Axis:
    """The size-1 axis."""
    return Axis(1, "product")


def leaf(size: Size) -> Axis:
    """A new axis without structure."""
    return one() if size == 1 else Axis(size)


def factors(axis: Axis) -> list[Axis]:
    """Roots whose product is the axis, outermost first; none of them is itself a product. Empty for size 1."""
    root = find(axis)
    if root.kind == "product":
        return [factor for child in root.children for factor in factors(child)]
    return [root]


def product(parts: Iterable[Axis]) -> Axis:
    """The merge of ``parts``, outermost first."""
    found = [factor for part in parts for factor in factors(part)]
    return found[0] if len(found) == 1 else Axis(total(f.size for f in found), "product", found)


def segments(axis: Axis) -> list[Axis]:
    """Axes whose concatenation is the axis. ``(x + y) * i`` is ``x * i + y * i``."""
    root = find(axis)
    if root.kind == "sum":
        return [part for child in root.children for part in segments(child)]
    found = factors(root)
    if len(found) > 1 and found[0].kind == "sum":
        return [product([part, *found[1:]]) for part in segments(found[0])]
    return [root]


def concatenation(parts: Iterable[Axis]) -> Axis:
    """``parts`` one after the other."""
    found = [piece for part in parts for piece in segments(part)]
    if len(found) == 1:
        return found[0]
    size: Size = 0
    for piece in found:
        size = size + find(piece).size
    return Axis(size, "sum", found)


def _refine(axis: Axis, inner: int) -> None:
    """Turn a leaf or sum into ``outer * inner`` in place."""
    root = find(axis)
    if not isinstance(root.size, int):
        raise Conflict("a dynamic axis cannot be split")
    if root.kind == "leaf":
        root.kind, root.children = "product", [leaf(root.size // inner), leaf(inner)]
        return
    outers: list[Axis] = []
    shared: Axis | None = None
    for piece in segments(root):
        size = find(piece).size
        if not isinstance(size, int) or size % inner:
            raise Conflict(f"a concatenated part of size {size} is not a multiple of {inner}")
        outer, own = regroup(factors(piece), [size // inner, inner])
        outers.append(outer)
        shared = own if shared is None else unify(shared, own)
    assert shared is not None  # a sum has parts
    root.kind, root.children = "product", [concatenation(outers), shared]


def regroup(parts: Sequence[Axis], sizes: Sequence[Size]) -> list[Axis]:
    """Cut the product of ``parts`` into axes of the given ``sizes``, refining leaves where a cut falls inside one.

    Raises:
        Conflict: a cut cannot be placed.
    """
    rest, out = [factor for part in parts for factor in factors(part)], list[Axis]()
    for size in reversed(sizes):
        need: Size = size
        taken: list[Axis] = []
        while need != 1:
            if not rest:
                raise Conflict("the dimensions have fewer elements than asked for")
            last = find(rest[-1])
            if last.kind == "product":
                rest[-1:] = factors(last)
                continue
            if same_size(last.size, need):
                remaining: Size | None = 1
            else:
                remaining = quotient(need, last.size)
            if remaining is not None:
                taken.insert(0, last)
                rest.pop()
                need = remaining
                continue
            if not (isinstance(last.size, int) and isinstance(need, int)) or last.size % need:
                raise Conflict(f"a reshape cuts an axis of {last.size} at {need}")
            _refine(last, need)
            rest[-1:] = factors(last)
        out.insert(0, product(taken) if taken else one())
    if any(find(axis).size != 1 for axis in rest):
        raise Conflict("the dimensions have more elements than asked for")
    return out


def split_sum(axis: Axis, count: int) -> tuple[list[Axis], list[Axis]]:
    """``(segments of the first count positions, the rest)``, refining the segment the boundary falls in.

    Raises:
        Conflict: the boundary cuts through the inner part of a product, or a dynamic axis.
    """
    rest, left = segments(axis), list[Axis]()
    while count > 0:
        piece = find(rest[0])
        if not isinstance(piece.size, int):
            raise Conflict("a dynamic axis cannot be split")
        if piece.size <= count:
            left.append(rest.pop(0))
            count -= piece.size
            continue
        found = factors(piece)
        if len(found) == 1:
            root = found[0]
            if root.kind != "leaf" or not isinstance(root.size, int):
                raise Conflict("only a plain axis can be cut")
            root.kind, root.children = "sum", [leaf(count), leaf(root.size - count)]
        else:
            inner = total(factor.size for factor in found[1:])
            if not isinstance(inner, int) or count % inner:
                raise Conflict("a slice cuts through an inner axis")
            split_sum(found[0], count // inner)
        refined = segments(piece)
        if len(refined) == 1:
            raise Conflict("a slice cuts through an inner axis")
        rest[0:1] = refined
    return left, rest


def segment(axis: Axis, start: int, stop: int) -> Axis:
    """The axis of positions ``start .. stop - 1``."""
    _, rest = split_sum(axis, start)
    tail = concatenation(rest)
    middle, _ = split_sum(tail, stop - start)
    return concatenation(middle)


def unify(a: Axis, b: Axis) -> Axis:
    """Make two axes the same axis, position by position, refining both where needed; returns the common root.

    Raises:
        Conflict: no common refinement. Parts may have been unified already: that only couples more than necessary.
    """
    a, b = find(a), find(b)
    if a is b:
        return a
    if a.size == 1 and b.size == 1:  # both empty products: nothing to share, and recursing would not end
        return b
    if not same_size(a.size, b.size):
        raise Conflict(f"sizes {a.size} and {b.size} differ")
    if a.kind == "leaf":
        a.parent = b
        return b
    if b.kind == "leaf":
        b.parent = a
        return a
    mine, theirs = factors(a), factors(b)
    if len(mine) > 1 or len(theirs) > 1:
        _unify_products(mine, theirs)
    else:
        _unify_sums(segments(a), segments(b))
    a, b = find(a), find(b)
    if a is not b:
        a.parent = b
    return b


def _unify_products(mine: list[Axis], theirs: list[Axis]) -> None:
    while mine and theirs:
        x, y = find(mine[-1]), find(theirs[-1])
        if x.kind == "product":
            mine[-1:] = factors(x)
        elif y.kind == "product":
            theirs[-1:] = factors(y)
        elif same_size(x.size, y.size):
            unify(x, y)
            mine.pop()
            theirs.pop()
        elif not (isinstance(x.size, int) and isinstance(y.size, int)):
            raise Conflict("dynamic factors differ")
        else:
            big, small, owner = (x, y, mine) if x.size > y.size else (y, x, theirs)
            if quotient(big.size, small.size) is None or not isinstance(small.size, int):
                raise Conflict(f"factors {x.size} and {y.size} have no common refinement")
            _refine(big, small.size)
            owner[-1:] = factors(big)


def _unify_sums(mine: list[Axis], theirs: list[Axis]) -> None:
    while mine and theirs:
        x, y = find(mine[0]), find(theirs[0])
        if same_size(x.size, y.size):
            unify(x, y)
            mine.pop(0)
            theirs.pop(0)
        elif not (isinstance(x.size, int) and isinstance(y.size, int)):
            raise Conflict("dynamic parts differ")
        elif x.size > y.size:
            split_sum(x, y.size)
            mine[0:1] = segments(x)
        else:
            split_sum(y, x.size)
            theirs[0:1] = segments(y)


def leaves(axis: Axis) -> list[Axis]:
    """Leaf roots of the expression, in order, each once."""
    found: dict[Axis, None] = {}

    def walk(node: Axis) -> None:
        root = find(node)
        if root.kind == "leaf":
            found[root] = None
        for child in root.children:
            walk(child)

    walk(axis)
    return list(found)


def coords(axis: Axis) -> list[tuple[Axis, torch.Tensor]]:
    """Columns ``(leaf, index)``: ``index[p]`` is the position along the leaf at flat position ``p``, -1 where it is absent.

    A leaf used by several segments (rotary pairs: ``p + p``) has one column; a leaf met twice at the same position (an outer
    product with itself) has two. Static axes only.
    """
    root = find(axis)
    if not isinstance(root.size, int):
        raise Conflict("a dynamic axis has no coordinates")
    if root.kind == "leaf":
        return [(root, torch.arange(root.size))]
    columns: list[tuple[Axis, torch.Tensor]] = []
    if root.kind == "product":
        found, inner = factors(root), 1
        for factor in reversed(found):
            size = find(factor).size
            assert isinstance(size, int)  # the product is static
            position = (torch.arange(root.size) // inner) % size
            columns[:0] = [(owner, index[position]) for owner, index in coords(factor)]
            inner *= size
        return columns
    offset = 0
    for child in root.children:
        size = find(child).size
        assert isinstance(size, int)  # the sum is static
        for owner, index in coords(child):
            full = torch.full((root.size,), -1)
            full[offset : offset + size] = index
            _add_column(columns, owner, full)
        offset += size
    return columns


def _add_column(columns: list[tuple[Axis, torch.Tensor]], owner: Axis, index: torch.Tensor) -> None:
    for place, (other, existing) in enumerate(columns):
        if other is owner and not bool(((existing >= 0) & (index >= 0)).any()):
            columns[place] = (owner, torch.maximum(existing, index))
            return
    columns.append((owner, index))


def is_dynamic(axis: Axis) -> bool:
    """Whether the axis has no static leaf: nothing about it can be pruned."""
    return all(not is_static(found.size) for found in leaves(axis))
