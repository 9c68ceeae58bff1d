"""Staged runs compute what plain runs compute, and see weights change under way."""

from __future__ import annotations

import torch

from compile_sparse.compiler.execution.executor import Executor, decoder_inputs
from compile_sparse.compiler.execution.layerwise import LayerwiseExecutor
from compile_sparse.compiler.ir.linears import find_linears
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.ir.weights import ResidentTensor

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
