"""Layerwise runs compute what plain runs compute, and see weights change under way."""

from __future__ import annotations

import pytest
import torch

from compile_sparse.compiler.errors import UsageError
from compile_sparse.compiler.execution import layerwise
from compile_sparse.compiler.execution.executor import Executor, decoder_inputs
from compile_sparse.compiler.execution.layerwise import LayerwiseExecutor
from compile_sparse.compiler.ir.linears import find_linears
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.ir.weights import ResidentTensor
from tests.toys import toy_program

WINDOWS = torch.tensor([[[5, 9, 12, 40], [3, 8, 7, 20]], [[60, 2, 11, 33], [90, 4, 5, 6]]])


def test_every_value_equals_a_plain_run(tiny_llama_program: Program) -> None:
    program = tiny_llama_program
    feeds = [decoder_inputs(program, ids) for ids in WINDOWS]
    names = [linear.node.name for linear in find_linears(program)[0]]
    plain: dict[tuple[int, str], torch.Tensor] = {}
    for batch, feed in enumerate(feeds):
        observers = {name: lambda v, key=(batch, name): plain.__setitem__(key, v) for name in names}
        Executor(program).run(feed, observe=observers)
    run = LayerwiseExecutor(program, feeds)
    seen: dict[tuple[int, str], torch.Tensor] = {}
    for name in names:
        run.advance(
            program.node(name),
            inclusive=True,
            watch={name: lambda batch, value, name=name: seen.__setitem__((batch, name), value)},
        )
        assert run.passed(program.node(name))
    assert seen.keys() == plain.keys()
    assert all(torch.equal(seen[key], plain[key]) for key in seen)


def test_a_replaced_weight_counts_from_where_the_walk_stands(tiny_llama_program: Program) -> None:
    program = tiny_llama_program
    first, second, *_ = find_linears(program)[0]
    run = LayerwiseExecutor(program, [decoder_inputs(program, WINDOWS[0])])
    run.advance(first.node, inclusive=True)
    assert run.is_live(first.node)
    before = run.value(0, first.node).clone()
    assert before.any()
    for linear in (first, second):
        zeros = torch.zeros(program.weights[linear.tensor].shape)
        run.replace(linear.tensor, ResidentTensor(zeros))
    kept: dict[str, torch.Tensor] = {"first": run.value(0, first.node)}
    run.advance(second.node, inclusive=True, watch={second.node.name: lambda batch, value: kept.update(second=value)})
    assert torch.equal(kept["first"], before)  # computed before the change
    assert not kept["second"].any()


def test_values_nobody_needs_are_dropped(tiny_llama_program: Program) -> None:
    program = tiny_llama_program
    run = LayerwiseExecutor(program, [decoder_inputs(program, WINDOWS[0])])
    last = find_linears(program)[0][-1].node
    run.advance(last, inclusive=True)
    live = [node for node in program.graph.nodes if run.is_live(node)]
    # What is left is what the rest of the graph reads; cached keys and values, which are only outputs, are gone.
    assert all(any(user.op == "call_function" for user in node.users) for node in live)
    assert len(live) < 10


class Scaled(torch.nn.Module):
    """Two linears with one weight that is computed from the stored one: ``x W^T W^T``, ``W`` three times what is stored."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.eye(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight * 3
        return torch.nn.functional.linear(torch.nn.functional.linear(x, weight), weight)


def scaled() -> tuple[Program, list[int]]:
    """``Scaled``, and a list that grows whenever the weight is computed."""
    program = toy_program(Scaled(), [torch.zeros(2, 4)])
    mul = next(node for node in program.graph.nodes if "mul" in node.name)
    original, calls = mul.target, []
    mul.target = lambda *arguments: calls.append(1) or original(*arguments)
    return program, calls


def test_what_depends_on_weights_alone_is_computed_once_for_all_batches() -> None:
    program, calls = scaled()
    run = LayerwiseExecutor(program, [{"x0": torch.ones(2, 4)} for _ in range(5)])
    *_, last = (node for node in program.graph.nodes if node.op == "call_function")
    seen: list[torch.Tensor] = []
    run.advance(last, inclusive=True, watch={last.name: lambda batch, value: seen.append(value)})
    assert len(calls) == 1
    assert all(torch.equal(value, torch.full((2, 4), 9.0)) for value in seen)
    assert len(seen) == 5


def test_what_depends_on_a_replaced_weight_changes_with_it() -> None:
    program, _ = scaled()
    run = LayerwiseExecutor(program, [{"x0": torch.ones(2, 4)}])
    first, last = [node for node in program.graph.nodes if "linear" in node.name]
    run.advance(first, inclusive=True)
    run.replace("weight", ResidentTensor(2 * torch.eye(4)))
    seen: list[torch.Tensor] = []
    run.advance(last, inclusive=True, watch={last.name: lambda batch, value: seen.append(value)})
    assert torch.equal(seen[0], torch.full((2, 4), 18.0))
    assert torch.equal(run.value(0, first.args[1]), 6 * torch.eye(4))


def test_inputs_can_be_watched() -> None:
    program, _ = scaled()
    run = LayerwiseExecutor(program, [{"x0": torch.full((2, 4), float(batch))} for batch in range(3)])
    place, seen = program.node(program.inputs[0].placeholder), []
    run.advance(
        place, inclusive=True, watch={place.name: lambda batch, value: seen.append((batch, float(value[0, 0])))}
    )
    assert seen == [(0, 0.0), (1, 1.0), (2, 2.0)]


def test_a_long_way_is_walked_in_stages(tiny_llama_program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each loads its own weights, for all batches once."""
    program, loads = tiny_llama_program, []
    monkeypatch.setattr(layerwise, "STAGE_BYTES", 1)
    run = LayerwiseExecutor(program, [decoder_inputs(program, ids) for ids in WINDOWS])
    stages = list(run._stages(len(list(program.graph.nodes)) - 1))
    linears = [linear.node for linear in find_linears(program)[0]]
    assert all(sum(node in linears for node in stage) <= 1 for stage in stages)
    for linear in find_linears(program)[0]:
        source = ResidentTensor(program.weights.load(linear.tensor))
        object.__setattr__(source, "load", lambda source=source: loads.append(source) or source.value)
        run.replace(linear.tensor, source)
    run.advance(linears[-1], inclusive=True)
    assert len(loads) == len(linears)


def test_a_missing_input_is_named() -> None:
    with pytest.raises(UsageError) as caught:
        LayerwiseExecutor(scaled()[0], [{"pixels": torch.ones(2, 4)}])
    assert caught.value.code == "CS1033"
