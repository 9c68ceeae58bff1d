"""A call is run on fake values once, and again as soon as anything about it differs."""

from __future__ import annotations

import pytest
import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher

from compile_sparse.compiler.ir import fake_propagation
from compile_sparse.compiler.ir.edit import fake_mode_of
from compile_sparse.compiler.ir.fake_propagation import propagate_fake_tensors
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.ir.verifier import InvalidProgram, verify_program
from tests.toys import Applied, toy_program


@pytest.fixture
def program() -> Program:
    """``y = x * 2 + x`` on whole numbers, verified; the first size is dynamic."""
    made = toy_program(
        Applied(lambda x: x * 2 + x), [torch.ones(3, 8, dtype=torch.int64)], [{0: torch.export.Dim("n")}]
    )
    verify_program(made)
    return made


def call(program: Program, name: str) -> fx.Node:
    return next(node for node in program.graph.nodes if node.op == "call_function" and node.name.startswith(name))


@pytest.fixture
def runs(program: Program, monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Grows with every call that is run."""
    found: list[None] = []

    def counted() -> object:
        found.append(None)
        return enable_python_dispatcher()

    monkeypatch.setattr(fake_propagation, "enable_python_dispatcher", counted)
    return found


def test_what_is_as_it_was_is_not_run_again(program: Program, runs: list[None]) -> None:
    copy = program.clone()
    verify_program(copy)
    propagate_fake_tensors(copy)
    assert not runs


def test_readers_of_an_equal_value_are_not_run_again(program: Program, runs: list[None]) -> None:
    product = call(program, "mul")
    product.args = (product.args[0], 3)
    propagate_fake_tensors(program)
    assert len(runs) == 1


def test_a_number_of_another_type_is_another_call(program: Program) -> None:
    """2 equals 2.0, and makes another product."""
    product = call(program, "mul")
    product.args = (product.args[0], 2.0)
    with pytest.raises(InvalidProgram, match="rule 4 broken at mul"):
        verify_program(program)
    propagate_fake_tensors(program)
    assert product.meta["val"].dtype == call(program, "add").meta["val"].dtype == torch.float32


def test_another_operator_is_another_call(program: Program) -> None:
    call(program, "mul").target = torch.ops.aten.ge.Scalar
    with pytest.raises(InvalidProgram, match="rule 4 broken at mul"):
        verify_program(program)


@pytest.mark.parametrize("sizes", [(5, 8), (1, 8)])
def test_another_size_of_an_input_reaches_every_reader(program: Program, sizes: tuple[int, ...]) -> None:
    with fake_mode_of(program):
        program.node(program.inputs[0].placeholder).meta["val"] = torch.empty(sizes, dtype=torch.int64)
    propagate_fake_tensors(program)
    assert [tuple(call(program, name).meta["val"].shape) for name in ("mul", "add")] == [sizes, sizes]


def test_other_strides_are_another_value(program: Program) -> None:
    with fake_mode_of(program):
        turned = torch.empty(8, 3, dtype=torch.int64).t()
        program.node(program.inputs[0].placeholder).meta["val"] = turned
    propagate_fake_tensors(program)
    assert call(program, "add").meta["val"].stride() == (1, 3)
