"""``quantize``: codes and scales against formulas written out in numpy, and what the program then computes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from compile_sparse.compiler.errors import ModelError, Refusal
from compile_sparse.compiler.execution.executor import Executor
from compile_sparse.compiler.ir.edit import op_name
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.ir.verifier import verify_program
from compile_sparse.compiler.ir.weights import AbsentTensor, WeightStore
from compile_sparse.passes.mask import Sparsify
from compile_sparse.passes.quantize import Quantize
from compile_sparse.testing.models import example_inputs
from tests.support.contexts import SCHEMES, context
from tests.toys import toy_program
from tests.unit.passes.running import AddMM, Linear

ROWS, DEPTH = 12, 200  # 200 is no multiple of 128 or 32: the last group is short
GROUP = {"w8a8": 0, "w8a16": 128, "w4a16": 128, "w4a16-g32": 32}
BITS = {"w8a8": 8, "w8a16": 8, "w4a16": 4, "w4a16-g32": 4}
EPS = float(np.finfo(np.float32).eps)
Array = np.ndarray[Any, Any]


def weight() -> torch.Tensor:
    """Random rows; one is zero, in one the largest magnitude is positive, in one negative and met by its opposite."""
    made = torch.randn(ROWS, DEPTH, generator=torch.Generator().manual_seed(3))
    made[4] = 0
    made[5, 7], made[6, 7] = 9.0, -9.0
    made[6, 8] = 8.99
    return made


def expected(rows: Array, scheme: str) -> tuple[Array, Array]:
    """Codes and scales of ``rows [N, K]``, one group at a time."""
    group, top = GROUP[scheme], 2 ** (BITS[scheme] - 1)
    if not group:
        scale = np.array([max(np.abs(row)) / np.float32(top - 1) for row in rows], np.float32)
        scale[scale == 0] = 1
        return np.rint(rows / scale[:, None]).astype(np.int8), scale
    codes, scales = np.zeros(rows.shape, np.int8), []
    for index, row in enumerate(rows):
        for start in range(0, len(row), group):
            part = row[start : start + group]
            peak = part[np.argmax(np.abs(part))]
            scale = np.float32(peak) / np.float32(-top) if peak else np.float32(1)
            codes[index, start : start + group] = np.clip(np.rint(part / scale), -top, top - 1)
            scales.append(scale)
    return codes, np.array(scales, np.float32).reshape(len(rows), -1)


def quantized(scheme: str, form: type[Linear] | type[AddMM] = Linear, values: torch.Tensor | None = None) -> Program:
    module = form(weight() if values is None else values)
    return Quantize(scheme=scheme).run(toy_program(module, [torch.zeros(3, DEPTH)]), context()).program  # type: ignore[arg-type]


def stored(program: Program, form: type[Linear] | type[AddMM] = Linear) -> tuple[Array, Array]:
    """Codes as rows, and scales."""
    codes = program.weights.load("weight.codes").numpy()
    return (codes if form.axis == 1 else codes.T), program.weights.load("weight.scale").numpy()


@pytest.mark.parametrize("form", [Linear, AddMM])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_codes_and_scales_equal_the_formula(scheme: str, form: type[Linear] | type[AddMM]) -> None:
    program = quantized(scheme, form)
    verify_program(program)
    codes, scale = stored(program, form)
    wanted_codes, wanted_scale = expected(weight().numpy(), scheme)
    assert program.weights["weight.codes"].dtype == torch.int8
    assert program.weights["weight.codes"].shape == ((ROWS, DEPTH) if form is Linear else (DEPTH, ROWS))
    np.testing.assert_array_equal(scale, wanted_scale)
    np.testing.assert_array_equal(codes, wanted_codes)
    assert "weight" not in program.weights


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_error_is_half_a_step_but_where_the_range_ends(scheme: str) -> None:
    codes, scale = stored(quantized(scheme))
    values, group, top = weight().numpy(), GROUP[scheme] or DEPTH, 2 ** (BITS[scheme] - 1)
    assert codes.min() >= -top
    assert codes.max() <= top - 1
    step = np.repeat(scale.reshape(ROWS, -1), group, axis=1)[:, :DEPTH].astype(np.float64)
    error = np.abs(values - codes * step)
    rounding = top * EPS * np.abs(step)  # of the division, in steps
    clipped = values / step > top - 0.5
    assert (error[~clipped] <= (np.abs(step) / 2 + rounding)[~clipped]).all()
    assert (error[clipped] <= (np.abs(step) + rounding)[clipped]).all()
    if scheme == "w8a8":
        assert not clipped.any()
    else:
        assert clipped[6, 8], "the case of an opposite extreme is not in the data"


@pytest.mark.parametrize("scheme", SCHEMES)
def test_zero_rows_have_scale_one_and_zero_codes(scheme: str) -> None:
    codes, scale = stored(quantized(scheme))
    assert not codes[4].any()
    assert (scale.reshape(ROWS, -1)[4] == 1).all()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("form", [Linear, AddMM])
@pytest.mark.parametrize("pattern", ["2:4", "0.5", "block=4x4:0.5"])
def test_zeros_of_a_mask_stay_zero(scheme: str, form: type[Linear] | type[AddMM], pattern: str) -> None:
    masked = Sparsify(pattern=pattern).run(toy_program(form(weight()), [torch.zeros(3, DEPTH)]), context()).program
    zeros = masked.weights.load("weight") == 0
    assert zeros.float().mean() >= 0.5
    result = Quantize(scheme=scheme).run(masked, context()).program  # type: ignore[arg-type]
    assert not result.weights.load("weight.codes")[zeros].any()


def activation_codes(x: Array) -> tuple[Array, Array]:
    """Eight bits around zero, one scale per row."""
    scale = np.abs(x).max(1, keepdims=True) / np.float32(127)
    return np.rint(x * (np.float32(1) / scale)), scale


@pytest.mark.parametrize("form", [Linear, AddMM])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shift", [0.0, 5.0, -5.0])
def test_the_program_computes_the_product_of_the_codes(
    scheme: str, form: type[Linear] | type[AddMM], shift: float
) -> None:
    x = (torch.randn(3, DEPTH, generator=torch.Generator().manual_seed(1)) + shift).numpy()
    found = Executor(quantized(scheme, form)).run({"x0": torch.from_numpy(x)})["y0"].numpy()
    codes, scale = expected(weight().numpy(), scheme)
    step = np.repeat(scale.reshape(ROWS, -1), GROUP[scheme] or DEPTH, axis=1)[:, :DEPTH].astype(np.float64)
    restored, used = codes * step, x.astype(np.float64)
    if scheme == "w8a8":
        integers, a_scale = activation_codes(x)
        used = integers.astype(np.float64) * a_scale
    wanted = used @ restored.T + np.linspace(-1, 1, ROWS)
    # Restoring rounds each factor once and the sum rounds DEPTH times, all relative to the sum of magnitudes.
    bound = (DEPTH + 4) * EPS * (np.abs(used) @ np.abs(restored).T + 1)
    assert (np.abs(found - wanted) <= bound).all()
    dense = x.astype(np.float64) @ weight().numpy().T.astype(np.float64) + np.linspace(-1, 1, ROWS)
    assert np.abs(found - dense).max() > bound.max(), "rounding to codes must be visible, or nothing was quantized"


def test_a_shared_input_is_quantized_once(tiny_llama_program: Program) -> None:
    result = Quantize(scheme="w8a8").run(tiny_llama_program, context())
    verify_program(result.program)
    names = [op_name(node) for node in result.program.graph.nodes]
    assert names.count("dequantize_weight") == 15
    # Query, key and value share an input, and so do gate and up: per layer 4 inputs, and 1 for the logits.
    assert names.count("fake_quantize") == 2 * 4 + 1
    assert result.achieved == {"linears": 15, "elements": result.achieved["elements"], "bits_per_weight": 8.0}


@pytest.mark.parametrize("scheme", ["w4a16", "w4a16-g32"])
def test_the_projection_to_the_logits_keeps_eight_bits(tiny_llama_program: Program, scheme: str) -> None:
    result = Quantize(scheme=scheme).run(tiny_llama_program, context())  # type: ignore[arg-type]
    verify_program(result.program)
    bits = {}
    for node in result.program.graph.nodes:
        if op_name(node) == "dequantize_weight":
            bits[result.program.tensor_of(node.args[0])] = node.args[4]
    assert bits.pop("lm_head.weight.codes") == 8
    assert len(bits) == 14
    assert set(bits.values()) == {4}
    assert int(result.program.weights.load("lm_head.weight.codes").abs().max()) > 8
    head, whole = 96 * 64, tiny_llama_program.weights.elements
    rest = sum(whole(name.removesuffix(".codes")) for name in bits)
    assert result.achieved["bits_per_weight"] == round((8 * head + 4 * rest) / (head + rest), 3)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_tied_embedding_keeps_its_float_copy_and_counts_once(tiny_gpt2_program: Program, scheme: str) -> None:
    result = Quantize(scheme=scheme).run(tiny_gpt2_program, context()).program  # type: ignore[arg-type]
    verify_program(result)
    (tied,) = [n for n in tiny_gpt2_program.weights if n in ("transformer.wte.weight", "lm_head.weight")]
    assert result.weights[tied] is tiny_gpt2_program.weights[tied]
    assert result.weights[tied + ".codes"].shape == (96, 64)
    assert result.parameter_count() == tiny_gpt2_program.parameter_count()
    lookup = next(node for node in result.graph.nodes if op_name(node) == "embedding")
    assert result.tensor_of(lookup.args[0]) == tied


def test_the_input_program_is_untouched(tiny_gpt2_program: Program) -> None:
    before, names = str(tiny_gpt2_program.graph), set(tiny_gpt2_program.weights)
    Quantize(scheme="w8a8").run(tiny_gpt2_program, context())
    assert str(tiny_gpt2_program.graph) == before
    assert set(tiny_gpt2_program.weights) == names


def test_planning_reads_no_weights(tiny_gpt2_program: Program) -> None:
    absent = {name: AbsentTensor(s.shape, s.dtype, name) for name, s in tiny_gpt2_program.weights.items()}
    blind = replace(tiny_gpt2_program, weights=WeightStore(absent))
    for scheme in SCHEMES:
        pass_ = Quantize(scheme=scheme)  # type: ignore[arg-type]
        planned, real = (pass_.run(p, context(plan_only=p is blind)) for p in (blind, tiny_gpt2_program))
        assert planned.achieved == real.achieved
        verify_program(planned.program)
        shapes = [{n: (s.shape, s.dtype) for n, s in r.program.weights.items()} for r in (planned, real)]
        assert shapes[0] == shapes[1]
        assert not planned.program.weights.has_values


def test_a_quantized_llama_stays_close_to_the_dense_one(tiny_llama_program: Program) -> None:
    inputs = example_inputs(tiny_llama_program, 2, 6)
    dense = Executor(tiny_llama_program).run(inputs)["logits"]
    eight, four = (
        Executor(Quantize(scheme=scheme).run(tiny_llama_program, context()).program).run(inputs)["logits"]
        for scheme in ("w8a16", "w4a16")
    )
    error8, error4 = ((x - dense).square().mean().sqrt() / dense.std() for x in (eight, four))
    # One step is 1/128 of the largest weight with 8 bits and 1/8 with 4, a ratio of 16; layers add to both.
    assert 0 < error8 < 0.05
    assert 4 < error4 / error8 < 64


def test_a_scheme_without_a_kernel_is_refused() -> None:
    program = toy_program(Linear(weight()), [torch.zeros(3, DEPTH)])
    with pytest.raises(Refusal) as caught:
        Quantize(scheme="w4a16").run(program, context(schemes=("w8a8", "w8a16")))
    assert caught.value.code == "CS4102"
    assert caught.value.why == "It executes w8a8, w8a16."


def test_a_model_without_linears_is_refused() -> None:
    class Twice(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2

    with pytest.raises(ModelError) as caught:
        Quantize(scheme="w8a8").run(toy_program(Twice(), [torch.zeros(3, 4)]), context())
    assert caught.value.code == "CS2201"
