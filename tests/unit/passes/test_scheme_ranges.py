"""Ranges fixed on calibration text, shared scales, the lm_head, targets and plans."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from compile_sparse.compiler.errors import Refusal, UsageError
from compile_sparse.compiler.execution.executor import Executor
from compile_sparse.compiler.extension.pass_contract import PassContext, PassResult
from compile_sparse.compiler.ir.edit import op_name
from compile_sparse.compiler.ir.linears import find_linears
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.ir.quantization_schemes import SCHEMES
from compile_sparse.compiler.ir.verifier import verify_program
from compile_sparse.compiler.ir.weights import AbsentTensor, WeightStore
from compile_sparse.compiler.progress import SilentProgress
from compile_sparse.passes.quantize import Quantize
from tests.support.contexts import target
from tests.toys import toy_program
from tests.unit.passes.running import Fed, Linear
from tests.unit.passes.scheme_cases import (
    DEPTH,
    EPS,
    STATIC,
    WINDOWS,
    context,
    weight,
)

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
