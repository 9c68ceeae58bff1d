"""A grid stands for what the operators of the graph compute, as a whole and column by column."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from compile_sparse.compiler.ir.quantization_grid import QuantizationGrid
from compile_sparse.compiler.ir.quantization_schemes import SCHEMES
from compile_sparse.passes.quantization.scales import fitted_grid
from compile_sparse.passes.quantization.weights import NVFP4_TOP

ours = torch.ops.compile_sparse
FORMATS = list(dict.fromkeys(scheme.weights for scheme in SCHEMES.values()))
FORMATS.append(replace(SCHEMES["w8a8"].weights, reduced_range=True))


def rows() -> torch.Tensor:
    """No size of a group or a block divides it; one channel is zero, one group of others is."""
    made = torch.randn(19, 200, generator=torch.Generator().manual_seed(0))
    made[3] = 0.0
    made[5, 128:] = 0.0
    return made


def restored(grid: QuantizationGrid, codes: torch.Tensor) -> torch.Tensor:
    fmt = grid.format
    if fmt.kind == "fp4":
        return ours.dequantize_nvfp4(codes, grid.scale, grid.global_scale)
    if fmt.block:
        return ours.dequantize_block(codes, grid.scale, fmt.block)
    return ours.dequantize_weight(codes, grid.scale, 1, fmt.group, fmt.bits, grid.zero_point)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_values_are_those_of_the_graph(fmt) -> None:
    weight = rows()
    peak = weight.abs().max().reshape(1)
    grid = fitted_grid(weight, fmt, torch.float32, NVFP4_TOP / peak if fmt.kind == "fp4" else peak)
    codes = grid.codes(weight)
    # fp4 multiplies by the scale and divides by the global one: two roundings in another order.
    torch.testing.assert_close(
        grid.values(codes), restored(grid, codes), rtol=2**-22 if fmt.kind == "fp4" else 0, atol=0
    )
    assert not grid.values(codes)[weight == 0].any(), "zeros stay zero"
    for columns in (slice(0, 1), slice(127, 130), slice(199, 200)):
        here = grid.codes(weight[:, columns], columns)
        assert torch.equal(here.float(), codes[:, columns].float())
        assert torch.equal(grid.values(here, columns), grid.values(codes)[:, columns])


def test_a_reduced_range_stays_in_seven_bits() -> None:
    grid = fitted_grid(rows(), FORMATS[-1], torch.float32)
    assert int(grid.codes(rows() * 100).abs().max()) == int(grid.codes(rows()).abs().max()) == 63
