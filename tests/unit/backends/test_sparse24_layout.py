"""The 2:4 layout: exact in both directions, and refused where it does not hold."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compile_sparse.backends.vllm.sparse24_layout import compress_24, expand_24


def test_a_row_by_hand():
    weight = torch.tensor([[0.0, 5.0, 0.0, 7.0, 1.0, 0.0, 2.0, 0.0]])
    values, indices = compress_24(weight)
    assert values.tolist() == [[5.0, 7.0, 1.0, 2.0]]
    # places 1, 3 of the first group and 0, 2 of the second, lowest bits first
    assert indices.tolist() == [[1 | 3 << 2 | 0 << 4 | 2 << 6]]
    assert indices.dtype == torch.uint8


@given(
    out=st.integers(1, 5),
    eighths=st.integers(1, 4),
    kept=st.integers(0, 2),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.int8]),
    seed=st.integers(0, 2**16),
)
def test_round_trip(out: int, eighths: int, kept: int, dtype: torch.dtype, seed: int):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(1, 100, (out, 2 * eighths, 4), generator=generator)
    places = torch.rand(weight.shape, generator=generator).argsort(-1)
    # at most 'kept' of each group, in random places
    weight = torch.where(places < kept, weight, 0).reshape(out, 8 * eighths).to(dtype)
    values, indices = compress_24(weight)
    assert values.shape == (out, 4 * eighths) and indices.shape == (out, eighths) and values.dtype == dtype
    assert torch.equal(expand_24(values, indices), weight)


def test_a_16_bit_weight_takes_9_sixteenths():
    weight = torch.zeros(64, 128, dtype=torch.bfloat16)
    values, indices = compress_24(weight)
    assert (values.nbytes + indices.nbytes) * 16 == weight.nbytes * 9


def test_three_values_in_a_group_are_refused():
    weight = torch.zeros(3, 16)
    weight[2, 9:12] = 1.0
    with pytest.raises(ValueError, match=r"Row 2 .* columns 8 to 11; 1 of 12 groups"):
        compress_24(weight)


@pytest.mark.parametrize("shape", [(2, 12), (8,), (2, 8, 8)])
def test_other_shapes_are_refused(shape: tuple[int, ...]):
    with pytest.raises(ValueError, match="multiple of 8"):
        compress_24(torch.zeros(shape))


@pytest.mark.parametrize("indices", [torch.zeros(2, 2, dtype=torch.uint8), torch.zeros(2, 1, dtype=torch.int32)])
def test_indices_that_do_not_fit_are_refused(indices: torch.Tensor):
    with pytest.raises(ValueError, match="need uint8 indices"):
        expand_24(torch.zeros(2, 4), indices)


def test_places_out_of_order_are_refused():
    with pytest.raises(ValueError, match="not in order"):
        expand_24(torch.ones(1, 4), torch.tensor([[2 | 1 << 2 | 0 << 4 | 1 << 6]], dtype=torch.uint8))
