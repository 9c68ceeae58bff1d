"""Tensors that will be stored in a shorter type: values, bytes, and what is known without weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from compile_sparse.compiler.errors import ModelError
from compile_sparse.compiler.execution.executor import Executor
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.ir.storage import bytes_by_tensor, cast_weights, stored_bytes, stored_form, torch_dtype
from compile_sparse.compiler.ir.weights import AbsentTensor, DerivedTensor, DowncastTensor, ResidentTensor, WeightStore
from compile_sparse.passes.quantize import Quantize
from tests.support.contexts import context, target
from tests.toys import toy_program
from tests.unit.passes.running import Linear

VALUES = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16])
def test_values_are_those_of_the_shorter_type(storage: torch.dtype) -> None:
    made = DowncastTensor(ResidentTensor(VALUES), storage)
    assert (made.shape, made.dtype) == ((6, 64), torch.float32)
    value, stored = made.load(), made.stored().load()
    assert (value.dtype, stored.dtype) == (torch.float32, storage)
    assert torch.equal(stored.float(), value)
    assert not torch.equal(value, VALUES)
    # Half a unit in the last place: bfloat16 has 8 significant bits, float16 has 11.
    bits = {torch.bfloat16: 8, torch.float16: 11}[storage]
    assert bool(((value - VALUES).abs() <= 2.0**-bits * VALUES.abs()).all())
    assert torch.equal(DowncastTensor(ResidentTensor(value), storage).load(), value)


def test_nothing_is_read_before_it_is_loaded() -> None:
    loads = []

    def compute() -> torch.Tensor:
        loads.append(1)
        return VALUES

    made = DowncastTensor(DerivedTensor((6, 64), torch.float32, compute), torch.bfloat16)
    form = stored_form(made)
    assert (form.shape, form.dtype) == ((6, 64), torch.bfloat16)
    assert not loads
    form.load()
    assert len(loads) == 1


def test_absent_tensors_stay_absent() -> None:
    made = DowncastTensor(AbsentTensor((6, 64), torch.float32, "w"), torch.bfloat16)
    assert stored_form(made) == AbsentTensor((6, 64), torch.bfloat16, "w")
    assert not WeightStore({"w": made}).has_values
    assert WeightStore({"w": DowncastTensor(ResidentTensor(VALUES), torch.bfloat16)}).has_values
    with pytest.raises(ModelError) as caught:
        made.load()
    assert caught.value.code == "CS2001"


def test_other_tensors_are_stored_as_they_are() -> None:
    source = ResidentTensor(VALUES)
    assert stored_form(source) is source


@pytest.mark.parametrize(("name", "size"), [("fp32", 4), ("fp16", 2), ("bf16", 2)])
def test_precisions_have_torch_types(name: str, size: int) -> None:
    assert torch_dtype(name).itemsize == size
    assert torch_dtype(name).is_floating_point


def toy() -> Program:
    return toy_program(Linear(VALUES), [torch.zeros(3, 64)])


def test_a_rounded_program_computes_in_float32_with_rounded_parameters() -> None:
    program = toy()
    result = cast_weights(program, torch.bfloat16)
    for name in ("weight", "bias"):
        wanted = program.weights.load(name).bfloat16().float()
        assert torch.equal(result.weights.load(name), wanted)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    found = Executor(result).run({"x0": x})["y0"]
    weight, bias = (result.weights.load(name) for name in ("weight", "bias"))
    assert torch.equal(found, torch.nn.functional.linear(x, weight, bias))
    assert not torch.equal(found, Executor(program).run({"x0": x})["y0"])
    assert torch.equal(program.weights.load("weight"), VALUES)
    assert stored_bytes(program) == 4 * (6 * 64 + 6)
    assert stored_bytes(result) == 2 * (6 * 64 + 6)
    assert cast_weights(program, torch.float32) is program


def test_only_trained_floating_point_tensors_are_rounded(tiny_llama_program: Program) -> None:
    """The inverse frequencies of rotary positions are a buffer; an embedding is a parameter."""
    program = cast_weights(tiny_llama_program, torch.bfloat16)
    kinds = {binding.tensor: binding.kind for binding in program.bindings.values()}
    assert set(kinds.values()) == {"parameter", "buffer"}
    for name, kind in kinds.items():
        assert isinstance(program.weights[name], DowncastTensor) == (kind == "parameter")


@pytest.mark.parametrize(
    ("scheme", "precision", "weight", "scales"),
    [
        ("w8a8", "bf16", 6 * 64, 6 * 4),
        ("w4a16-g32", "fp32", 6 * 64 // 2, 6 * 2 * 4),
        ("w4a16-g32", "bf16", 6 * 64 // 2, 6 * 2 * 2),
        ("w4a16-channel", "fp16", 6 * 64 // 2, 6 * 2),
        ("w4a16-g32-asym", "bf16", 6 * 64 // 2, 6 * 2 * (2 + 1)),  # zero points
        ("fp8", "bf16", 6 * 64, 6 * 4),
        ("fp8-block", "bf16", 6 * 64, 4),
        ("nvfp4", "bf16", 6 * 64 // 2, 6 * 4 + 4 + 4),  # scales of one byte, one for the tensor, one for its input
    ],
)
@pytest.mark.parametrize("plan_only", [False, True])
def test_codes_and_scales_count_as_they_are_stored(
    scheme: str, precision: str, weight: int, scales: int, plan_only: bool
) -> None:
    given = context(plan_only=plan_only or scheme == "nvfp4")
    given = replace(given, target=target((scheme,)).model_copy(update={"baseline_precision": precision}))
    program = toy()
    if plan_only:
        absent = {name: AbsentTensor(s.shape, s.dtype, name) for name, s in program.weights.items()}
        program = replace(program, weights=WeightStore(absent))
    made = Quantize(scheme=scheme).run(program, given).program  # type: ignore[arg-type]
    made = cast_weights(made, torch_dtype(precision))
    found = bytes_by_tensor(made)
    bias = 6 * torch_dtype(precision).itemsize
    assert found["weight.codes"] == weight
    assert found["bias"] == bias
    assert stored_bytes(made) == weight + scales + bias
