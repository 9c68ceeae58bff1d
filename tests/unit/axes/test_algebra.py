"""Axis expressions: refinement, coordinates and conflicts."""

from __future__ import annotations

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compile_sparse.compiler.axes.algebra import (
    Conflict,
    concatenation,
    coords,
    find,
    leaf,
    leaves,
    one,
    product,
    regroup,
    segment,
    split_sum,
    unify,
)


def test_merge_and_split_are_inverse() -> None:
    a, b = leaf(3), leaf(4)
    assert [find(axis) for axis in regroup([product([a, b])], [3, 4])] == [a, b]


def test_splitting_a_leaf_refines_everything_that_shares_it() -> None:
    a, b = leaf(12), leaf(12)
    unify(a, b)
    outer, inner = regroup([a], [3, 4])
    assert leaves(b) == [outer, inner]


def test_products_find_a_common_refinement() -> None:
    a, b = product([leaf(4), leaf(2)]), product([leaf(2), leaf(4)])
    unify(a, b)
    assert [x.size for x in leaves(a)] == [2, 2, 2]  # the binary digits of the position
    assert leaves(a) == leaves(b)
    for (_, mine), (_, theirs) in zip(coords(a), coords(b), strict=True):
        assert torch.equal(mine, theirs)


def test_incompatible_factors_conflict() -> None:
    with pytest.raises(Conflict):
        unify(product([leaf(2), leaf(3)]), product([leaf(3), leaf(2)]))
    with pytest.raises(Conflict):
        unify(leaf(3), leaf(4))
    with pytest.raises(Conflict):
        regroup([leaf(6)], [4, 2])


def test_sums_split_where_asked() -> None:
    axis = concatenation([leaf(3), leaf(5)])
    left, right = split_sum(axis, 4)
    assert [find(x).size for x in left] == [3, 1]
    assert [find(x).size for x in right] == [4]
    assert find(segment(axis, 3, 8)).size == 5


def test_sum_times_inner_is_sum_of_products() -> None:
    inner, x, y = leaf(2), leaf(3), leaf(4)
    merged = product([concatenation([x, y]), inner])
    unify(merged, concatenation([product([x, inner]), product([y, inner])]))
    assert leaves(segment(merged, 6, 14)) == [y, inner]


def test_a_slice_through_an_inner_axis_conflicts() -> None:
    with pytest.raises(Conflict):
        split_sum(product([leaf(3), leaf(4)]), 5)


def test_size_one_axes_unify_at_once() -> None:
    unify(one(), one())
    assert leaves(one()) == []
    assert coords(one()) == []


def test_rotary_pairs_have_one_column() -> None:
    pair = leaf(3)
    ((owner, index),) = coords(concatenation([pair, pair]))
    assert owner is pair
    assert index.tolist() == [0, 1, 2, 0, 1, 2]


def test_a_leaf_met_twice_has_two_columns() -> None:
    x = leaf(2)
    assert [index.tolist() for _, index in coords(product([x, x]))] == [[0, 0, 1, 1], [0, 1, 0, 1]]
    assert len(coords(concatenation([product([x, x]), leaf(2)]))) == 3


def test_dynamic_axes_keep_their_structure() -> None:
    batch = sympy.Symbol("b", integer=True, positive=True)
    merged = product([leaf(batch), leaf(8)])
    outer, heads, inner = regroup([merged], [batch, 2, 4])
    assert [find(axis).size for axis in (outer, heads, inner)] == [batch, 2, 4]
    with pytest.raises(Conflict):
        coords(merged)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.data())
def test_coordinates_agree_with_reshape(sizes: list[int], data: st.DataObject) -> None:
    axes = [leaf(size) for size in sizes]
    merged = product(axes)
    grid = torch.stack(torch.meshgrid(*[torch.arange(size) for size in sizes], indexing="ij"), -1).reshape(
        -1, len(sizes)
    )
    columns = dict(coords(merged))
    for place, axis in enumerate(axes):
        if axis.size != 1:
            assert torch.equal(columns[axis], grid[:, place])


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.lists(st.integers(1, 5), min_size=2, max_size=5), st.lists(st.integers(1, 5), min_size=2, max_size=5))
def test_unified_sums_have_equal_coordinates(a: list[int], b: list[int]) -> None:
    missing = sum(a) - sum(b)
    (b if missing > 0 else a).extend([abs(missing)] if missing else [])
    left, right = concatenation(map(leaf, a)), concatenation(map(leaf, b))
    unify(left, right)
    assert leaves(left) == leaves(right)
    for (_, mine), (_, theirs) in zip(coords(left), coords(right), strict=True):
        assert torch.equal(mine, theirs)
