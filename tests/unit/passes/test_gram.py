"""Gram matrices equal the sums of the observed values, whatever the number of passes over the text."""

from __future__ import annotations

import pytest
import torch

from compile_sparse.compiler.execution.calibration import CalibrationStream
from compile_sparse.compiler.execution.executor import Executor
from compile_sparse.compiler.ir.linears import find_linears
from compile_sparse.compiler.progress import SilentProgress
from compile_sparse.passes.statistics import gram as module
from compile_sparse.passes.statistics.gram import each_gram, input_grams


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

    found = input_grams(program, names, stream, SilentProgress())

    assert list(found) == names  # graph order
    for each, gram in found.items():
        x = torch.cat(rows[each])
        assert gram.count == len(x) == stream.tokens
        # Products of one batch are in float32: at most 18 rows, so 18 roundings of 2^-24 of sums of |x_i x_j|.
        slack = 18 * 2.0**-24 * (x.abs().T @ x.abs())
        assert ((gram.second - x.T @ x).abs() <= slack + 1e-12).all()
        torch.testing.assert_close(gram.total, x.sum(0), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gram.mean, x.mean(0), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gram.covariance, x.T.cov(correction=0), rtol=1e-4, atol=1e-5)


def test_layers_that_read_one_value_share_one_gram(tiny_llama_program):
    linears, _ = find_linears(tiny_llama_program)
    names = [linear.input.name for linear in linears]
    found = input_grams(tiny_llama_program, names, _stream(), SilentProgress())
    # Two layers of query, key and value; output; gate and up; down; and the logits.
    assert len(names) == 2 * 7 + 1
    assert len(found) == 2 * 4 + 1


def test_a_small_budget_takes_more_passes_and_gives_the_same(tiny_llama_program, monkeypatch):
    names, runs = _inputs(tiny_llama_program), []

    class Counting(Executor):
        def run(self, inputs, observe=None):
            runs.append(len(observe or {}))
            return super().run(inputs, observe)

    monkeypatch.setattr(module, "Executor", Counting)
    stream = _stream()
    whole = input_grams(tiny_llama_program, names, stream, SilentProgress())
    assert runs == [len(names)] * len(stream)
    runs.clear()

    budget = 8 * (64 * 64 + 64 * 64)  # two of width 64; the one of width 88 shares with none
    parts = dict(each_gram(tiny_llama_program, names, stream, SilentProgress(), budget_bytes=budget))

    assert max(runs) == 2
    assert sum(runs) == len(names) * len(stream)
    assert list(parts) == list(whole)
    for name, gram in parts.items():
        assert torch.equal(gram.second, whole[name].second)


def test_the_stream_is_lazy(tiny_llama_program):
    names, done = _inputs(tiny_llama_program), []

    class Told(SilentProgress):
        def task(self, label, total=None):
            done.append(label)
            return super().task(label, total)

    parts = each_gram(tiny_llama_program, names, _stream(), Told(), budget_bytes=1)
    next(parts)
    assert done == [f"observe inputs, 1 of {len(names)}"]
