"""Each rule of the IR, broken by hand: the verifier names the rule, the node and the pass."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import fx

from compile_sparse.compiler.ir.edit import fake_mode_of
from compile_sparse.compiler.ir.program import Binding, Input, Output, Program, SparsityMask
from compile_sparse.compiler.ir.verifier import InvalidProgram, verify_program
from compile_sparse.compiler.ir.weights import ResidentTensor
from compile_sparse.passes.quantize import Quantize
from tests.support.contexts import context
from tests.toys import toy_program

aten = torch.ops.aten


class TwoLinears(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(8, 12), torch.nn.Linear(12, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.down(self.up(x).relu())
        assert isinstance(out, torch.Tensor)
        return out


@pytest.fixture(scope="module")
def whole() -> Program:
    """A valid program with a dynamic batch."""
    return toy_program(TwoLinears(), [torch.zeros(3, 8)], [{0: torch.export.Dim("batch")}])


@pytest.fixture(scope="module")
def quantized(whole: Program) -> Program:
    return Quantize(scheme="w8a16").run(whole, context()).program


def call(program: Program, name: str) -> fx.Node:
    return next(node for node in program.graph.nodes if node.op == "call_function" and node.name.startswith(name))


def fake(program: Program, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    with fake_mode_of(program):
        return torch.empty(shape, dtype=dtype)


def foreign_function(program: Program) -> Program:
    call(program, "relu").target = verify_program
    return program


def method_call(program: Program) -> Program:
    relu = call(program, "relu")
    with program.graph.inserting_before(relu):
        made = program.graph.call_method("relu", (relu.args[0],))
    made.meta = dict(relu.meta)
    relu.replace_all_uses_with(made)
    program.graph.erase_node(relu)
    return program


def unbound(program: Program) -> Program:
    return replace(program, bindings={k: b for k, b in program.bindings.items() if b.tensor != "up.weight"})


def not_stored(program: Program) -> Program:
    return replace(program, weights=program.weights.updated({}, keep=set(program.weights) - {"up.weight"}))


def other_shape(program: Program) -> Program:
    return replace(program, weights=program.weights.updated({"up.weight": ResidentTensor(torch.zeros(11, 8))}))


def other_dtype(program: Program) -> Program:
    half = ResidentTensor(torch.zeros(12, 8, dtype=torch.float16))
    return replace(program, weights=program.weights.updated({"up.weight": half}))


def declared_only(program: Program) -> Program:
    return replace(program, inputs=(*program.inputs, Input("x9", "x9", "other")))


def bound_only(program: Program) -> Program:
    return replace(program, bindings={**program.bindings, "p_gone": Binding("up.weight")})


def too_many_outputs(program: Program) -> Program:
    return replace(program, outputs=(*program.outputs, Output("y1", "other")))


def no_value(program: Program) -> Program:
    del call(program, "relu").meta["val"]
    return program


def wrong_shape(program: Program) -> Program:
    call(program, "linear_1").meta["val"] = fake(program, 3, 8)  # the batch is dynamic
    return program


def wrong_dtype(program: Program) -> Program:
    node = call(program, "relu")
    with fake_mode_of(program):
        node.meta["val"] = node.meta["val"].to(torch.float64)
    return program


def sizes_do_not_fit(program: Program) -> Program:
    up, down = call(program, "linear"), call(program, "linear_1")
    down.args = (down.args[0], up.args[1], down.args[2])
    return program


def dead(program: Program) -> Program:
    relu = call(program, "relu")
    with program.graph.inserting_before(relu):
        spare = program.graph.call_function(aten.neg.default, (relu.args[0],))
    spare.meta = dict(relu.meta)
    return program


def lost_mask(program: Program) -> Program:
    return replace(program, masks={"gone.weight": SparsityMask("2:4", 1, 0.5)})


BROKEN: dict[str, tuple[Callable[[Program], Program], int, str]] = {
    "foreign function": (foreign_function, 1, "relu"),
    "method call": (method_call, 1, "call_method"),
    "placeholder without binding": (unbound, 2, "neither a weight nor an input"),
    "tensor not stored": (not_stored, 2, "'up.weight', which is not stored"),
    "stored shape differs": (other_shape, 2, "(11, 8)"),
    "stored dtype differs": (other_dtype, 2, "float16"),
    "declared input not in graph": (declared_only, 2, "x9"),
    "binding not in graph": (bound_only, 2, "p_gone"),
    "too many outputs": (too_many_outputs, 3, "1 values, 2 declared"),
    "no value": (no_value, 4, "relu: it has no fake value"),
    "wrong shape": (wrong_shape, 4, "linear_1"),
    "wrong dtype": (wrong_dtype, 4, "relu: recorded"),
    "sizes do not fit": (sizes_do_not_fit, 4, "linear_1: it cannot run"),
    "dead node": (dead, 5, "neg"),
    "mask without tensor": (lost_mask, 6, "gone.weight"),
}


def test_the_programs_that_are_broken_below_are_valid(whole: Program, quantized: Program) -> None:
    verify_program(whole)
    verify_program(quantized)


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_rule_is_named_with_its_node_and_the_pass(whole: Program, name: str) -> None:
    verify_program(whole)  # what a call gives is remembered, also by the clone
    damage, rule, part = BROKEN[name]
    with pytest.raises(InvalidProgram, match=f"after my-pass: rule {rule} broken") as caught:
        verify_program(damage(whole.clone()), after="my-pass")
    assert part in str(caught.value)
    verify_program(whole)  # the clone alone was damaged


@pytest.mark.parametrize(
    ("suffix", "wrong", "part"),
    [
        (".scale", torch.ones(11, 1), "scales (11, 1)"),
        (".scale", torch.ones(12, 2), "scales (12, 2)"),
        (".scale", torch.ones(12), "scales (12,)"),
        (".codes", torch.zeros(12, 8, dtype=torch.uint8), "uint8 codes"),
    ],
)
def test_codes_without_matching_scales_break_rule_six(
    quantized: Program, suffix: str, wrong: torch.Tensor, part: str
) -> None:
    program = quantized.clone()
    name = f"up.weight{suffix}"
    placeholder = next(node for node, binding in program.bindings.items() if binding.tensor == name)
    program.node(placeholder).meta["val"] = fake(program, *wrong.shape, dtype=wrong.dtype)
    broken = replace(program, weights=program.weights.updated({name: ResidentTensor(wrong)}))
    with pytest.raises(InvalidProgram, match="rule 6 broken at dequantize_weight") as caught:
        verify_program(broken)
    assert part in str(caught.value)


def test_a_tuple_of_another_length_breaks_rule_four() -> None:
    program = toy_program(_Halves(), [torch.zeros(4, 8)])
    split = call(program, "split")
    split.meta["val"] = list(split.meta["val"])[:1]
    with pytest.raises(InvalidProgram, match=re.escape("rule 4 broken at split")):
        verify_program(program)


class _Halves(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left, right = x.split(4, dim=1)
        return left * right


@pytest.mark.parametrize(
    ("scheme", "wrong", "part"),
    [
        ("fp8-block", torch.ones(2, 1), "scales (2, 1) for torch.float8_e4m3fn codes, expected (1, 1)"),
        ("nvfp4", torch.ones(12, 2).to(torch.float8_e4m3fn), "scales (12, 2) for torch.int8 codes, expected (12, 1)"),
    ],
)
def test_scales_of_blocks_and_of_fp4_are_checked_too(
    whole: Program, scheme: str, wrong: torch.Tensor, part: str
) -> None:
    given = context(schemes=(scheme,), plan_only=True)
    program = Quantize(scheme=scheme).run(whole, given).program  # type: ignore[arg-type]
    verify_program(program)
    placeholder = next(node for node, binding in program.bindings.items() if binding.tensor == "up.weight.scale")
    program.node(placeholder).meta["val"] = fake(program, *wrong.shape, dtype=wrong.dtype)
    broken = replace(program, weights=program.weights.updated({"up.weight.scale": ResidentTensor(wrong)}))
    with pytest.raises(InvalidProgram, match="rule 6 broken at dequantize_") as caught:
        verify_program(broken)
    assert part in str(caught.value)
