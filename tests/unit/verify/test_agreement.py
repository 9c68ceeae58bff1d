"""Outputs of both models on seeded inputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from compile_sparse.compiler.progress import SilentProgress
from compile_sparse.compiler.runtimes.messages import Ran, Run
from compile_sparse.compiler.verify.agreement import agreement_slice, logit_error, measure_agreement
from compile_sparse.compiler.verify.performance import COMPILED
from compile_sparse.compiler.verify.quality import slice_loss

DRAWS = np.random.default_rng(0)
DENSE = DRAWS.standard_normal((8, 5, 16)).astype(np.float32)


class FakeWorker:
    """Answers with arrays by model."""

    def __init__(self, name: str, compiled: Any) -> None:
        self.name, self.compiled = name, compiled

    def call(self, request: Run, **_: Any) -> Ran:
        values = self.compiled if request.name == COMPILED else DENSE
        np.savez(request.outputs, **{self.name: values})
        return Ran([self.name])


def measured(name: str, compiled: Any) -> Any:
    worker: Any = FakeWorker(name, compiled)
    return measure_agreement(worker, {"x": np.zeros((8, 2))}, progress=SilentProgress())


def test_the_same_outputs_lose_nothing() -> None:
    found = measured("logits", DENSE)
    (slice_,) = found.slices.values()
    assert slice_.mean_cosine == pytest.approx(1.0)
    assert (slice_.top1_agreement, slice_.logit_error, slice_.samples) == (1.0, 0.0, 8)
    assert slice_.loss == pytest.approx(1.0)
    assert not found.known


@pytest.mark.parametrize("broken", [-DENSE, np.roll(DENSE, 1, axis=0), DENSE * np.nan])
def test_a_destroyed_model_is_lost(broken: Any) -> None:
    """Turned around, given another sample's output, no numbers at all."""
    found = measured("last_hidden_state", broken)
    assert slice_loss(found.slices["seeded"]) > (found.max_loss or 0)


def test_a_scale_is_not_a_direction_and_argmax_is_of_logits_only() -> None:
    slice_ = measured("last_hidden_state", 3 * DENSE).slices["seeded"]
    assert slice_.mean_cosine == pytest.approx(1.0)
    assert slice_.top1_agreement is None
    assert slice_.logit_error is None


def test_logit_error_is_relative_to_the_spread() -> None:
    noise = DRAWS.standard_normal(DENSE.shape)
    assert logit_error(DENSE, DENSE + 0.1 * noise) == pytest.approx(0.1, rel=0.1)
    assert logit_error(100 * DENSE + 7, 100 * (DENSE + 0.1 * noise) + 7) == pytest.approx(0.1, rel=0.1)
    assert agreement_slice(DENSE, DENSE + 0.1 * noise, logits=True).logit_error == pytest.approx(0.1, rel=0.1)
