"""Activation formats, rounding to e4m3 and e2m1, and dequantization, each against loops over single numbers.

Powers of two divide and multiply exactly, so that ties are exact and values can be compared for equality; where scales are
arbitrary float32 numbers, both sides round a division and a product, so results agree within two units in the last place,
except at a rounding boundary. Those formulas are evaluated with float32 operations in the same order, and compared exactly.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from compile_sparse.compiler.ir.ops.quantization import FP4_VALUES, FP8_MAX, to_fp4_codes, to_fp8

ours = torch.ops.compile_sparse
Array = np.ndarray[Any, Any]
F = np.float32


def e4m3() -> list[float]:
    """All finite non-negative values: 3 bits of mantissa, bias 7, exponent 0 subnormal, the last code is NaN."""
    found = []
    for exponent, mantissa in itertools.product(range(16), range(8)):
        if (exponent, mantissa) != (15, 7):
            found.append(mantissa * 2.0**-9 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))
    return found


def nearest(value: float, table: Sequence[float]) -> float:
    """The nearest entry of an ascending table of magnitudes; a tie goes to the even code, and too large to the last."""
    size = min(abs(value), table[-1])
    best = min(range(len(table)), key=lambda code: (abs(table[code] - size), code % 2))
    return float(np.copysign(table[best], value))


E4M3 = e4m3()
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def probes(table: Sequence[float]) -> torch.Tensor:
    """Every value, every middle and both its neighbours, far too large numbers, and all of that negative."""
    middles = [(low + high) / 2 for low, high in itertools.pairwise(table)]
    found = torch.tensor([*table, *middles, table[-1] * 1.01, table[-1] * 2, 1e30], dtype=torch.float32)
    beside = torch.tensor(middles, dtype=torch.float32)
    up, down = (torch.nextafter(beside, torch.full_like(beside, end)) for end in (1e30, 0.0))
    every = torch.cat([found, up, down])
    return torch.cat([every, -every])


def test_the_tables_are_the_formats() -> None:
    assert list(FP4_VALUES) == E2M1
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    assert codes.tolist() == E4M3
    assert E4M3[-1] == FP8_MAX


def test_e4m3_rounds_to_the_nearest_and_saturates() -> None:
    values = probes(E4M3)
    assert to_fp8(values).float().tolist() == [nearest(value, E4M3) for value in values.tolist()]


@pytest.mark.parametrize("shape", [(-1,), (2, -1)])
def test_e2m1_rounds_to_the_nearest_and_saturates(shape: tuple[int, ...]) -> None:
    values = probes(E2M1)
    codes = to_fp4_codes(values.view(shape)).flatten()
    assert codes.dtype == torch.int8
    assert codes.min() >= 0
    assert codes.max() <= 15
    decoded = [*E2M1, *(-value for value in E2M1)]
    assert [decoded[code] for code in codes.tolist()] == [nearest(value, E2M1) for value in values.tolist()]


def test_ties_of_e2m1_written_out() -> None:
    """A check of the check: by hand, from the OCP table."""
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    assert to_fp4_codes(ties).tolist() == [0, 2, 2, 4, 4, 6, 6]


# -- activations


def activations(depth: int) -> torch.Tensor:
    """Three tokens of two windows: ordinary, tiny, and with a part that is zero; one token is zero altogether."""
    made = torch.randn(2, 3, depth, generator=torch.Generator().manual_seed(0))
    made[0, 1] *= 1e-3
    made[1, 0, : depth // 2] = 0
    made[1, 2] = 0
    made[0, 0, 3] = 9.0
    return made


def integer(value: np.floating[Any], scale: np.floating[Any]) -> float:
    return float(F(np.clip(np.rint(F(value / scale)), -128, 127)) * scale)


def float8(value: np.floating[Any], scale: np.floating[Any]) -> float:
    return float(F(nearest(float(F(value / scale)), E4M3)) * scale)


def token_integer(value: np.floating[Any], scale: np.floating[Any]) -> float:
    """As kernels that find the scale do it: times the reciprocal."""
    return float(F(np.rint(F(value * (F(1) / scale)))) * scale)


CODES = {"int8": (integer, F(127)), "fp8": (float8, F(448)), "int8 at run time": (token_integer, F(127))}


def expected(x: torch.Tensor, kind: str, group: int) -> Array:
    """One scale per ``group`` elements of a row; 0: per row."""
    code, top = CODES[kind]
    found = x.numpy().copy()
    for row in found.reshape(-1, found.shape[-1]):
        for start in range(0, len(row), group or len(row)):
            part = row[start : start + (group or len(row))]
            scale = F(np.abs(part).max() / top) or F(1)
            part[:] = [code(value, scale) for value in part]
    return found


@pytest.mark.parametrize(
    ("format", "kind", "group", "depth"),
    [
        ("int8", "int8 at run time", 0, 40),
        ("fp8", "fp8", 0, 40),
        ("fp8-group", "fp8", 128, 256),
        ("fp8-group", "fp8", 128, 200),  # a last group of 72
        ("fp8-group", "fp8", 128, 40),
    ],
)
def test_scales_found_at_run_time(format: str, kind: str, group: int, depth: int) -> None:
    x = activations(depth)
    found = ours.fake_quantize(x, format)
    assert found.shape == x.shape
    assert found.is_contiguous()
    np.testing.assert_array_equal(found.numpy(), expected(x, kind, group))
    assert not torch.equal(found, x)


def test_a_token_does_not_depend_on_its_neighbours() -> None:
    x = activations(40)
    for format in ("int8", "fp8", "fp8-group"):
        alone = torch.stack([ours.fake_quantize(token[None], format)[0] for token in x.flatten(0, 1)])
        assert torch.equal(ours.fake_quantize(x, format).flatten(0, 1), alone)


def test_groups_of_a_row_have_their_own_scales() -> None:
    """The second group is a thousand times smaller; with the scale of the first it would be coarse."""
    x = activations(256)
    x[..., 128:] *= 1e-3
    small = x[0, 0, 128:]
    error = (ours.fake_quantize(x, "fp8-group")[0, 0, 128:] - small).abs()
    assert error.max() <= small.abs().max() * 2**-4


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_a_fixed_scale_serves_everything_and_saturates(kind: str) -> None:
    """Values reach twice what the scale was made for."""
    code, top = CODES[kind]
    x = activations(40)
    scale = F(4.5) / top
    found = ours.fake_quantize(x, f"{kind}-static", torch.tensor([scale])).numpy()
    wanted = np.array([code(value, scale) for value in x.numpy().flatten()], F).reshape(x.shape)
    np.testing.assert_array_equal(found, wanted)
    assert found.max() == pytest.approx(4.5)
    low = ours.fake_quantize(-x, f"{kind}-static", torch.tensor([scale])).min()
    assert low == pytest.approx(-4.5 * (128 / 127 if kind == "int8" else 1))


@pytest.mark.parametrize("depth", [32, 40])
def test_fp4_has_a_scale_of_its_own_every_sixteen_below_one_for_all(depth: int) -> None:
    x = activations(depth)
    divisor = F(448 * 6) / F(9)
    found = ours.fake_quantize(x, "fp4", torch.tensor([divisor])).numpy()
    wanted = x.numpy().copy()
    for row in wanted.reshape(-1, depth):
        for start in range(0, depth, 16):
            part = row[start : start + 16]
            stored = F(nearest(float(F(F(np.abs(part).max() / F(6)) * divisor)), E4M3))
            scale = F(stored / divisor)
            part[:] = [F(nearest(float(F(value / (scale or F(1)))), E2M1)) * scale for value in part]
    np.testing.assert_array_equal(found, wanted)
    assert found.max() == pytest.approx(9.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_type_of_the_input_is_kept(dtype: torch.dtype) -> None:
    x = activations(40).to(dtype)
    found = ours.fake_quantize(x, "int8")
    assert found.dtype == dtype
    assert torch.equal(found, ours.fake_quantize(x.float(), "int8").to(dtype))


@pytest.mark.parametrize("format", ["int8-static", "fp8-static", "fp4"])
def test_fixed_formats_take_a_scale(format: str) -> None:
    with pytest.raises(ValueError, match="needs a scale"):
        ours.fake_quantize(activations(32), format)


@pytest.mark.parametrize("format", ["int8-row", "int8-group", "fp4-static", "int4", ""])
def test_unknown_formats_are_refused(format: str) -> None:
    with pytest.raises(ValueError, match="no activation format"):
        ours.fake_quantize(activations(32), format, torch.ones(1))


def test_a_scale_means_nothing_to_formats_that_find_theirs() -> None:
    x = activations(40)
    assert torch.equal(ours.fake_quantize(x, "int8", torch.ones(1)), ours.fake_quantize(x, "int8"))


# -- weights

ROWS, DEPTH = 5, 70


def integers(low: int, high: int, *shape: int) -> torch.Tensor:
    return torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(1)).to(torch.int8)


def scales(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(2)) + 0.5


@pytest.mark.parametrize("axis", [1, 0])
@pytest.mark.parametrize("group", [0, 16, 35])
@pytest.mark.parametrize("symmetric", [True, False])
def test_integers_are_restored(axis: int, group: int, symmetric: bool) -> None:
    groups = -(-DEPTH // group) if group else 1
    q = integers(-8, 7, ROWS, DEPTH) if symmetric else integers(0, 15, ROWS, DEPTH)
    scale, zero = scales(ROWS, groups), None if symmetric else integers(0, 15, ROWS, groups)
    wanted = torch.empty(ROWS, DEPTH)
    for row, column in itertools.product(range(ROWS), range(DEPTH)):
        place = column // group if group else 0
        offset = 0 if zero is None else int(zero[row, place])
        wanted[row, column] = (int(q[row, column]) - offset) * scale[row, place]
    shaped = (scale, zero) if group else (scale[:, 0], None if zero is None else zero[:, 0])
    stored = q if axis == 1 else q.t().contiguous()
    found = ours.dequantize_weight(stored, shaped[0], axis, group, 4, shaped[1])
    assert torch.equal(found if axis == 1 else found.t(), wanted)


@pytest.mark.parametrize("axis", [1, 0])
def test_float8_channels_are_restored(axis: int) -> None:
    q, scale = to_fp8(torch.randn(ROWS, DEPTH) * 100), scales(ROWS)
    wanted = torch.tensor([[float(value) for value in row] for row in q.float()]) * scale[:, None]
    found = ours.dequantize_weight(q if axis == 1 else q.t().contiguous(), scale, axis, 0)
    assert torch.equal(found if axis == 1 else found.t(), wanted)


def test_blocks_are_restored() -> None:
    """Neither size is a multiple of the side."""
    block, q = 3, to_fp8(torch.randn(ROWS, DEPTH) * 100)
    scale = scales(-(-ROWS // block), -(-DEPTH // block))
    wanted = torch.empty(ROWS, DEPTH)
    for row, column in itertools.product(range(ROWS), range(DEPTH)):
        wanted[row, column] = float(q[row, column]) * scale[row // block, column // block]
    assert torch.equal(ours.dequantize_block(q, scale, block), wanted)


@pytest.mark.parametrize("depth", [64, 56])  # 56: a last group of 8
def test_nvfp4_is_restored(depth: int) -> None:
    codes, scale, divisor = integers(0, 15, ROWS, depth), to_fp8(scales(ROWS, 4) * 100), torch.tensor([3.7])
    wanted = torch.empty(ROWS, depth)
    for row, column in itertools.product(range(ROWS), range(depth)):
        code = int(codes[row, column])
        value = E2M1[code % 8] * (-1 if code >= 8 else 1)
        wanted[row, column] = float(F(value) * (F(float(scale[row, column // 16])) / F(3.7)))
    assert torch.equal(ours.dequantize_nvfp4(codes, scale, divisor), wanted)


def test_operators_declare_what_they_give() -> None:
    """Shapes and types on fake tensors are those of real ones, and nothing returned shares memory with what was given."""
    q, scale = integers(-8, 7, ROWS, 64), scales(ROWS, 4)
    calls = [
        (ours.dequantize_weight.default, (q, scale, 1, 16, 4, integers(0, 15, ROWS, 4))),
        (ours.dequantize_weight.default, (q, scales(ROWS), 1, 0)),
        (ours.dequantize_block.default, (to_fp8(q.float()), scales(2, 22), 3)),
        (ours.dequantize_nvfp4.default, (integers(0, 15, ROWS, 64), to_fp8(scale), torch.tensor([2.0]))),
        *((ours.fake_quantize.default, (activations(40), name)) for name in ("int8", "fp8", "fp8-group")),
        *((ours.fake_quantize.default, (activations(32), n, scales(1))) for n in ("int8-static", "fp8-static", "fp4")),
    ]
    for operator, arguments in calls:
        torch.library.opcheck(operator, arguments, test_utils="test_faketensor")
        found = operator(*arguments)
        assert found.data_ptr() not in {a.data_ptr() for a in arguments if isinstance(a, torch.Tensor)}
