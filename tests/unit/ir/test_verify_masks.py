"""``verify_masks``: a pass that breaks one run, forgets a mask or moves it is caught, whatever codes the weight has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

from compile_sparse.compiler.extension.pass_contract import Pass, PassContext, PassResult
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.ir.quantization_schemes import SCHEMES
from compile_sparse.compiler.ir.storage import zero_share
from compile_sparse.compiler.ir.verifier import InvalidProgram, verify_program
from compile_sparse.compiler.ir.verify_masks import verify_masks
from compile_sparse.compiler.ir.weights import AbsentTensor, ResidentTensor, WeightStore
from compile_sparse.compiler.pipeline.runner import run_passes
from compile_sparse.passes.mask import Sparsify
from compile_sparse.passes.quantize import Quantize
from tests.support.contexts import context as any_context
from tests.toys import toy_program
from tests.unit.passes.running import AddMM, Fed, Linear

ROWS, DEPTH = 8, 32
PATTERNS = ["2:4", "0.5", "block=2x4:0.5"]


def context() -> PassContext:
    inputs = torch.randn(3, DEPTH, generator=torch.Generator().manual_seed(1))
    return any_context(Fed((), inputs=(inputs,)), schemes=tuple(SCHEMES))


def masked(form: type[Linear] | type[AddMM] = Linear, pattern: str = "2:4") -> Program:
    values = torch.randn(ROWS, DEPTH, generator=torch.Generator().manual_seed(2))
    return Sparsify(pattern=pattern).run(toy_program(form(values), [torch.zeros(3, DEPTH)]), context()).program


@dataclass(frozen=True)
class Step:
    """A pass made of a function."""

    change: Callable[[Program], Program]
    name: str = "vandal"
    phase: ClassVar[str] = "recovery"

    def run(self, program: Program, given: PassContext) -> PassResult:
        return PassResult(self.change(program), modified=True)


def with_value(program: Program, tensor: str, place: int, value: float) -> Program:
    """One element of a stored tensor changed."""
    stored = program.weights.load(tensor)
    flat = stored.float().flatten().clone()
    flat[place] = value
    changed = ResidentTensor(flat.view(stored.shape).to(stored.dtype))
    return replace(program, weights=program.weights.updated({tensor: changed}))


def a_zero(program: Program, tensor: str) -> int:
    return int((program.weights.load(tensor).flatten() == 0).nonzero()[0])


@pytest.mark.parametrize("form", [Linear, AddMM])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_one_value_in_place_of_a_zero_is_caught(form: type[Linear] | type[AddMM], pattern: str) -> None:
    program = masked(form, pattern)
    verify_masks(program)
    broken = Step(lambda p: with_value(p, "weight", a_zero(p, "weight"), 1e-30))
    with pytest.raises(InvalidProgram, match="after vandal: rule 7 broken at weight: ") as caught:
        run_passes(program, [broken], context(), verify_each=True)
    assert pattern in str(caught.value)
    run_passes(program, [broken], context())  # only where asked


def test_a_value_moved_within_its_run_keeps_the_pattern() -> None:
    """The check is of the pattern, not of the places: recovery may choose others."""
    program = masked()
    value = program.weights.load("weight").clone()
    value[0, :4] = value[0, :4].flip(0)
    moved = replace(program, weights=program.weights.updated({"weight": ResidentTensor(value)}))
    assert not torch.equal(program.weights.load("weight"), value)
    verify_masks(moved, before=program)


def test_a_forgotten_or_changed_mask_is_caught() -> None:
    program = masked()
    with pytest.raises(InvalidProgram, match="rule 7 broken at weight: the mask 2:4 of weight is no longer annotated"):
        run_passes(program, [Step(lambda p: replace(p, masks={}, weights=renewed(p)))], context(), verify_each=True)
    other = replace(program, masks={"weight": replace(program.masks["weight"], pattern="3:4")})
    with pytest.raises(InvalidProgram, match="has become 3:4 along 1"):
        verify_masks(other, before=program)
    verify_masks(other)  # 2:4 is 3:4 too: without the program before, nothing is wrong

    def forgetful(p: Program) -> Program:
        return replace(Quantize(scheme="w8a16").run(p, context()).program, masks={})

    with pytest.raises(InvalidProgram, match=r"the mask 2:4 of weight\.codes is no longer annotated"):
        run_passes(program, [Step(forgetful)], context(), verify_each=True)


def renewed(program: Program) -> WeightStore:
    """Another tensor with the same values, which counts as a change."""
    return program.weights.updated({"weight": ResidentTensor(program.weights.load("weight").clone())})


@pytest.mark.parametrize("form", [Linear, AddMM])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_codes_carry_the_mask_and_every_zero(scheme: str, form: type[Linear] | type[AddMM]) -> None:
    for pattern in PATTERNS:
        program = masked(form, pattern)
        passes: list[Pass] = [Quantize(scheme=scheme)]  # type: ignore[arg-type]
        coded, _ = run_passes(program, passes, context(), verify_each=True)
        assert coded.masks == {"weight.codes": program.masks["weight"]}
        assert zero_share(coded) == zero_share(program) == ROWS * DEPTH / 2 / (ROWS * DEPTH + ROWS)  # and the bias
        restored = restored_weight(coded)
        assert not restored[program.weights.load("weight") == 0].any(), (
            "zeros of the weight are zeros of what it stands for"
        )
        assert restored.any()


def restored_weight(program: Program) -> torch.Tensor:
    """What the dequantize node gives."""
    (node,) = [n for n in program.graph.nodes if n.name.startswith("dequantize_") and "activation" not in n.name]
    load = program.weights.load
    arguments = torch.fx.node.map_arg(node.args, lambda n: load(program.bindings[n.name].tensor))
    restored = node.target(*arguments)
    assert isinstance(restored, torch.Tensor)
    return restored


@pytest.mark.parametrize(
    ("scheme", "value"), [("w8a16", 1), ("w4a16-g32", -1), ("fp8-tensor", 2.0**-9), ("fp8-block", 1), ("nvfp4", 1)]
)
def test_one_code_in_place_of_a_zero_is_caught(scheme: str, value: float) -> None:
    coded = Quantize(scheme=scheme).run(masked(), context()).program  # type: ignore[arg-type]
    place = int((restored_weight(coded).flatten() == 0).nonzero()[0])
    with pytest.raises(InvalidProgram, match=r"after it: rule 7 broken at weight\.codes: 2:4, but 1 of 64 runs of 4"):
        verify_masks(with_value(coded, "weight.codes", place, value), after="it")


def test_zero_is_the_zero_point_where_there_is_one_and_either_zero_of_fp4() -> None:
    coded = Quantize(scheme="w4a16-g32-asym").run(masked(), context()).program
    point = coded.weights.load("weight.zero_point")
    assert point.any(), "or 0 would be the zero point"
    with pytest.raises(InvalidProgram, match=r"rule 7 broken at weight\.codes"):
        verify_masks(with_value(coded, "weight.codes", int((restored_weight(coded)[0] == 0).nonzero()[0]), 0))
    fp4 = Quantize(scheme="nvfp4").run(masked(), context()).program
    place = a_zero(fp4, "weight.codes")
    verify_masks(with_value(fp4, "weight.codes", place, 8))  # minus zero


def test_a_plan_has_nothing_to_read() -> None:
    program = masked()
    absent = {name: AbsentTensor(s.shape, s.dtype, name) for name, s in program.weights.items()}
    verify_masks(replace(program, weights=WeightStore(absent)))


def test_a_pruned_layer_takes_its_mask_along() -> None:
    program = masked()
    without = replace(program, masks={}, weights=program.weights.updated({}, keep={"bias"}))
    verify_masks(without, before=program)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"axis": 2}, "dimension 2 of [8, 32]"),
        ({"axis": -1}, "dimension -1"),
        ({"pattern": "2:5"}, "32 is not a multiple of 5"),
        ({"pattern": "block=3x4:0.5", "axis": -1}, "does not divide into 3x4"),
        ({"pattern": "dense"}, "no pattern 'dense'"),
        ({"fraction": 1.5}, "promises 1.5"),
    ],
)
def test_an_annotation_that_does_not_fit_breaks_rule_six(change: dict[str, object], part: str) -> None:
    program = masked()
    verify_program(program)
    mask = replace(program.masks["weight"], **change)  # type: ignore[arg-type]
    with pytest.raises(InvalidProgram, match="after x: rule 6 broken at weight") as caught:
        verify_program(replace(program, masks={"weight": mask}), after="x")
    assert part in str(caught.value)
