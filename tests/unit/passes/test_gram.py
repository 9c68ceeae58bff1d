"""Gram matrices equal the sums of the observed values, and cost one run of the model."""

from __future__ import annotations

import weakref
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from compile_sparse.compiler.execution.calibration import CalibrationStream
from compile_sparse.compiler.execution.executor import Executor
from compile_sparse.compiler.ir.linears import find_linears
from compile_sparse.compiler.progress import SilentProgress
from compile_sparse.passes.reconstruction.matching import objective_of
from compile_sparse.passes.statistics import gram as module
from compile_sparse.passes.statistics.gram import each_gram
from tests.deep import DEPTH, deep_program
from tests.unit.counting import count_calls


def _stream(seed: int = 0) -> CalibrationStream:
    generator = torch.Generator().manual_seed(seed)
    lengths = (9, 9, 9, 6, 6)  # two lengths, more than one batch
    windows = tuple(tuple(torch.randint(3, 96, (n,), generator=generator).tolist()) for n in lengths)
    return CalibrationStream(windows, tokens_per_batch=18)


def _inputs(program) -> list[str]:
    return list(dict.fromkeys(linear.input.name for linear in find_linears(program)[0]))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_sums_equal_brute_force(captured, name):
    program, stream = captured(name), _stream()
    names = _inputs(program)
    rows: dict[str, list[torch.Tensor]] = {each: [] for each in names}
    executor = Executor(program)
    for feed in stream.feeds(program):
        executor.run(feed, observe={n: lambda v, n=n: rows[n].append(v.flatten(0, -2).double()) for n in names})

    found = dict(each_gram(program, names, stream, SilentProgress()))

    assert list(found) == names  # graph order
    for each, gram in found.items():
        x = torch.cat(rows[each])
        assert gram.count == len(x) == stream.tokens
        # GEMMs of one batch are in float32: at most 18 rows, so 18 roundings of 2^-24 of sums of |x_i x_j|.
        slack = 18 * 2.0**-24 * (x.abs().T @ x.abs())
        assert ((gram.second - x.T @ x).abs() <= slack + 1e-12).all()
        torch.testing.assert_close(gram.total, x.sum(0), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gram.mean, x.mean(0), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gram.covariance, x.T.cov(correction=0), rtol=1e-4, atol=1e-5)


def test_rows_count_relative_to_a_later_value(captured):
    program, stream = captured("llama"), _stream()
    layers, _ = find_linears(program)
    order = {node: place for place, node in enumerate(program.graph.nodes)}
    sums = {layer.input.name: objective_of(layer, order) for layer in layers}
    relative_to = {name: found.value.name for name, found in sums.items() if found.others}
    names = _inputs(program)
    rows: dict[str, list[torch.Tensor]] = {each: [] for each in {*names, *relative_to.values()}}
    executor = Executor(program)
    for feed in stream.feeds(program):
        executor.run(feed, observe={n: lambda v, n=n: rows[n].append(v.flatten(0, -2).double()) for n in rows})

    found = dict(each_gram(program, names, stream, SilentProgress(), relative_to=relative_to))

    assert list(found) == names and len(relative_to) == len(names) // 2
    for name, gram in found.items():
        x, weights = torch.cat(rows[name]), 1.0
        if name in relative_to:
            weights = 1.0 / torch.cat(rows[relative_to[name]]).square().mean(1, keepdim=True)
        torch.testing.assert_close(gram.second, x.T @ (x * weights), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(gram.total, (x * weights).sum(0), rtol=1e-4, atol=1e-4)
        assert gram.count == len(x)


def test_a_later_value_may_lie_behind_other_grams(captured):
    """Every Gram relative to the last sum of the network: all are waiting when it comes, and all are right."""
    program, stream = captured("llama"), _stream()
    layers, _ = find_linears(program)
    order = {node: place for place, node in enumerate(program.graph.nodes)}
    last = [found.value.name for found in (objective_of(layer, order) for layer in layers) if found.others][-1]
    names = _inputs(program)[:-1]
    found = dict(each_gram(program, names, stream, SilentProgress(), relative_to=dict.fromkeys(names, last)))
    alone = {
        name: dict(each_gram(program, [name], stream, SilentProgress(), relative_to={name: last}))[name]
        for name in (names[0], names[-1])
    }
    assert list(found) == names
    assert all(torch.equal(found[name].second, gram.second) for name, gram in alone.items())


def test_layers_that_read_one_value_share_one_gram(tiny_llama_program):
    linears, _ = find_linears(tiny_llama_program)
    names = [linear.input.name for linear in linears]
    found = dict(each_gram(tiny_llama_program, names, _stream(), SilentProgress()))
    # Two layers of query, key and value; output; gate and up; down; and the logits.
    assert len(names) == 2 * 7 + 1
    assert len(found) == 2 * 4 + 1


def test_each_node_runs_once_per_batch_and_one_gram_is_held_at_a_time(monkeypatch):
    """However deep the model: neither the number of runs nor memory follows the number of Grams."""
    program, stream = deep_program("llama").clone(), _stream()
    names, calls = _inputs(program), count_calls(program)
    alive = most = 0

    class Counting(module._Sums):
        def __init__(self, width: int) -> None:
            nonlocal alive, most
            super().__init__(width)
            alive += 1
            most = max(most, alive)
            weakref.finalize(self.second, dropped)

    def dropped() -> None:
        nonlocal alive
        alive -= 1

    monkeypatch.setattr(module, "_Sums", Counting)
    seen = []
    for name, gram in each_gram(program, names, stream, SilentProgress()):
        seen.append(name)
        del gram
    assert seen == names
    assert len(names) == 4 * DEPTH + 1
    assert (most, alive) == (1, 0)
    last = program.node(names[-1])
    done = [node.name for node in program.graph.nodes if node.name in calls and node <= last]
    assert set(calls) - set(done), "the logits are not needed"
    assert {name: calls[name] for name in done} == dict.fromkeys(done, len(stream))
    assert sum(calls.values()) == len(done) * len(stream)


def test_the_stream_is_lazy(tiny_llama_program):
    program = tiny_llama_program.clone()
    names, calls = _inputs(program), count_calls(program)
    parts = each_gram(program, names, _stream(), SilentProgress())
    assert next(parts)[0] == names[0]
    assert calls[names[0]] == len(_stream())
    assert not calls[names[1]]


def test_progress_counts_nodes_and_batches(tiny_llama_program):
    names, stream, told = _inputs(tiny_llama_program), _stream(), []

    class Told(SilentProgress):
        @contextmanager
        def task(self, label, total=None):
            told.append((label, total))
            yield SimpleNamespace(advance=lambda steps=1: told.append(steps))

    dict(each_gram(tiny_llama_program, names, stream, Told()))
    assert told[0] == ("observe inputs", len(names) * len(stream))
    assert told[1:] == [1] * (len(names) * len(stream))


def test_an_unknown_node_is_named(tiny_llama_program):
    with pytest.raises(KeyError, match="nowhere"):
        dict(each_gram(tiny_llama_program, ["nowhere"], _stream(), SilentProgress()))
