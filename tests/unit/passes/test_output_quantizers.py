"""Outputs coded to int8: where sparse kernels need them, what the program then computes, and that sharing stays correct."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from compile_sparse.compiler.errors import Refusal
from compile_sparse.compiler.execution.calibration import CalibrationStream
from compile_sparse.compiler.execution.executor import Executor
from compile_sparse.compiler.extension.pass_contract import PassContext, PassResult
from compile_sparse.compiler.ir.edit import op_name
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.ir.quantization_schemes import SCHEMES
from compile_sparse.compiler.ir.verifier import verify_program
from compile_sparse.compiler.ir.verify_masks import verify_masks
from compile_sparse.compiler.lowering import raising_steps, run_steps
from compile_sparse.compiler.progress import SilentProgress
from compile_sparse.compiler.targets.target import Target
from compile_sparse.passes.mask import Sparsify
from compile_sparse.passes.quantize import Quantize
from tests.support.contexts import target
from tests.toys import toy_program
from tests.unit.passes.running import Fed

WINDOWS = CalibrationStream(tuple(tuple((7 * i + 3 * j) % 90 + 3 for j in range(16)) for i in range(3)))
FED = torch.randn(6, 16, generator=torch.Generator().manual_seed(4))


class Chain(torch.nn.Module):
    """``c(b(a(x))) + a(x)``: the output of ``a`` is read by a linear and by an addition, that of ``b`` by a linear alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = torch.nn.Linear(16, 16), torch.nn.Linear(16, 24), torch.nn.Linear(24, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.a(x)
        out = self.c(self.b(first)) + first
        assert isinstance(out, torch.Tensor)
        return out


def tensorrt_like(int8_outputs: bool = True, **rule: Any) -> Target:
    entry = {"pattern": "2:4", "pays": True, "why": "Sparse tensor cores.", "int8_outputs": int8_outputs, **rule}
    data = target(tuple(SCHEMES)).model_dump() | {"sparse_patterns": [entry], "logits": "float"}
    return Target.model_validate(data | {"baseline_precision": "fp16"})


def fed(goal: Target, plan_only: bool = False) -> PassContext:
    return PassContext(goal, SilentProgress(), calibration=Fed((), inputs=(FED,)), plan_only=plan_only)


def chain(goal: Target, *, mask: bool = True, plan_only: bool = False, **options: Any) -> PassResult:
    program = toy_program(Chain(), [torch.zeros(6, 16)])
    if mask:
        program = Sparsify(pattern="2:4").run(program, fed(goal)).program
    options = {"scheme": "w8a8-static"} | options
    result = Quantize(**options).run(program, fed(goal, plan_only))
    verify_program(result.program)
    verify_masks(result.program, before=program)
    return result


def coded_outputs(program: Program) -> list[str]:
    """Weights of the linears whose every reader is an output quantizer."""
    found = []
    for node in program.graph.nodes:
        if op_name(node) == "linear":
            users = list(node.users)
            scales = [program.tensor_of(user.args[2]) for user in users if len(user.args) == 3]
            if len(users) == 1 and scales and str(scales[0]).endswith(".output_scale"):
                found.append(str(scales[0]).removesuffix(".weight.output_scale"))
    return found


@pytest.mark.parametrize(
    ("int8_outputs", "mask", "option", "coded"),
    [
        (True, True, "auto", ["a", "b", "c"]),
        (True, False, "auto", []),
        (False, True, "auto", []),
        (True, True, "none", []),
        (True, False, "all", ["a", "b", "c"]),
    ],
)
def test_which_outputs_are_coded(int8_outputs: bool, mask: bool, option: str, coded: list[str]) -> None:
    result = chain(tensorrt_like(int8_outputs), mask=mask, outputs=option)
    assert coded_outputs(result.program) == coded
    assert result.achieved["int8_outputs"] == len(coded)


def test_only_masked_layers_are_coded() -> None:
    """The rule of the target leaves the layer of 24 inputs dense."""
    result = chain(tensorrt_like(in_features_multiple=16))
    assert result.program.masks.keys() == {"a.weight.codes", "b.weight.codes"}
    assert coded_outputs(result.program) == ["a", "b"]


@pytest.mark.parametrize("scheme", [name for name, scheme in SCHEMES.items() if scheme.activations != "int8-static"])
def test_other_schemes_code_no_outputs(scheme: str) -> None:
    result = chain(tensorrt_like(), scheme=scheme)
    assert coded_outputs(result.program) == []
    assert "int8_outputs" not in result.achieved


def int8(value: torch.Tensor, peak: float) -> torch.Tensor:
    """Coded with the largest magnitude at 127, and restored."""
    step = torch.tensor(peak, dtype=torch.float64).div(127).float()
    return torch.round(value / step).clamp(-128, 127) * step


def test_the_program_is_the_one_written_by_hand() -> None:
    """Ranges are those of the program before it is quantized; float32 sums of equal terms in equal order are equal."""
    program = chain(tensorrt_like()).program
    dense = Sparsify(pattern="2:4").run(toy_program(Chain(), [torch.zeros(6, 16)]), fed(tensorrt_like())).program
    load, linear = dense.weights.load, torch.nn.functional.linear

    def product(x: torch.Tensor, name: str, peak: float | None = None) -> torch.Tensor:
        weight = load(f"{name}.weight")
        if peak is not None:
            scale = weight.abs().amax(1, keepdim=True) / 127
            weight = torch.round(weight / scale).clamp(-127, 127) * scale
            x = int8(x, peak)
        return linear(x, weight, load(f"{name}.bias"))

    a = product(FED, "a")
    b = product(a, "b")
    c = product(b, "c")
    peaks = [float(value.abs().max()) for value in (FED, a, b, c)]
    x = torch.randn(6, 16, generator=torch.Generator().manual_seed(8)) * 1.5  # some values beyond the range
    first = int8(product(x, "a", peaks[0]), peaks[1])
    second = int8(product(first, "b", peaks[1]), peaks[2])
    wanted = int8(product(second, "c", peaks[2]), peaks[3]) + first
    found = Executor(program).run({"x0": x})["y0"]
    assert torch.equal(found, wanted)
    without = Executor(chain(tensorrt_like(), outputs="none").program).run({"x0": x})["y0"]
    assert not torch.equal(found, without)


def test_a_layer_that_reads_a_coded_output_keeps_its_own_quantizer() -> None:
    program = chain(tensorrt_like()).program
    linears = [node for node in program.graph.nodes if op_name(node) == "linear"]
    for reader in linears[1:]:
        own = reader.args[0]
        assert op_name(own) == "fake_quantize"
        assert str(program.tensor_of(own.args[2])).endswith(".input_scale")
        assert str(program.tensor_of(own.args[0].args[2])).endswith(".output_scale")
        # Both were measured on one value: the second codes what the first has coded, and changes nothing.
        scales = [program.weights.load(str(program.tensor_of(n.args[2]))) for n in (own, own.args[0])]
        assert torch.equal(*scales)


def test_planning_measures_nothing() -> None:
    planned, real = (chain(tensorrt_like(), plan_only=plan) for plan in (True, False))
    assert planned.achieved == real.achieved
    assert str(planned.program.graph) == str(real.program.graph)
    assert not planned.program.weights.has_values
    assert real.program.weights.has_values


def test_a_target_without_such_products_refuses_them_all() -> None:
    with pytest.raises(Refusal) as caught:
        chain(tensorrt_like(int8_outputs=False), outputs="all")
    assert (caught.value.code, caught.value.where) == ("CS4102", "quantize.outputs")


def test_layers_that_share_a_weight_keep_a_range_each() -> None:
    """The second reads values a hundred times as large."""

    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.weight = torch.nn.Parameter(torch.randn(16, 16))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            linear = torch.nn.functional.linear
            return linear(linear(x, self.weight) * 100, self.weight)

    goal = tensorrt_like()
    program = toy_program(Twice(), [torch.zeros(6, 16)])
    result = Quantize(scheme="w8a8-static", outputs="all").run(program, fed(goal)).program
    verify_program(result)
    scales = {name: float(result.weights.load(name)) for name in result.weights if "put_scale" in name}
    first = torch.nn.functional.linear(FED, program.weights.load("weight"))
    second = torch.nn.functional.linear(first * 100, program.weights.load("weight"))
    wanted = [float(value.abs().max()) / 127 for value in (FED, first * 100, first, second)]
    assert len(scales) == 4
    found = [scales[f"weight.{side}_scale{n}"] for side in ("input", "output") for n in ("", "_2")]
    assert found == pytest.approx(wanted, rel=2.0**-22)


@pytest.mark.parametrize("name", ["w8a8-static", "fp8-static", "fp8-tensor", "nvfp4", "w4a16", "w4a16-g32"])
def test_schemes_of_tensorrt_on_its_kind_of_target(tiny_llama_program: Program, name: str) -> None:
    """One activation scale per tensor, logits in floating point, masked layers; every pattern is still recognised."""
    given = PassContext(tensorrt_like(), SilentProgress(), calibration=WINDOWS)
    masked = Sparsify(pattern="2:4").run(tiny_llama_program, given).program
    made = Quantize(scheme=name)  # type: ignore[arg-type]
    assert made.contraction_multiple == {"w4a16": 128, "w4a16-g32": 32, "nvfp4": 16}.get(name, 1)
    result = made.run(masked, given)
    verify_program(result.program)
    verify_masks(result.program, before=masked)
    assert result.program.masks.keys() == {f"{tensor}.codes" for tensor in masked.masks}
    assert len(result.program.masks) == 14
    assert "lm_head.weight.codes" not in result.program.weights
    names = [op_name(node) for node in result.program.graph.nodes]
    outputs = 14 if name == "w8a8-static" else 0
    assert names.count("fake_quantize") == (2 * 4 if SCHEMES[name].activations else 0) + outputs
    raised = [
        sorted(op_name(n) for n in run_steps(p, raising_steps())[0].graph.nodes) for p in (masked, result.program)
    ]
    ours = {"rms_norm", "attention", "rotary"}
    counts = [{n: each.count(n) for n in each if any(part in n for part in ours)} for each in raised]
    assert counts[0] == counts[1]
    assert counts[0], "the model has patterns to recognise"
    logits = Executor(result.program).run(next(iter(WINDOWS.feeds(result.program))))["logits"]
    assert logits.isfinite().all()


def test_the_scale_of_a_whole_weight_is_one_number(tiny_llama_program: Program) -> None:
    given = PassContext(tensorrt_like(), SilentProgress(), calibration=WINDOWS)
    result = Quantize(scheme="fp8-tensor").run(tiny_llama_program, given).program
    tensors = [name.removesuffix(".codes") for name in result.weights if name.endswith(".codes")]
    assert len(tensors) == 14
    together = {"q": "qkv", "k": "qkv", "v": "qkv", "gate": ("gate", "up"), "up": ("gate", "up")}
    for tensor in tensors:
        weight, scale = tiny_llama_program.weights.load(tensor), result.weights.load(f"{tensor}.scale")
        own = tensor.rsplit(".", 2)[1].removesuffix("_proj")
        # Runtimes join layers that share an input and keep one scale of the joined matrix.
        sharing = [tensor.replace(f"{own}_proj", f"{part}_proj") for part in together.get(own, (own,))]
        peaks = [tiny_llama_program.weights.load(name).abs().max() for name in sharing]
        assert scale.shape == (weight.shape[0],)
        assert torch.equal(scale, (max(peaks) / 448).expand(len(scale)))
        codes = result.weights.load(f"{tensor}.codes").float()
        if weight.abs().max() == max(peaks):
            assert codes.abs().max() == 448
        # e4m3 has three bits of fraction, and steps of 2^-9 below its normal numbers.
        error = (codes * scale[0] - weight).abs()
        allowed = torch.maximum(weight.abs() * 2.0**-4, scale[0] * 2.0**-10) * (1 + 2.0**-20)
        assert bool((error <= allowed).all())
