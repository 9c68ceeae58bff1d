"""Calibration batches: equal lengths, every window once, always in the same order."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from compile_sparse.compiler.execution.calibration import CalibrationStream
from compile_sparse.compiler.ir.program import Program

LINES = st.lists(st.lists(st.integers(0, 90), min_size=2, max_size=9).map(tuple), max_size=30).map(tuple)


@given(LINES, st.integers(1, 40))
def test_every_window_is_in_one_batch_of_its_own_length(windows: tuple[tuple[int, ...], ...], bound: int) -> None:
    stream = CalibrationStream(windows, tokens_per_batch=bound)
    batches = stream._batches()
    assert sorted(window for batch in batches for window in batch) == sorted(windows)
    assert len(stream) == len(batches)
    assert stream.tokens == sum(map(len, windows))
    for batch in batches:
        assert len({len(window) for window in batch}) == 1
        assert len(batch) == 1 or len(batch) * len(batch[0]) <= bound


def test_feeds_are_complete_inputs_with_an_empty_cache(tiny_llama_program: Program) -> None:
    stream = CalibrationStream(((5, 6, 7), (8, 9), (1, 2, 3)))
    feeds = list(stream.feeds(tiny_llama_program))
    assert [feed["input_ids"].tolist() for feed in feeds] == [[[8, 9]], [[5, 6, 7], [1, 2, 3]]]
    for feed in feeds:
        assert feed.keys() == {entry.name for entry in tiny_llama_program.inputs}
        assert torch.equal(feed["attention_mask"], torch.ones_like(feed["input_ids"]))
        assert feed["past_key_values.0.key"].shape[2] == 0


def test_the_order_is_the_same_every_time(tiny_llama_program: Program) -> None:
    stream = CalibrationStream(((5, 6, 7), (8, 9), (1, 2, 3), (4, 4)), tokens_per_batch=3)
    first, second = ([f["input_ids"].tolist() for f in stream.feeds(tiny_llama_program)] for _ in range(2))
    assert first == second
    assert len(first) == len(stream) == 4
