"""Every scheme: codes, scales and what the program computes with them."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch

from compile_sparse.compiler.errors import UsageError
from compile_sparse.compiler.execution.executor import Executor
from compile_sparse.compiler.ir.edit import op_name
from compile_sparse.compiler.ir.quantization_schemes import SCHEMES, SchemeName
from compile_sparse.passes.quantize import Quantize
from tests.toys import toy_program
from tests.unit.passes.running import AddMM, Linear
from tests.unit.passes.scheme_cases import (
    DEPTH,
    EPS,
    ROWS,
    STATIC,
    WEIGHT_ONLY,
    context,
    inputs,
    quantized,
    side,
    stored,
    weight,
)


def test_every_scheme_has_a_name() -> None:
    assert set(SCHEMES) == set(get_args(SchemeName))
    assert STATIC == ["w8a8-static", "fp8-static", "fp8-tensor", "nvfp4"]
    assert len(WEIGHT_ONLY) == 6


REACHING = [name for name in SCHEMES if name != "w8a8-static"]
"""Schemes whose scales reach as far as the weights. ``w8a8-static`` has text here, so that its scales are searched
(``test_scale_search.py``); its format is that of ``w8a8``."""


@pytest.mark.parametrize("form", [Linear, AddMM])
@pytest.mark.parametrize("name", SCHEMES)
def test_every_weight_has_the_nearest_code(name: str, form: type[Linear] | type[AddMM]) -> None:
    """Among all that the format has; dividing by the step in float32 may move a value across a boundary by its rounding."""
    coded, values = stored(quantized(name, form), name, form), weight().numpy().astype(np.float64)
    assert np.isin(coded.codes, coded.table).all()
    error = np.abs(values - coded.values)
    best = np.full(values.shape, np.inf)
    for code in coded.table:
        best = np.minimum(best, np.abs(values - (code - coded.zero) * coded.step))
    rounding = 2 * EPS * (np.abs(values) + np.abs(coded.step) * np.abs(coded.zero))
    assert (error <= best + rounding).all()
    assert np.abs(values - coded.values).max() > rounding.max()


@pytest.mark.parametrize("name", REACHING)
def test_the_error_is_half_a_step_but_where_the_range_ends(name: str) -> None:
    """Scales stored in bfloat16 are off by 2^-8, so the last code is off by 2^-8 times its number of steps, in addition.

    fp8: half of the last of three bits of mantissa, or of the smallest number 2^-9. fp4: its widest gap is 2 steps, and an
    e4m3 scale that is off by 2^-4 leaves 3/8 of a step above the last code.
    """
    coded, values = stored(quantized(name), name), weight().numpy().astype(np.float64)
    error, step, fmt = np.abs(values - coded.values), np.abs(coded.step), SCHEMES[name].weights
    if fmt.kind == "fp8":
        bound = np.maximum(2.0**-4 * np.abs(values), 2.0**-10 * step)
    elif fmt.kind == "fp4":
        bound = np.where(np.abs(values) <= 4 * step, 0.5, 1.0) * step
    else:
        place = values / coded.step + coded.zero
        beyond = np.maximum(place - coded.table.max(), coded.table.min() - place).clip(0)
        opposite = 1.0 if fmt.symmetric and fmt.group else 0.5  # the peak is -8 of [-8, 7]: its opposite is cut
        off = 2.0**-8 * 2**fmt.bits if name in WEIGHT_ONLY else 0.0
        assert (beyond <= opposite + off).all()
        # A zero point is rounded too: both ends may be half a step outside, and then the larger one is cut.
        bound = np.maximum(0.5, beyond) * step
    assert (error <= bound * (1 + 8 * EPS) + 4 * EPS * np.abs(values)).all()


@pytest.mark.parametrize("name", REACHING)
def test_scales_reach_as_far_as_the_weights(name: str) -> None:
    """The formula of each format, one block of weights at a time."""
    program, values = quantized(name), weight().numpy()
    scheme, found = SCHEMES[name], program.weights.load("weight.scale").float().numpy()
    fmt, (rows, columns) = scheme.weights, side(scheme)
    found = found.reshape(-(-ROWS // rows), -1)
    assert found.shape == (-(-ROWS // rows), -(-DEPTH // columns))
    assert len(np.unique(found)) == 1 or not fmt.per_tensor
    whole = float(program.weights.load("weight.global_scale")) if fmt.kind == "fp4" else 1.0
    if fmt.kind == "fp4":
        assert whole == pytest.approx(448 * 6 / 9, rel=2 * EPS)
    off = 2.0**-8 if name in WEIGHT_ONLY else 2.0**-4 if fmt.kind == "fp4" else 2 * EPS
    for row, column in np.ndindex(found.shape):
        part = values[row * rows : (row + 1) * rows, column * columns : (column + 1) * columns]
        part = values if fmt.per_tensor else part
        peak = part.flat[np.abs(part).argmax()]
        if peak == 0:
            assert found[row, column] == (0 if fmt.kind == "fp4" else 1)
            continue
        if fmt.kind == "fp4":
            wanted = abs(peak) / 6 * whole
        elif fmt.kind == "fp8":
            wanted = abs(peak) / 448
        elif not fmt.symmetric:
            wanted = (max(part.max(), 0) - min(part.min(), 0)) / (2**fmt.bits - 1)
        else:
            wanted = peak / -(2 ** (fmt.bits - 1)) if fmt.group else abs(peak) / (2 ** (fmt.bits - 1) - 1)
        assert found[row, column] == pytest.approx(wanted, rel=off)


@pytest.mark.parametrize("form", [Linear, AddMM])
@pytest.mark.parametrize("name", SCHEMES)
def test_zeros_stay_zero(name: str, form: type[Linear] | type[AddMM]) -> None:
    coded = stored(quantized(name, form), name, form)
    assert not coded.values[weight().numpy() == 0].any()


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("name", SCHEMES)
def test_scales_of_weight_only_schemes_are_representable_in_the_stored_type(name: str, precision: str) -> None:
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    scale = quantized(name, baseline_precision=precision).weights.load("weight.scale")
    if SCHEMES[name].weights.kind == "fp4":
        assert scale.dtype == torch.float8_e4m3fn
        return
    assert scale.dtype == torch.float32
    exact = torch.equal(scale.to(dtype).float(), scale)
    assert exact == (name in WEIGHT_ONLY or precision == "fp32"), "kernels with coded activations read float32 scales"


@pytest.mark.parametrize("form", [Linear, AddMM])
@pytest.mark.parametrize("name", SCHEMES)
def test_the_program_is_the_product_of_what_is_stored(name: str, form: type[Linear] | type[AddMM]) -> None:
    """With float64 products of the decoded weight and the coded input."""
    program, x = quantized(name, form), inputs()
    found = Executor(program).run({"x0": x})["y0"].numpy()
    coded, coding = stored(program, name, form).values, SCHEMES[name].activations
    used = x
    if coding:
        scale = program.weights.load("weight.input_scale") if SCHEMES[name].static else None
        used = torch.ops.compile_sparse.fake_quantize(x, coding, scale)
        assert not torch.equal(used, x)
    wide = used.numpy().astype(np.float64)
    wanted = wide @ coded.T + np.linspace(-1, 1, ROWS)
    bound = (DEPTH + 4) * EPS * (np.abs(wide) @ np.abs(coded).T + 1)
    assert (np.abs(found - wanted) <= bound).all()
    kinds = [op_name(node) for node in program.graph.nodes]
    assert kinds.count("fake_quantize") == (1 if coding else 0)


# -- reduced range


@pytest.mark.parametrize("name", ["w8a8", "w8a8-static"])
def test_seven_bits_in_eight(name: str) -> None:
    program = quantized(name, reduce_range=True)
    coded = stored(program, name, bits=7)
    assert np.abs(coded.codes).max() == 63
    values = weight().numpy().astype(np.float64)
    if name in REACHING:
        assert (np.abs(values - coded.values) <= coded.step / 2 * (1 + 8 * EPS) + 4 * EPS * np.abs(values)).all()
        np.testing.assert_allclose(coded.step[0], np.abs(values[0]).max() / 63, rtol=2 * EPS)
    pairs = np.abs(coded.codes[:, ::2]) + np.abs(coded.codes[:, 1::2])
    assert pairs.max() * 255 < 2**15
    result = Quantize(scheme=name, reduce_range=True).run(  # type: ignore[arg-type]
        toy_program(Linear(weight()), [torch.zeros(3, DEPTH)]), context(plan_only=True)
    )
    assert result.requested == {"scheme": name, "quantizer": "rtn", "reduce_range": True}
    assert result.achieved["bits_per_weight"] == 8.0, "they are stored in eight"


@pytest.mark.parametrize("name", [name for name in SCHEMES if not name.startswith("w8a8")])
def test_a_reduced_range_is_for_8_bit_activations(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        Quantize(scheme=name, reduce_range=True).run(  # type: ignore[arg-type]
            toy_program(Linear(weight()), [torch.zeros(3, DEPTH)]), context(plan_only=True)
        )
    assert caught.value.code == "CS1122"
