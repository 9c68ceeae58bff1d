"""Removing residual branches: against models built without the block, and against blocks that give zero."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch

from compile_sparse.compiler.axes.analysis import analyse
from compile_sparse.compiler.axes.rewrite import rewrite
from compile_sparse.compiler.capture import capture_model
from compile_sparse.compiler.errors import ModelError
from compile_sparse.compiler.execution.executor import Executor, decoder_inputs
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.ir.verifier import verify_program
from compile_sparse.compiler.ir.weights import AbsentTensor, ResidentTensor, WeightStore
from compile_sparse.compiler.residual.branches import Branch, find_branches
from compile_sparse.compiler.residual.remove import Dropped, drop_branches
from compile_sparse.testing.models import example_inputs
from compile_sparse.testing.oracles import compare
from tests.deep import DEPTH, deep_program, without_blocks

MODELS = ["llama", "gpt2", "opt", "gemma2", "phi", "gpt_neox", "bert", "vit"]
PRE_NORM = [name for name in MODELS if name != "bert"]


def of_layers(branches: Sequence[Branch], layers: Sequence[int]) -> list[Branch]:
    return [branch for branch in branches if branch.layer in layers]


@pytest.mark.parametrize("name", MODELS)
def test_dropped_blocks_equal_a_model_built_without_them(name: str) -> None:
    """Exact: the same operators run on the same numbers in the same order."""
    program = deep_program(name)
    dropped = drop_branches(program, of_layers(find_branches(program), (1, 2))).program
    expected = capture_model(without_blocks(name, (1, 2)))
    verify_program(dropped)
    assert [entry.name for entry in dropped.inputs] == [entry.name for entry in expected.inputs]
    assert [entry.layer for entry in dropped.inputs] == [entry.layer for entry in expected.inputs]
    assert dropped.outputs == expected.outputs
    assert dropped.parameter_count() == expected.parameter_count()
    for batch, length, past in ((2, 5, 3), (3, 7, 0)):
        inputs = example_inputs(expected, batch, length, past)
        got, wanted = Executor(dropped).run(inputs), Executor(expected).run(inputs)
        assert got.keys() == wanted.keys()
        for key in wanted:
            assert torch.equal(got[key], wanted[key]), key


@pytest.mark.parametrize("layers", [(0,), (3,), (2, 3), (0, 3)])
@pytest.mark.parametrize("name", MODELS)
def test_any_blocks_can_go(name: str, layers: tuple[int, ...]) -> None:
    program = deep_program(name)
    dropped = drop_branches(program, of_layers(find_branches(program), layers)).program
    inputs = example_inputs(dropped, 2, 6, past=0)
    got = next(iter(Executor(dropped).run(inputs).values()))
    given = {key: value for key, value in inputs.items() if not key.startswith("past")}
    with torch.no_grad():
        wanted = without_blocks(name, layers)(**given)[0]
    assert (got - wanted).abs().max() <= rounding(wanted)


def rounding(expected: torch.Tensor) -> float:
    """Two orders of float32 summation over at most 88 terms, through 4 matrix products a block and the head."""
    return float(torch.finfo(torch.float32).eps * 88**0.5 * (4 * DEPTH + 1) * expected.abs().max())


def zeroed(program: Program, branches: Sequence[Branch]) -> Program:
    """``program`` with zeros for everything only these branches read: each then adds exactly nothing."""
    names = {name for branch in branches for name in branch.weights}
    zeros = {name: ResidentTensor(torch.zeros(program.weights[name].shape)) for name in names}
    return replace(program, weights=program.weights.updated(zeros))


CHOICES: dict[str, Callable[[Branch], bool]] = {
    "one attention": lambda b: b.kind == "attention" and b.layer == 1,
    "one mlp": lambda b: b.kind == "mlp" and b.layer == 2,
    "last attention": lambda b: b.kind == "attention" and b.layer == DEPTH - 1,
    "all mlp": lambda b: b.kind == "mlp",
    "mlp and the attention after it": lambda b: (b.kind, b.layer) in {("mlp", 1), ("attention", 2)},
    "three in a row": lambda b: (b.kind, b.layer) in {("mlp", 0), ("attention", 1), ("mlp", 1), ("attention", 2)},
}


def both_runs(program: Program, dropped: Dropped, dense: Program, watch: dict[str, str]) -> list[torch.Tensor]:
    """Pairs of values that must agree: outputs by layer, and streams by ``watch`` (dropped -> dense)."""
    seen: dict[tuple[str, str], torch.Tensor] = {}
    inputs = example_inputs(program, 2, 5)
    layers = [e.layer for e in program.inputs if e.layer >= 0]
    removed = set(layers) - surviving_layers(program, dropped.program)
    order = [e for e in program.inputs if e.layer not in removed]
    fewer = {new.name: inputs[old.name] for old, new in zip(order, dropped.program.inputs, strict=True)}
    got = Executor(dropped.program).run(
        fewer, observe={k: lambda v, k=k: seen.__setitem__(("new", k), v) for k in watch}
    )
    wanted = Executor(dense).run(
        inputs, observe={v: lambda x, v=v: seen.__setitem__(("dense", v), x) for v in watch.values()}
    )
    outputs = [o for o in program.outputs if o.layer not in removed]
    pairs = [(got[new.name], wanted[old.name]) for old, new in zip(outputs, dropped.program.outputs, strict=True)]
    pairs += [(seen["new", k].flatten(0, -2), seen["dense", v].flatten(0, -2)) for k, v in watch.items()]
    return pairs


def surviving_layers(before: Program, after: Program) -> set[int]:
    left = {entry.placeholder for entry in after.inputs}
    return {entry.layer for entry in before.inputs if entry.placeholder in left}


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("name", MODELS)
def test_dropped_branches_equal_branches_that_give_zero(name: str, choice: str) -> None:
    """Exact: ``x + 0`` is ``x``. The same holds for the streams that ``stands_for`` pairs."""
    program = deep_program(name)
    chosen = [branch for branch in find_branches(program) if CHOICES[choice](branch)]
    if {b.kind for b in chosen} == {"attention", "mlp"} and name == "bert":
        chosen = [b for b in chosen if (b.kind, b.layer) != ("mlp", 1)]  # a whole post-norm block loses its norms too
    dropped = drop_branches(program, chosen)
    verify_program(dropped.program)
    gone = {name for branch in chosen for name in branch.weights}
    assert gone and not gone & set(dropped.program.weights)
    for got, wanted in both_runs(program, dropped, zeroed(program, chosen), dict(dropped.stands_for)):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("name", PRE_NORM)
def test_stands_for_pairs_the_stream_before_a_run_with_the_dense_stream_after_it(name: str) -> None:
    program = deep_program(name)
    branches = find_branches(program)
    ends = [[b.add for b in branches if b.layer == layer][-1] for layer in range(DEPTH)]
    assert drop_branches(program, of_layers(branches, (1, 2))).stands_for == {ends[0]: ends[2]}
    assert drop_branches(program, of_layers(branches, (3,))).stands_for == {ends[2]: ends[3]}
    assert drop_branches(program, of_layers(branches, (0, 1))).stands_for == {}  # the stream is the embedding
    assert drop_branches(program, of_layers(branches, (0, 2))).stands_for == {ends[1]: ends[2]}
    parallel = branches[0].add == branches[1].add
    (attention,) = [b for b in branches if b.kind == "attention" and b.layer == 1]
    before = attention.add if parallel else ends[0]
    assert drop_branches(program, [attention]).stands_for == {before: attention.add}


def test_post_norm_streams_stand_for_nothing() -> None:
    program = deep_program("bert")
    branches = find_branches(program)
    assert drop_branches(program, of_layers(branches, (1,))).stands_for == {}
    assert drop_branches(program, branches[2:3]).stands_for == {}


def test_a_post_norm_attention_alone_keeps_its_norm() -> None:
    program = deep_program("bert")
    (attention,) = [b for b in find_branches(program) if b.kind == "attention" and b.layer == 1]
    weights = set(drop_branches(program, [attention]).program.weights)
    assert "encoder.layer.1.attention.output.LayerNorm.weight" in weights
    assert "encoder.layer.1.attention.output.dense.weight" not in weights


def test_cached_decoding_after_a_drop_equals_one_pass() -> None:
    program = deep_program("llama")
    chosen = [
        b for b in find_branches(program) if (b.kind, b.layer) in {("attention", 0), ("mlp", 1), ("attention", 2)}
    ]
    dropped = drop_branches(program, chosen).program
    assert [e.name for e in dropped.inputs if e.role == "past_key"] == [f"past_key_values.{i}.key" for i in range(2)]
    ids = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(3))
    executor = Executor(dropped)
    whole = executor.run(decoder_inputs(dropped, ids))["logits"]
    outputs: dict[str, torch.Tensor] = {}
    steps = []
    for start, stop in ((0, 5), (5, 6), (6, 9)):
        outputs = executor.run(decoder_inputs(dropped, ids[:, start:stop], past=outputs))
        steps.append(outputs["logits"])
    assert (torch.cat(steps, 1) - whole).abs().max() <= rounding(whole)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_channels_of_a_shallower_model_are_pruned_exactly(name: str) -> None:
    program = deep_program(name)
    chosen = [b for b in find_branches(program) if b.layer == 1 or (b.kind, b.layer) == ("attention", 2)]
    dropped = drop_branches(program, chosen).program
    analysis = analyse(dropped)
    groups = analysis.prunable("channels")
    assert len(groups) == DEPTH - 1
    keep = {}
    for index, group in enumerate(groups):
        mask = torch.ones(group.size, dtype=torch.bool)
        mask[index::3] = False
        keep[group.anchor] = mask
    report = compare(rewrite(dropped, analysis, keep), analysis, keep, example_inputs(dropped, 2, 5))
    assert report.holds, report


def test_dropping_twice_equals_dropping_at_once() -> None:
    program = deep_program("llama")
    branches = find_branches(program)
    once = drop_branches(program, of_layers(branches, (1, 2))).program
    first = drop_branches(program, of_layers(branches, (2,))).program
    twice = drop_branches(first, of_layers(find_branches(first), (1,))).program
    assert str(once.graph) == str(twice.graph)
    assert once.inputs == twice.inputs


def test_no_weight_is_read_and_the_given_program_stays() -> None:
    program = deep_program("llama")
    absent = {n: AbsentTensor(s.shape, s.dtype, n) for n, s in program.weights.items()}
    planned = replace(program, weights=WeightStore(absent))
    before = str(planned.graph)
    dropped = drop_branches(planned, of_layers(find_branches(planned), (1, 3)))
    assert str(planned.graph) == before
    assert not dropped.program.weights.has_values
    assert dropped.program.parameter_count() < planned.parameter_count()


def test_nothing_to_drop_gives_the_same_program() -> None:
    program = deep_program("llama")
    assert drop_branches(program, []).program is program


def test_a_decoder_keeps_one_cache() -> None:
    program = deep_program("llama")
    attentions = [b for b in find_branches(program) if b.kind == "attention"]
    assert drop_branches(program, attentions[:3]).program.outputs[-1].name == "present.0.value"
    with pytest.raises(ModelError) as caught:
        drop_branches(program, attentions)
    assert (caught.value.code, caught.value.exit_code) == ("CS2111", 4)


def test_branches_of_another_program_are_refused() -> None:
    branches = find_branches(deep_program("llama"))
    with pytest.raises(KeyError):
        drop_branches(deep_program("bert"), branches)
