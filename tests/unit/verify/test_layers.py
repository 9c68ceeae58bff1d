"""Errors of layers: which rows count, what is a number, and which layer is named."""

from __future__ import annotations

import pytest
import torch

from compile_sparse.compiler.verify.layers import layer_errors


def worst(found: list[dict[str, torch.Tensor]], expected: list[dict[str, torch.Tensor]]) -> float:
    (errors,) = layer_errors(found, expected).values()
    return max(errors)


def rows(count: int, width: int = 8) -> torch.Tensor:
    return torch.randn(1, count, width, generator=torch.Generator().manual_seed(0))


def test_the_error_is_relative_to_the_layers_own_output() -> None:
    value = rows(40)
    assert worst([{"a": value * 1.02}], [{"a": value}]) == pytest.approx(0.02, rel=1e-3)
    assert worst([{"a": value * 102}], [{"a": value * 100}]) == pytest.approx(0.02, rel=1e-3)


def test_one_row_on_the_border_of_two_codes_does_not_count_and_two_in_ten_do() -> None:
    value = rows(40)
    spoiled = value.clone()
    spoiled[:, 3] *= 2
    assert worst([{"a": spoiled}], [{"a": value}]) == 0
    spoiled[:, ::5] *= 2
    assert worst([{"a": spoiled}], [{"a": value}]) > 0.5


def test_a_fault_in_the_cached_steps_alone_is_found() -> None:
    prompt, steps = rows(56), [rows(1) for _ in range(4)]
    right = [{"a": prompt}, *({"a": step} for step in steps)]
    wrong = [{"a": prompt}, *({"a": step * 1.5} for step in steps)]
    assert worst(wrong, right) == pytest.approx(0.5, rel=1e-3)


def test_rows_of_nothing_are_measured_against_the_others() -> None:
    value = rows(40)
    value[:, 7] = 1e-12
    noisy = value + 1e-9 * rows(40)
    assert worst([{"a": noisy}], [{"a": value}]) < 1e-7


def test_what_is_no_number_is_infinitely_wrong() -> None:
    value = rows(40)
    broken = value.clone()
    broken[:, 3, 2] = torch.nan
    assert worst([{"a": broken}], [{"a": value}]) == float("inf")


def test_an_image_is_one_row() -> None:
    value = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    assert worst([{"a": value * 1.1}], [{"a": value}]) == pytest.approx(0.1, rel=1e-3)


def test_one_wrong_position_of_all_windows_is_found_and_one_window_is_not_enough() -> None:
    value = torch.randn(4, 56, 8, generator=torch.Generator().manual_seed(0))
    spoiled = value.clone()
    spoiled[2, 55] *= 2
    assert worst([{"a": spoiled}], [{"a": value}]) == 0
    spoiled[:, 55] *= 2
    assert worst([{"a": spoiled}], [{"a": value}]) > 0.5


def test_one_wrong_expert_is_found_among_many() -> None:
    """Rows of a grouped GEMM are sorted by expert; this one has a twentieth of them."""
    value = torch.randn(480, 8, generator=torch.Generator().manual_seed(0))
    spoiled = value.clone()
    spoiled[100:124] = 0
    assert worst([{"a": spoiled}], [{"a": value}]) == pytest.approx(1)
    spoiled = value.clone()
    spoiled[100] = 0
    assert worst([{"a": spoiled}], [{"a": value}]) == 0
