"""Outputs of heads of other kinds, which differ in size from text to text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from compile_sparse.compiler.verify.evaluation.outputs import TextOutputs
from compile_sparse.compiler.verify.quality import slice_loss
from tests.unit.verify.evaluation.fakes import encoded, measured

TABLE = np.random.default_rng(0).standard_normal(50)
TEXTS = (encoded(5, 6), encoded(7, 8, 9), encoded(11), encoded(12, 13))


def starts(feeds: Mapping[str, Any]) -> dict[str, Any]:
    return {"start_logits": TABLE[feeds["input_ids"]], "end_logits": -TABLE[feeds["input_ids"]]}


def test_the_mean_cosine_of_the_first_output() -> None:
    def bent(feeds: Mapping[str, Any]) -> dict[str, Any]:
        return {"start_logits": np.abs(starts(feeds)["start_logits"]), "end_logits": starts(feeds)["end_logits"]}

    rows = [TABLE[list(text.ids)] for text in TEXTS]
    expected = np.mean([row @ np.abs(row) / (row @ row) for row in rows])
    found = measured(TextOutputs(TEXTS), starts, bent)
    assert (found.mean_cosine, found.samples) == (pytest.approx(expected), 4)
    assert measured(TextOutputs(TEXTS), starts).loss == pytest.approx(1.0)


@pytest.mark.parametrize("factor", [-1.0, np.nan])
def test_a_broken_model_is_lost(factor: float) -> None:
    broken = measured(
        TextOutputs(TEXTS), starts, lambda feeds: {"start_logits": factor * starts(feeds)["start_logits"]}
    )
    assert slice_loss(broken) > 1.1
