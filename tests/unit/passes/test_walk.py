"""The walk shows each layer what two whole runs show, once, and keeps no more than it must; refitting on it is exact."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

import pytest
import torch

from compile_sparse.compiler.execution.calibration import CalibrationStream
from compile_sparse.compiler.execution.executor import Executor
from compile_sparse.compiler.ir.linears import Linear, find_linears
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.ir.weights import ResidentTensor
from compile_sparse.compiler.progress import SilentProgress
from compile_sparse.compiler.residual.branches import find_branches
from compile_sparse.compiler.residual.remove import drop_branches
from compile_sparse.passes.reconstruction.least_squares import refit
from compile_sparse.passes.reconstruction.matching import objective_of
from compile_sparse.passes.reconstruction.regression import HELD_OUT
from compile_sparse.passes.reconstruction.walk import Gather, Walk, own_bias
from tests.deep import deep_program
from tests.unit.counting import count_calls
from tests.unit.passes.test_least_squares import cut, gatherer

GENERATOR = torch.Generator().manual_seed(2)
TEXT = CalibrationStream(
    tuple(tuple(torch.randint(3, 96, (length,), generator=GENERATOR).tolist()) for length in [24] * 16 + [16] * 8),
    tokens_per_batch=192,  # two batches of one length and one of another
)
SILENT = SilentProgress()


def observed(program: Program, names: Collection[str]) -> list[dict[str, torch.Tensor]]:
    """Values of ``names`` on every batch, from a run of the whole program."""
    found, executor = [], Executor(program)
    for feed in TEXT.feeds(program):
        values: dict[str, torch.Tensor] = {}
        executor.run(feed, observe={n: lambda v, n=n, values=values: values.update({n: v}) for n in names})
        found.append(values)
    return found


def rows(value: torch.Tensor) -> torch.Tensor:
    return value.reshape(-1, value.shape[-1])


def changed(program: Program, tensor: str, value: torch.Tensor) -> Program:
    return replace(program, weights=program.weights.updated({tensor: ResidentTensor(value.contiguous())}))


# -- refitting equals a slow reference


def slow_refit(
    dense: Program, pruned: Program, gather: Gather, stands_for: Mapping[str, str], damping: float
) -> tuple[Program, int]:
    """Both whole programs run again for every layer; the normal equations as they are in the book, solved in float64."""
    student, count = pruned, 0
    order = {node: place for place, node in enumerate(pruned.graph.nodes)}
    for layer in find_linears(pruned)[0]:
        goal = objective_of(layer, order)
        if len(layer.weight.users) > 1 or "logits" in {
            o.role for o in pruned.outputs if _node(pruned, o.name) is goal.value
        }:
            continue
        name = stands_for.get(goal.value.name, goal.value.name)
        wanted = [batch[name] for batch in observed(dense, [name])]
        seen = observed(student, [layer.input.name, *(other.name for other in goal.others)])
        tensor, bias = layer.tensor, own_bias(pruned, layer)
        weight = pruned.weights.load(tensor)
        weight = weight if layer.axis == 1 else weight.t()
        fitted, held = _equations(layer, bias is not None), _equations(layer, bias is not None)
        for values, target in zip(seen, wanted, strict=True):
            x = rows(values[layer.input.name])
            lacks = rows(gather(name, target))
            for other in goal.others:
                lacks = lacks - rows(values[other.name])
            lacks = lacks - x @ weight.T - (0 if bias is None else pruned.weights.load(bias))
            if bias is not None:
                x = torch.cat([x, torch.ones(len(x), 1)], 1)
            if goal.others:  # what enters a sum counts relative to the sum's size, token by token
                total = rows(target)
                counts = (1 / total.square().mean(1, keepdim=True)).sqrt()
                x, lacks = x * counts, lacks * counts
            split = len(x) - len(x) // HELD_OUT
            for sums, part in ((fitted, slice(None, split)), (held, slice(split, None))):
                sums[0] += (x[part].T @ x[part]).double()
                sums[1] += (x[part].T @ lacks[part]).double()
        trial = _solved(*fitted, damping, bias is not None)
        gained = 2 * (trial * held[1]).sum() - (trial * (held[0] @ trial)).sum()
        if gained <= 0:
            continue
        solution = _solved(fitted[0] + held[0], fitted[1] + held[1], damping, bias is not None)
        width = weight.shape[1]
        new = (weight.double() + solution[:width].T).float()
        student = changed(student, tensor, new if layer.axis == 1 else new.T)
        if bias is not None:
            student = changed(student, bias, (pruned.weights.load(bias).double() + solution[width]).float())
        count += 1
    return student, count


def _node(program: Program, output: str) -> object:
    return program.output_nodes[[o.name for o in program.outputs].index(output)]


def _equations(layer: Linear, intercept: bool) -> list[torch.Tensor]:
    value, result = layer.input.meta["val"], layer.node.meta["val"]
    size = int(value.shape[-1]) + intercept
    return [
        torch.zeros(size, size, dtype=torch.float64),
        torch.zeros(size, int(result.shape[-1]), dtype=torch.float64),
    ]


def _solved(second: torch.Tensor, cross: torch.Tensor, damping: float, intercept: bool) -> torch.Tensor:
    width = len(second) - intercept
    diagonal = second.diagonal()[:width]
    ridge = torch.zeros(len(second), dtype=torch.float64)
    ridge[:width] = (
        damping * diagonal + 1e-9 * diagonal.mean()
    )  # each input by its own size; a little where text has none
    if intercept:
        ridge[-1] = 1e-9 * second[-1, -1]  # not shrunk, but for what keeps the matrix positive definite
    return torch.linalg.solve(second + ridge.diag(), cross)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("llama", "channels"),  # no biases
        ("gpt2", "channels"),  # biases, and weights stored [K, N]
        ("gptj", "depth"),  # attention and MLP side by side, fitted to the far side of a gap
    ],
)
def test_refitting_equals_a_slow_reference(captured: Callable[[str], Program], name: str, what: str) -> None:
    dense = captured(name)
    stands_for: Mapping[str, str] = {}
    gather: Gather = lambda node, value: value  # noqa: E731
    if what == "depth":
        dropped = drop_branches(dense, [branch for branch in find_branches(dense) if branch.layer == 1])
        pruned, stands_for = dropped.program, dropped.stands_for
    else:
        analysis, keep, pruned = cut(dense, what)
        gather = gatherer(analysis, keep)
    done = refit(dense, pruned, TEXT, SILENT, gather=gather, stands_for=stands_for, dampings=[1.0])
    reference, count = slow_refit(dense, pruned, gather, stands_for, 1.0)
    assert done.layers == count > 0
    for tensor, source in reference.weights.items():
        expected, found = source.load().double(), done.program.weights.load(tensor).double()
        # Weights are float32: 2^-24 of the largest, and what rounding upstream moves.
        assert (found - expected).abs().max() <= 1e-6 * expected.abs().max(), tensor


# -- what a visit shows


def test_a_visit_shows_what_whole_runs_show(tiny_gpt2_program: Program) -> None:
    """The input as the student computes it after the layers before it changed; what the dense network has beside it."""
    dense = tiny_gpt2_program
    analysis, keep, pruned = cut(dense, "channels")
    gather = gatherer(analysis, keep)
    walk = Walk(dense, pruned, TEXT, gather=gather, dense_inputs=True)
    linears = [layer.node.name for layer in find_linears(pruned)[0]]
    assert [layer.node.name for layer in walk.layers] == linears[:-1]  # the last makes the logits
    for place, visit in enumerate(walk):
        name, goal = visit.layer.node.name, visit.objective
        seen = observed(walk.program, [visit.layer.input.name, *(other.name for other in goal.others)])
        beside = observed(dense, [visit.layer.input.name, goal.value.name])
        for batch, (x, target, dense_x) in enumerate(
            zip(visit.inputs(), visit.targets(), visit.dense_inputs(), strict=True)
        ):
            assert torch.equal(x, rows(seen[batch][visit.layer.input.name]))
            assert torch.equal(dense_x, rows(gather(visit.layer.input.name, beside[batch][visit.layer.input.name])))
            left = rows(gather(goal.value.name, beside[batch][goal.value.name]))
            for other in goal.others:
                left = left - rows(seen[batch][other.name])
            assert torch.equal(target, left)
        assert visit.weight.shape == (target.shape[1], x.shape[1])
        assert visit.bias is not None
        visit.replace(weight=visit.weight * 1.5, bias=visit.bias + place)
        stored = walk.program.weights.load(visit.layer.tensor)
        assert torch.equal(stored, (visit.weight * 1.5).T), name  # GPT-2 stores [K, N]
        assert stored.is_contiguous()


def test_in_parallel_every_layer_sees_the_dense_network(tiny_llama_program: Program) -> None:
    program = tiny_llama_program
    for sequential in (True, False):
        walk = Walk(program, program, TEXT, sequential=sequential)
        plain = observed(program, [layer.input.name for layer in walk.layers])
        same = []
        for visit in walk:
            same.append(all(map(torch.equal, visit.inputs(), (rows(v[visit.layer.input.name]) for v in plain))))
            visit.replace(weight=visit.weight * 1.5)
        assert all(same) is not sequential
        assert torch.equal(walk.program.weights.load(visit.layer.tensor), visit.weight * 1.5)


def test_dense_inputs_have_to_be_asked_for(tiny_llama_program: Program) -> None:
    visit = next(iter(Walk(tiny_llama_program, tiny_llama_program, TEXT)))
    with pytest.raises(KeyError):
        visit.dense_inputs()


def test_another_shape_is_refused(tiny_llama_program: Program) -> None:
    visit = next(iter(Walk(tiny_llama_program, tiny_llama_program, TEXT)))
    with pytest.raises(ValueError, match=visit.layer.node.name):
        visit.replace(weight=visit.weight[:, 1:])
    with pytest.raises(ValueError, match="none"):
        visit.replace(bias=torch.zeros(len(visit.weight)))


# -- what it costs


def test_each_node_runs_once_per_batch(tiny_llama_program: Program) -> None:
    """Of either program; and of the dense one none, where nobody asks for its values."""
    for asks in (True, False):
        dense, student = tiny_llama_program.clone(), tiny_llama_program.clone()
        walk = Walk(dense, student, TEXT)
        dense_calls, calls = count_calls(dense), count_calls(student)
        assert len(walk.layers) == 2 * 7
        for visit in walk:
            list(visit.inputs())
            if asks:
                list(visit.targets())
        *_, last = walk.layers
        place = student.node(last.node.name)
        done = {node.name: len(TEXT) if node < place else 0 for node in student.graph.nodes if node.name in calls}
        assert calls == done
        # A target is behind its layer: the sum that the last one feeds.
        assert sum(dense_calls.values()) == ((sum(done.values()) + 2 * len(TEXT)) if asks else 0)
        assert max(dense_calls.values()) == (len(TEXT) if asks else 0)


def test_dense_values_are_released_behind_the_walk() -> None:
    program = deep_program("llama")
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()

    def gather(name: str, value: torch.Tensor) -> torch.Tensor:
        alive.add(value)
        return value.clone()

    most = visits = 0
    for visit in Walk(program, program, TEXT, gather=gather):
        for _ in visit.targets():
            pass
        most, visits = max(most, len(alive)), visits + 1
    assert visits == 4 * 7
    # One layer's values, and those the dense run itself still needs: the residual stream and query, key and value.
    assert most <= 5 * len(TEXT)
