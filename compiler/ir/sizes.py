"""Sizes of dimensions: an ``int`` when static, a sympy expression when the dimension is dynamic.

Only static sizes can be pruned; symbolic ones are carried so that merges such as ``batch * heads`` keep their structure.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import TypeAlias

import sympy
import torch

__all__ = ["Size", "is_static", "quotient", "same_size", "shape_of", "size_of", "total"]

Size: TypeAlias = int | sympy.Expr


def size_of(dimension: int | torch.SymInt) -> Size:
    """Size of one entry of a fake tensor's shape."""
    if isinstance(dimension, int):
        return dimension
    return _plain(dimension.node.expr)


def shape_of(value: torch.Tensor) -> list[Size]:
    """Sizes of a (fake) tensor."""
    return [size_of(dimension) for dimension in value.shape]


def is_static(size: Size) -> bool:
    """Whether the size is a number."""
    return isinstance(size, int)


def same_size(a: Size, b: Size) -> bool:
    """Equality of two sizes; symbolic ones are equal when their difference simplifies to zero."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return a == b or _difference_is_zero(a, b)


@lru_cache(maxsize=4096)  # every layer asks the same few questions, and sympy takes a millisecond for each
def _difference_is_zero(a: Size, b: Size) -> bool:
    return bool(sympy.simplify(sympy.sympify(a) - sympy.sympify(b)) == 0)


def total(sizes: Iterable[Size]) -> Size:
    """Product of sizes, expanded so that equal products compare equal."""
    product: Size = 1
    for size in sizes:
        product = product * size
    return product if isinstance(product, int) else _expanded(product)


@lru_cache(maxsize=4096)
def _expanded(product: sympy.Expr) -> Size:
    return _plain(sympy.expand(product))


def quotient(big: Size, small: Size) -> Size | None:
    """``big / small`` when it is a whole number for every value of the symbols, else None."""
    if isinstance(big, int) and isinstance(small, int):
        return big // small if small and big % small == 0 else None
    return _symbolic_quotient(big, small)


@lru_cache(maxsize=4096)
def _symbolic_quotient(big: Size, small: Size) -> Size | None:
    ratio = sympy.cancel(sympy.sympify(big) / sympy.sympify(small))
    numerator, denominator = sympy.fraction(ratio)
    return _plain(numerator) if denominator == 1 else None


def _plain(expression: sympy.Expr) -> Size:
    return int(expression) if expression.is_number else expression
