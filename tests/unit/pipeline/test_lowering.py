"""A backend's lowering steps are run as passes are: verified, timed, reported; and their values' range is checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from compile_sparse.backends.null import NullBackend
from compile_sparse.compiler.diagnostics import Diagnostic
from compile_sparse.compiler.errors import Refusal
from compile_sparse.compiler.extension.backend_contract import Lowered, LoweringStep
from compile_sparse.compiler.extension.pass_contract import PassContext, PassResult
from compile_sparse.compiler.extension.run_settings import DEFAULT_SETTINGS, RunSettings
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.ir.verifier import InvalidProgram
from compile_sparse.compiler.lowering import MixedPrecision
from compile_sparse.compiler.pipeline.lowering import lower_program
from compile_sparse.compiler.progress import Progress
from compile_sparse.compiler.targets.target import Target, find_target
from tests.support.contexts import context as any_context
from tests.toys import toy_program


class Gate(torch.nn.Module):
    """``(x @ W.T) * x``."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.eye(4) * scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.weight) * x


class Stepped(NullBackend):
    """The backend that prints programs, behind some steps."""

    def __init__(self, *steps: LoweringStep) -> None:
        self.steps = steps
        self.written: list[tuple[Program, Program]] = []

    def lowering_steps(self, target: Target, settings: RunSettings = DEFAULT_SETTINGS) -> Sequence[LoweringStep]:
        return self.steps

    def write(
        self,
        program: Program,
        prepared: Program,
        target: Target,
        out: Path,
        progress: Progress,
        settings: RunSettings = DEFAULT_SETTINGS,
    ) -> Lowered:
        self.written.append((program, prepared))
        return Lowered(files={}, form={"weights": "none"}, diagnostics=[Diagnostic("file", "CS2310", "Slow.")])


@dataclass(frozen=True)
class Step:
    """A step made of a function."""

    change: Callable[[Program], Program]
    modified: bool = True
    name: str = "swap operands"

    def run(self, program: Program, context: object = None) -> PassResult:
        found = Diagnostic("linear", "CS2301", "Left alone.")
        return PassResult(self.change(program), self.modified, diagnostics=[found])


def swapped(program: Program) -> Program:
    """A valid change: the product of two values in the other order."""
    edited = program.clone()
    node = next(node for node in edited.graph.nodes if node.target is torch.ops.aten.mul.Tensor)
    node.args = node.args[::-1]
    return edited


def without_value(program: Program) -> Program:
    """An invalid one: a call whose shape nobody knows."""
    edited = swapped(program)
    next(node for node in edited.graph.nodes if node.op == "call_function").meta.pop("val")
    return edited


def gate(scale: float = 1.0) -> Program:
    made = toy_program(Gate(scale), [torch.zeros(3, 4)], [{0: torch.export.Dim("batch")}])
    return replace(made, inputs=(replace(made.inputs[0], role="pixel_values"),))


@pytest.fixture
def program() -> Program:
    return gate()


@pytest.fixture
def context() -> PassContext:
    return any_context(goal=find_target("null"))


def test_a_step_that_breaks_the_program_is_named(program: Program, context: PassContext, tmp_path: Path) -> None:
    backend = Stepped(Step(swapped, name="harmless"), Step(without_value))
    with pytest.raises(InvalidProgram, match="after swap operands: rule 4"):
        lower_program(backend, program, context, tmp_path, verify_each=True)
    assert not backend.written


def test_a_step_that_denies_its_change_is_named(program: Program, context: PassContext, tmp_path: Path) -> None:
    with pytest.raises(InvalidProgram, match="swap operands says modified=False"):
        lower_program(Stepped(Step(swapped, modified=False)), program, context, tmp_path, verify_each=True)


def test_one_section_holds_steps_and_writing(program: Program, context: PassContext, tmp_path: Path) -> None:
    backend = Stepped(Step(swapped))
    _, section = lower_program(backend, program, context, tmp_path)
    assert section.name == "lower"
    assert section.achieved == {"weights": "none"}
    assert [entry.code for entry in section.skips] == ["CS2301", "CS2310"]
    ((given, prepared),) = backend.written
    assert given is program
    assert str(prepared.graph) == str(swapped(program).graph)


def test_values_that_a_step_puts_into_fp16_must_fit(context: PassContext, tmp_path: Path) -> None:
    """A weight of 6e4 fits fp16; what it makes of a normal value does not, and does fit bf16."""
    half = Stepped(MixedPrecision(torch.float16))
    with pytest.raises(Refusal, match="CS4432"):
        lower_program(half, gate(6e4), context, tmp_path)
    assert not half.written
    lower_program(half, gate(1.0), context, tmp_path)
    lower_program(Stepped(MixedPrecision(torch.bfloat16)), gate(6e4), context, tmp_path)
    assert len(half.written) == 1
