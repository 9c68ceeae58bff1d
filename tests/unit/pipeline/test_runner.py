"""The runner: order, the honesty of ``modified``, time and memory."""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import ClassVar

import pytest
import torch

from compile_sparse.compiler.diagnostics import Diagnostic
from compile_sparse.compiler.extension.pass_contract import Pass, PassContext, PassResult, Phase
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.ir.verifier import InvalidProgram
from compile_sparse.compiler.ir.weights import ResidentTensor
from compile_sparse.compiler.pipeline.runner import observed, run_passes, structural_digest
from tests.support.contexts import context
from tests.toys import toy_program
from tests.unit.passes.running import Linear


def step(change: Callable[[Program], Program], modified: bool, called: str = "step") -> Pass:
    """A pass made of a function."""

    class Step(Pass):
        name: ClassVar[str] = called
        phase: ClassVar[Phase] = "structural"
        changes_numerics: ClassVar[bool] = False

        def run(self, program: Program, context: PassContext) -> PassResult:
            return PassResult(
                change(program),
                modified,
                requested={"share": 0.5},
                achieved={"share": 0.25},
                diagnostics=[Diagnostic("layer", "CS2104", "It is frozen.")],
                notes=["Rounded."],
            )

    return Step()


def doubled(program: Program) -> Program:
    weight = ResidentTensor(program.weights.load("weight") * 2)
    return replace(program, weights=program.weights.updated({"weight": weight}))


def rewired(program: Program) -> Program:
    edited = program.clone()
    linear = next(node for node in edited.graph.nodes if node.op == "call_function")
    with edited.graph.inserting_after(linear):
        relu = edited.graph.call_function(torch.ops.aten.relu.default, (linear,))
    relu.meta = dict(linear.meta)
    linear.replace_all_uses_with(relu, delete_user_cb=lambda user: user is not relu)
    return edited


def dead_code(program: Program) -> Program:
    edited = program.clone()
    linear = next(node for node in edited.graph.nodes if node.op == "call_function")
    with edited.graph.inserting_after(linear):
        edited.graph.call_function(torch.ops.aten.relu.default, (linear,)).meta = dict(linear.meta)
    return edited


@pytest.fixture(scope="module")
def program() -> Program:
    return toy_program(Linear(torch.ones(3, 4)), [torch.zeros(2, 4)])


@pytest.mark.parametrize("change", [doubled, rewired])
def test_a_change_that_is_denied_is_caught(program: Program, change: Callable[[Program], Program]) -> None:
    with pytest.raises(InvalidProgram, match="pass step says modified=False, but the digest says True"):
        run_passes(program, [step(change, modified=False)], context(), verify_each=True)


@pytest.mark.parametrize("change", [lambda p: p, Program.clone])
def test_a_change_that_is_claimed_is_caught(program: Program, change: Callable[[Program], Program]) -> None:
    with pytest.raises(InvalidProgram, match="says modified=True"):
        run_passes(program, [step(change, modified=True)], context(), verify_each=True)


@pytest.mark.parametrize(("change", "modified"), [(doubled, True), (rewired, True), (Program.clone, False)])
def test_an_honest_pass_is_accepted(program: Program, change: Callable[[Program], Program], modified: bool) -> None:
    run_passes(program, [step(change, modified)], context(), verify_each=True)


def test_a_pass_that_breaks_the_ir_is_named(program: Program) -> None:
    with pytest.raises(InvalidProgram, match="after untidy: rule 5"):
        run_passes(program, [step(dead_code, True, "untidy")], context(), verify_each=True)


def test_nothing_is_checked_unless_asked(program: Program) -> None:
    run_passes(program, [step(dead_code, False)], context())


def test_passes_run_in_order_each_on_the_result_of_the_one_before(program: Program) -> None:
    last, sections = run_passes(program, [step(doubled, True, "first"), step(doubled, True, "second")], context())
    assert torch.equal(last.weights.load("weight"), torch.full((3, 4), 4.0))
    assert [section.name for section in sections] == ["first", "second"]
    assert torch.equal(program.weights.load("weight"), torch.ones(3, 4))


def test_a_section_says_what_was_asked_done_and_left_alone(program: Program) -> None:
    _, (section,) = run_passes(program, [step(doubled, True)], context())
    assert section.requested == {"share": 0.5}
    assert section.achieved == {"share": 0.25}
    assert [(skip.where, skip.code, skip.why) for skip in section.skips] == [("layer", "CS2104", "It is frozen.")]
    assert section.notes == ("Rounded.",)


@contextmanager
def resident(size: int) -> Iterator[None]:
    """So many bytes held and given back. Mapped: an allocator may hand out free pages, which are resident already."""
    with mmap.mmap(-1, size) as pages:
        pages.write(b"\1" * size)
        yield


def test_time_and_memory_are_those_of_the_pass(program: Program) -> None:
    size = 96 << 20

    def expensive(given: Program) -> Program:
        with resident(size):
            time.sleep(0.2)
        return doubled(given)

    _, (cheap, costly) = run_passes(program, [step(doubled, True), step(expensive, True)], context())
    assert cheap.seconds is not None
    assert costly.seconds is not None
    assert cheap.seconds < 0.2 <= costly.seconds
    assert cheap.peak_rss_bytes is not None
    assert costly.peak_rss_bytes is not None
    assert cheap.peak_rss_bytes > 0
    assert costly.peak_rss_bytes - cheap.peak_rss_bytes >= 0.9 * size


def test_observed_falls_again() -> None:
    with observed() as high, resident(96 << 20):
        time.sleep(0.1)
    with observed() as low:
        time.sleep(0.05)
    assert low.peak_rss_bytes < high.peak_rss_bytes - (64 << 20)


def test_the_digest_sees_graph_bindings_and_weights(program: Program) -> None:
    same = structural_digest(program.clone())
    assert same == structural_digest(program)
    buffer = {name: replace(binding, kind="buffer") for name, binding in program.bindings.items()}
    changed = [doubled(program), rewired(program), replace(program, bindings=buffer)]
    digests = {structural_digest(other) for other in changed}
    assert len(digests) == len(changed)
    assert same not in digests
