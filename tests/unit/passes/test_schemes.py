"""Every quantization scheme: codes and scales by the format's own rules, static ranges, refusals, and plans."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np
import pytest
import torch

from compile_sparse.compiler.errors import Refusal, UsageError
from compile_sparse.compiler.execution.calibration import CalibrationStream
from compile_sparse.compiler.execution.executor import Executor
from compile_sparse.compiler.extension.pass_contract import PassContext, PassResult
from compile_sparse.compiler.ir.edit import op_name
from compile_sparse.compiler.ir.linears import find_linears
from compile_sparse.compiler.ir.ops.quantization import FP4_VALUES
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.ir.quantization_schemes import SCHEMES, Scheme, SchemeName
from compile_sparse.compiler.ir.verifier import verify_program
from compile_sparse.compiler.ir.weights import AbsentTensor, WeightStore
from compile_sparse.compiler.progress import SilentProgress
from compile_sparse.compiler.targets.target import Target
from compile_sparse.passes.quantize import Quantize
from tests.toys import toy_program
from tests.unit.passes.running import AddMM, Fed, Linear, target

ROWS, DEPTH = 136, 264  # 264 is a multiple of 8 only: last groups of 16, 32 and 128 are short, and so are last blocks
EPS = float(np.finfo(np.float32).eps)
Array = np.ndarray[Any, Any]
STATIC = [name for name, scheme in SCHEMES.items() if scheme.static]
WEIGHT_ONLY = [name for name, scheme in SCHEMES.items() if not scheme.activations]
WINDOWS = CalibrationStream(
    tuple(tuple(torch.randint(3, 96, (9 + i,), generator=torch.Generator().manual_seed(i)).tolist()) for i in range(3))
)


def serving(**changes: Any) -> Target:
    """As serving runtimes are: a scale per token, weights of bfloat16."""
    update = {"activation_scales": "token", "baseline_precision": "bf16", **changes}
    return target(tuple(SCHEMES)).model_copy(update=update)


def context(calibration: CalibrationStream | None = None, *, plan_only: bool = False, **changes: Any) -> PassContext:
    return PassContext(serving(**changes), SilentProgress(), calibration=calibration, plan_only=plan_only)


def weight() -> torch.Tensor:
    """Random, with a row of zeros, zeros elsewhere, a large value of either sign, and a row of one sign."""
    made = torch.randn(ROWS, DEPTH, generator=torch.Generator().manual_seed(3))
    made[:, 10:14] = 0
    made[4] = 0
    made[5, 7], made[6, 7] = 9.0, -9.0
    made[7] = made[7].abs()
    return made


def inputs() -> torch.Tensor:
    made = torch.randn(3, DEPTH, generator=torch.Generator().manual_seed(1))
    made[1] *= 0.01
    return made


def quantized(
    scheme: str, form: type[Linear] | type[AddMM] = Linear, reduce_range: bool = False, **changes: Any
) -> Program:
    calibration = Fed((), inputs=(inputs(),)) if SCHEMES[scheme].static else None
    made = Quantize(scheme=scheme, reduce_range=reduce_range)  # type: ignore[arg-type]
    program = toy_program(form(weight()), [torch.zeros(3, DEPTH)])
    result = made.run(program, context(calibration, **changes)).program
    verify_program(result)
    return result


def e4m3() -> Array:
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy().astype(np.float64)
    return np.unique(np.concatenate([-codes, codes]))


def e2m1() -> Array:
    values = np.array(FP4_VALUES)
    return np.unique(np.concatenate([-values, values]))


@dataclass(frozen=True)
class Coded:
    """A stored weight in float64: values are ``(codes - zero) * step``; all ``[N, K]``."""

    codes: Array
    zero: Array
    step: Array
    table: Array
    """What ``codes`` may be."""

    @property
    def values(self) -> Array:
        return (self.codes - self.zero) * self.step


def side(scheme: Scheme) -> tuple[int, int]:
    """Rows and columns that share a scale."""
    fmt = scheme.weights
    return (fmt.block, fmt.block) if fmt.block else (1, fmt.group or DEPTH)


def spread(value: Array, scheme: Scheme) -> Array:
    rows, columns = side(scheme)
    return np.repeat(np.repeat(value.reshape(-(-ROWS // rows), -1), rows, 0), columns, 1)[:ROWS, :DEPTH]


def stored(program: Program, name: str, form: type[Linear] | type[AddMM] = Linear, bits: int = 0) -> Coded:
    scheme, load = SCHEMES[name], program.weights.load
    raw, scale = load("weight.codes"), load("weight.scale").float().numpy().astype(np.float64)
    codes = (raw if form.axis == 1 else raw.t()).float().numpy().astype(np.float64)
    zero = np.zeros((ROWS, DEPTH))
    fmt = scheme.weights
    if fmt.kind == "fp4":
        assert raw.dtype == torch.int8
        assert codes.min() >= 0
        assert codes.max() <= 15
        codes = np.array([*FP4_VALUES, *(-value for value in FP4_VALUES)])[codes.astype(int)]
        scale /= float(load("weight.global_scale"))
        return Coded(codes, zero, spread(scale, scheme), e2m1())
    if fmt.kind == "fp8":
        assert raw.dtype == torch.float8_e4m3fn
        return Coded(codes, zero, spread(scale, scheme), e4m3())
    assert raw.dtype == torch.int8
    top = 2 ** ((bits or fmt.bits) - 1)
    if not fmt.symmetric:
        points = load("weight.zero_point")
        assert points.dtype == torch.int8
        zero = spread(points.numpy().astype(np.float64), scheme)
        assert zero.min() >= 0
        assert zero.max() <= 2 * top - 1
        return Coded(codes, zero, spread(scale, scheme), np.arange(2.0 * top))
    lowest = -top if fmt.group else -(top - 1)  # channels: as many codes below zero as above
    return Coded(codes, zero, spread(scale, scheme), np.arange(lowest, top, dtype=np.float64))


def test_every_scheme_has_a_name() -> None:
    assert set(SCHEMES) == set(get_args(SchemeName))
    assert STATIC == ["w8a8-static", "fp8-static", "fp8-tensor", "nvfp4"]
    assert len(WEIGHT_ONLY) == 6


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


@pytest.mark.parametrize("name", SCHEMES)
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


@pytest.mark.parametrize("name", SCHEMES)
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
    assert "quantize_dynamic" not in kinds


# -- reduced range


@pytest.mark.parametrize("name", ["w8a8", "w8a8-static"])
def test_seven_bits_in_eight(name: str) -> None:
    program = quantized(name, reduce_range=True)
    coded = stored(program, name, bits=7)
    assert np.abs(coded.codes).max() == 63
    values = weight().numpy().astype(np.float64)
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


# -- ranges fixed ahead


@pytest.mark.parametrize("name", STATIC)
def test_fixed_ranges_need_text(tiny_llama_program: Program, name: str) -> None:
    with pytest.raises(UsageError) as caught:
        Quantize(scheme=name).run(tiny_llama_program, context())  # type: ignore[arg-type]
    assert caught.value.code == "CS1121"


@pytest.mark.parametrize(
    ("name", "top"), [("w8a8-static", 127), ("fp8-static", 448), ("fp8-tensor", 448), ("nvfp4", 448 * 6)]
)
def test_the_range_is_the_largest_magnitude_of_all_windows(name: str, top: int) -> None:
    """The largest is negative, and in the second of three windows."""
    windows = [torch.randn(3, DEPTH, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    windows[1][2, 5] = -17.25
    program = toy_program(Linear(weight()), [torch.zeros(3, DEPTH)])
    made = Quantize(scheme=name)  # type: ignore[arg-type]
    scale = made.run(program, context(Fed((), inputs=tuple(windows)))).program.weights.load("weight.input_scale")
    wanted = top / 17.25 if name == "nvfp4" else 17.25 / top
    assert scale.shape == (1,)
    assert scale.dtype == torch.float32
    assert torch.equal(scale, torch.tensor([wanted], dtype=torch.float64).float())


@pytest.mark.parametrize("name", STATIC)
def test_inputs_that_are_always_zero_have_a_scale(name: str) -> None:
    program = toy_program(Linear(weight()), [torch.zeros(3, DEPTH)])
    given = context(Fed((), inputs=(torch.zeros(3, DEPTH),)))
    result = Quantize(scheme=name).run(program, given).program  # type: ignore[arg-type]
    assert torch.isfinite(result.weights.load("weight.input_scale")).all()
    assert torch.isfinite(Executor(result).run({"x0": torch.zeros(3, DEPTH)})["y0"]).all()


def observed(program: Program) -> dict[str, float]:
    """``max|x|`` per linear weight on the dense program."""
    found: dict[str, float] = {}
    for linear in find_linears(program)[0]:
        peaks: list[float] = []
        for feed in WINDOWS.feeds(program):
            observe = {linear.input.name: lambda value, into=peaks: into.append(float(value.abs().max()))}
            Executor(program).run(feed, observe=observe)
        found[linear.tensor] = max(peaks)
    return found


@pytest.fixture(scope="module")
def ranges(tiny_llama_program: Program) -> dict[str, float]:
    return observed(tiny_llama_program)


@pytest.mark.parametrize("name", STATIC)
def test_every_input_of_a_model_has_its_own_range(
    tiny_llama_program: Program, ranges: dict[str, float], name: str
) -> None:
    program = Quantize(scheme=name).run(tiny_llama_program, context(WINDOWS)).program  # type: ignore[arg-type]
    verify_program(program)
    top = {"w8a8-static": 127.0, "nvfp4": 448.0 * 6}.get(name, 448.0)
    found = {}
    for linear in program.graph.nodes:
        if op_name(linear) != "linear":
            continue
        source, weights = linear.args[0], linear.args[1]
        assert op_name(source) == "fake_quantize"
        scale = float(program.weights.load(program.tensor_of(source.args[2])))
        found[program.tensor_of(weights.args[0]).removesuffix(".codes")] = (
            top / scale if name == "nvfp4" else scale * top
        )
    assert found.keys() == ranges.keys()
    for tensor, value in found.items():
        assert value == pytest.approx(ranges[tensor], rel=2 * EPS)
    assert len(set(ranges.values())) == 2 * 4 + 1
    names = [op_name(node) for node in program.graph.nodes]
    assert names.count("fake_quantize") == 2 * 4 + 1, "one per input, however many layers read it"
    assert Executor(program).run(next(iter(WINDOWS.feeds(program))))["logits"].isfinite().all()


def test_weights_with_one_input_share_the_global_scale(tiny_llama_program: Program) -> None:
    program = Quantize(scheme="nvfp4").run(tiny_llama_program, context(WINDOWS)).program
    load = tiny_llama_program.weights.load
    for layer in range(2):
        for together in (["self_attn.q", "self_attn.k", "self_attn.v"], ["self_attn.o"], ["mlp.gate", "mlp.up"]):
            names = [f"model.layers.{layer}.{part}_proj.weight" for part in together]
            peak = max(float(load(name).abs().max()) for name in names)
            for name in names:
                assert float(program.weights.load(f"{name}.global_scale")) == pytest.approx(2688 / peak, rel=2 * EPS)
    peaks = {float(load(f"model.layers.0.self_attn.{part}_proj.weight").abs().max()) for part in "qkv"}
    assert len(peaks) == 3, "sharing must make a difference"


# -- targets


def test_the_product_that_makes_the_logits_stays_in_floating_point_where_the_runtime_wants_it(
    tiny_llama_program: Program,
) -> None:
    for name in SCHEMES:
        made = Quantize(scheme=name)  # type: ignore[arg-type]
        result = made.run(tiny_llama_program, context(plan_only=True, logits="float"))
        verify_program(result.program)
        assert result.program.weights["lm_head.weight"] is tiny_llama_program.weights["lm_head.weight"]
        assert "lm_head.weight.codes" not in result.program.weights
        assert [(skip.where, skip.code) for skip in result.diagnostics] == [("lm_head.weight", "CS2205")]
        assert result.achieved["linears"] == 14
        assert result.achieved["bits_per_weight"] == SCHEMES[name].weights.bits


@pytest.mark.parametrize("name", ["w4a16-asym", "w4a16-g32-asym", "w4a16-channel"])
def test_four_bit_schemes_keep_the_head_at_eight_symmetric_bits(tiny_llama_program: Program, name: str) -> None:
    result = Quantize(scheme=name).run(tiny_llama_program, context())  # type: ignore[arg-type]
    verify_program(result.program)
    assert result.program.weights.load("lm_head.weight.codes").abs().max() > 8
    assert "lm_head.weight.zero_point" not in result.program.weights
    assert ("model.layers.0.mlp.up_proj.weight.zero_point" in result.program.weights) == name.endswith("asym")
    assert not [skip for skip in result.diagnostics if skip.code == "CS2205"]


def test_a_scheme_that_a_target_refuses_says_why() -> None:
    own = "Its processors have no such product."
    given = target(("w8a8",)).model_copy(update={"refused_schemes": {"fp8": own}})
    program = toy_program(Linear(weight()), [torch.zeros(3, DEPTH)])
    for name, why in (("fp8", f"{own} It executes w8a8."), ("nvfp4", "It executes w8a8.")):
        with pytest.raises(Refusal) as caught:
            Quantize(scheme=name).run(program, PassContext(given, SilentProgress()))  # type: ignore[arg-type]
        assert caught.value.code == "CS4102"
        assert caught.value.why == why


def results(program: Program, name: str) -> tuple[PassResult, PassResult]:
    absent = {tensor: AbsentTensor(s.shape, s.dtype, tensor) for tensor, s in program.weights.items()}
    blind, made = replace(program, weights=WeightStore(absent)), Quantize(scheme=name)  # type: ignore[arg-type]
    return made.run(blind, context(plan_only=True)), made.run(program, context(WINDOWS))


@pytest.mark.parametrize("name", SCHEMES)
def test_planning_reads_no_weights(tiny_llama_program: Program, name: str) -> None:
    planned, real = results(tiny_llama_program, name)
    verify_program(planned.program)
    assert not planned.program.weights.has_values
    assert planned.achieved == real.achieved
    shapes = [{n: (s.shape, s.dtype) for n, s in r.program.weights.items()} for r in (planned, real)]
    assert shapes[0] == shapes[1]
    for tensor, (shape, dtype) in shapes[1].items():
        value = real.program.weights.load(tensor)
        assert (tuple(value.shape), value.dtype) == (shape, dtype)
