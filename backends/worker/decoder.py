"""Operations on models that take token ids and give logits, through a cache: what they predict and how fast."""

from __future__ import annotations

import time
from collections.abc import Mapping

import numpy as np

from compile_sparse.backends.worker.errors import RequestError
from compile_sparse.backends.worker.model import Array, Model, Tokens
from compile_sparse.backends.worker.scoring import ScoreSums, extend_trace
from compile_sparse.compiler.runtimes.messages import Round, TokenTrace, WindowScore
from compile_sparse.compiler.runtimes.wire import Report

__all__ = ["as_batch", "observe_batch", "score_window", "time_generation", "trace_batch"]

CHUNK_TOKENS = 256
"""Tokens whose logits are held at once when scoring."""


def as_batch(windows: list[list[int]]) -> Tokens:
    """Windows as one batch ``[B, S]``.

    Raises:
        RequestError: their lengths differ.
    """
    if len({len(ids) for ids in windows}) != 1:
        raise RequestError("the windows must have equal lengths: they run as one batch")
    return np.asarray(windows, np.int64)


def trace_batch(model: Model, tokens: Tokens, prefill: int, report: Report) -> list[TokenTrace]:
    """Predictions for each row of ``tokens [B, S]``: the cache is filled by one prefill and then one given token at a time."""
    rows, length = tokens.shape
    generation = model.generation(rows, length)
    traces = [TokenTrace([], []) for _ in range(rows)]
    start, stop = 0, min(prefill, length - 1)
    while start < length - 1:
        logits = generation.step(tokens[:, start:stop])
        for row, trace in enumerate(traces):
            extend_trace(trace, logits[row], tokens[row, start + 1 : stop + 1])
        report(stop, length - 1)
        start, stop = stop, stop + 1
    return traces


def observe_batch(
    model: Model, latest: Mapping[str, Array], tokens: Tokens, prefill: int, report: Report
) -> list[dict[str, Array]]:
    """What ``latest`` shows after each call of the one ``trace_batch`` makes of ``tokens [B, S]``."""
    rows, length = tokens.shape
    generation = model.generation(rows, length)
    calls: list[dict[str, Array]] = []
    start, stop = 0, min(prefill, length - 1)
    while start < length - 1:
        generation.step(tokens[:, start:stop])
        calls.append(dict(latest))
        report(stop, length - 1)
        start, stop = stop, stop + 1
    return calls


def score_window(model: Model, against: Model, window: list[int]) -> WindowScore:
    """Likelihood of a window by two models, in chunks through the cache, so that memory does not follow its length."""
    ids, last = np.asarray(window, np.int64), len(window) - 1
    generation, other = model.generation(1, len(ids)), against.generation(1, len(ids))
    sums = ScoreSums()
    for start in range(0, last, CHUNK_TOKENS):
        stop = min(start + CHUNK_TOKENS, last)
        chunk = ids[None, start:stop]
        sums.add(generation.step(chunk)[0], other.step(chunk)[0], ids[start + 1 : stop + 1])
    return sums.score(last)


def time_generation(model: Model, tokens: Tokens, prompt: int) -> Round:
    """Feed a prompt and then the given tokens ``[B, S]`` one by one: the same work whatever the model predicts."""
    generation = model.generation(*tokens.shape)
    began = time.perf_counter()
    generation.step(tokens[:, :prompt])
    prefill = time.perf_counter() - began
    steps = []
    for position in range(prompt, tokens.shape[1]):
        began = time.perf_counter()
        generation.step(tokens[:, position : position + 1])
        steps.append(time.perf_counter() - began)
    return Round(prefill, sum(steps), steps)
