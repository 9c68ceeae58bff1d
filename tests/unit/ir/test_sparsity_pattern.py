"""``SparsityPattern``: how many zeros it makes, what it fits, and that it sees a single value too many."""

from __future__ import annotations

import pytest
import torch

from compile_sparse.compiler.ir.sparsity_pattern import SparsityPattern


@pytest.mark.parametrize(
    ("text", "family", "fraction"),
    [("2:4", "2:4", 0.5), ("1:8", "1:8", 0.875), ("0.3", "unstructured", 0.3), ("block=4x8:.25", "block", 0.25)],
)
def test_a_pattern_knows_its_family_and_share(text: str, family: str, fraction: float) -> None:
    found = SparsityPattern.parse(text)
    assert (found.text, found.family, found.zero_fraction) == (text, family, fraction)


@pytest.mark.parametrize(
    ("text", "shape", "axis", "by_row", "zeros"),
    [
        ("2:4", (6, 8), 1, False, 24),
        ("1:4", (8, 5, 3, 3), 0, False, 270),
        ("0.3", (5, 7), 1, False, 10),  # of 10.5
        ("0.3", (5, 7), 1, True, 5 * 2),  # of 2.1 in each of five rows
        ("0.3", (5, 7), 0, True, 7 * 2),  # of 1.5 in each of seven
        ("block=2x4:0.5", (6, 8), 1, False, 3 * 8),
    ],
)
def test_zeros_are_counted_without_values(
    text: str, shape: tuple[int, ...], axis: int, by_row: bool, zeros: int
) -> None:
    assert SparsityPattern.parse(text).zeros(shape, axis, by_row=by_row) == zeros


def test_a_pattern_says_why_a_shape_does_not_fit() -> None:
    assert not SparsityPattern.parse("2:4").misfit((7, 8), 1)
    assert "7 is not a multiple of 4" in SparsityPattern.parse("2:4").misfit((7, 8), 0)
    assert not SparsityPattern.parse("0.5").misfit((7, 9), 0)
    assert "[6, 9] does not divide into 3x2" in SparsityPattern.parse("block=3x2:0.5").misfit((6, 9), 1)
    assert "does not divide" in SparsityPattern.parse("block=2x2:0.5").misfit((4, 4, 3), 1)


@pytest.mark.parametrize(
    ("shape", "axis", "place"), [((3, 8), 1, "[1, 4:8]"), ((8, 3), 0, "[4:8, 1]"), ((3, 8, 2), 1, "[1, 4:8, 0]")]
)
def test_one_value_too_many_in_a_run_is_named(shape: tuple[int, ...], axis: int, place: str) -> None:
    zero = torch.ones(shape, dtype=torch.bool)
    runs = zero.movedim(axis, -1).unflatten(-1, (-1, 4))  # a view: [others, run, place in the run]
    runs[..., :2] = False
    pattern = SparsityPattern.parse("2:4")
    assert not pattern.violation(zero, axis, 0.5)
    at = (1, 0, 1) if len(shape) == 3 else (1, 1)
    runs[at][2] = False
    why = pattern.violation(zero, axis, 0.5)
    assert f"1 of {zero.numel() // 4} runs of 4 along dimension {axis}" in why
    assert place in why


def test_one_zero_too_few_is_counted() -> None:
    zero = torch.zeros(4, 8, dtype=torch.bool)
    zero[:2] = True
    for text, fraction in (("0.5", 0.5), ("block=2x4:0.5", 0.5)):
        assert not SparsityPattern.parse(text).violation(zero, -1, fraction)
    zero[1, 5] = False
    assert SparsityPattern.parse("0.5").violation(zero, -1, 0.5) == "15 elements are zero, the mask promises 16"
    assert SparsityPattern.parse("block=2x4:0.5").violation(zero, -1, 0.5) == "1 blocks are zero, the mask promises 2"
