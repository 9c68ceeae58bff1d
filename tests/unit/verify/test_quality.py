"""Perplexities and divergences of both models, as the runtime's sums give them."""

from __future__ import annotations

import math
from typing import Any

import pytest

from compile_sparse.compiler.progress import SilentProgress
from compile_sparse.compiler.runtimes.messages import Score, Scores, WindowScore
from compile_sparse.compiler.verify.quality import (
    DIVERGENCE_LIMIT,
    loss_of_score,
    measure_divergence,
    measure_perplexity,
    slice_loss,
)


class FakeWorker:
    """Scores every window the same."""

    def __init__(self, **score: Any) -> None:
        self.score = WindowScore(
            **({"tokens": 10, "nll": 10.0, "nll_against": 10.0, "top1_equal": 9, "kl": 0.0} | score)
        )
        self.asked: list[Score] = []

    def call(self, request: Score, **_: Any) -> Scores:
        self.asked.append(request)
        return Scores([self.score] * len(request.windows))


def divergence(**score: Any) -> Any:
    return measure_divergence(FakeWorker(**score), [[1, 2], [3, 4]], progress=SilentProgress())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("score", "loss"),
    [
        ({}, 1.0),
        ({"kl": 10 * math.log(3)}, 3.0),
        # Without divergences the difference of likelihoods stands for them, whichever side is likelier.
        ({"kl": None, "nll": 10 + 10 * math.log(4)}, 4.0),
        ({"kl": None, "nll_against": 10 + 10 * math.log(4)}, 4.0),
        ({"nll": math.nan}, math.inf),
        ({"nll": 4000.0}, math.inf),
    ],
)
def test_divergence_as_a_ratio_of_perplexities(score: dict[str, Any], loss: float) -> None:
    found = divergence(**score)
    assert slice_loss(found.slices["reference"]) == pytest.approx(loss)
    assert not found.known
    assert found.max_loss == DIVERGENCE_LIMIT


def test_differences_of_windows_do_not_cancel() -> None:
    class Opposite(FakeWorker):
        def call(self, request: Score, **_: Any) -> Scores:
            return Scores([WindowScore(10, 10.0 + sign * 10, 10.0, 5) for sign in (1.0, -1.0)])

    worker: Any = Opposite()
    found = measure_divergence(worker, [[1, 2], [3, 4]], progress=SilentProgress())
    assert found.slices["reference"].loss == pytest.approx(math.e)


def test_the_user_may_allow_more_on_drawn_inputs_too() -> None:
    worker: Any = FakeWorker()
    assert measure_divergence(worker, [[1, 2]], progress=SilentProgress(), max_loss=50).max_loss == 50


def test_the_worst_slice_is_the_one_without_numbers() -> None:
    class Broken(FakeWorker):
        def call(self, request: Score, **_: Any) -> Scores:
            nll = math.nan if request.windows == [[5, 6]] else 20.0
            return Scores([WindowScore(10, nll, 10.0, 5, 0.1)])

    worker: Any = Broken()
    found = measure_perplexity(worker, {"bad": [[5, 6]], "good": [[1, 2]]}, seed=0, progress=SilentProgress())
    assert found.worst_slice == "bad"
    assert found.known
    good, bad = found.slices["good"], found.slices["bad"]
    assert good.loss == good.ratio == pytest.approx(math.e)
    assert (bad.loss, bad.loss_of) == (None, "perplexity")


@pytest.mark.parametrize(
    ("baseline", "compiled", "loss"),
    [(0.9, 0.6, 1.5), (0.5, 0.6, 5 / 6), (0.9, 0.0, None), (1.0, -0.05, None), (0.0, 0.0, 1.0), (0.9, math.nan, None)],
)
def test_loss_of_a_score(baseline: float, compiled: float, loss: float | None) -> None:
    assert loss_of_score(baseline, compiled) == (None if loss is None else pytest.approx(loss))
