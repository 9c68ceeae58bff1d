"""What quality does to a verdict, and the gate nobody asked for."""

from __future__ import annotations

from typing import Any

import pytest

from compile_sparse.compiler.artifact.report import Change, ModelSection, Quality, Report, Score, Slice
from compile_sparse.compiler.verify.quality import drawn_quality, quality_of
from compile_sparse.compiler.verify.quality_verdict import lost_quality, with_quality

FAST = "Measured 2.26x on the workload (95 % interval 2.20x to 2.30x)."


def report(quality: Quality | None, verdict: Any = "faster") -> Report:
    sizes = ModelSection(parameters=Change(baseline=2, compiled=1))
    return Report(target="t", verdict=verdict, verdict_why=FAST, model=sizes, quality=quality)


def perplexity(loss: float | None) -> Slice:
    if loss is None:
        return Slice(loss_of="perplexity", tokens=9)
    return Slice(loss=loss, loss_of="perplexity", ppl_baseline=10.0, ppl_compiled=10 * loss, ratio=loss)


RETRIEVAL = Slice(loss=1.5, loss_of="ndcg@10", scores={"ndcg@10": Score(baseline=0.9, compiled=0.6)})
LOST = {
    "perplexity": (perplexity(510.0), "perplexity on [x] went from 10 to 5100"),
    "no numbers": (perplexity(None), "the model's probabilities are no numbers on [x]"),
    "score": (RETRIEVAL, "ndcg@10 on [x] went from 0.9 to 0.6"),
    "agreement": (
        Slice(loss=1.25, loss_of="agreement", top1_agreement=0.8),
        "the dense model's answer on 80.0% of [x]",
    ),
    "nothing left": (Slice(loss_of="cosine", mean_cosine=-0.05), "outputs on [x] is -0.050 (nothing is left"),
    "an earlier version's": (Slice(ppl_baseline=10.0, ppl_compiled=20.0, ratio=2.0), "went from 10 to 20"),
}


@pytest.mark.parametrize("name", LOST)
def test_lost_quality_is_the_verdict_and_exits_with_3(name: str) -> None:
    found, said = LOST[name]
    judged = with_quality(report(quality_of({"x": found, "fine": perplexity(1.0)}, 1.1)))
    assert judged.verdict == "quality-lost"
    assert said in judged.verdict_why
    assert "at most 1.1x is allowed by --max-quality-loss" in judged.verdict_why
    assert judged.verdict_why.endswith(FAST)  # how fast it was measured is still said
    (gate,) = lost_quality(judged)
    assert gate["passed"] is False
    assert said in gate["why"]


@pytest.mark.parametrize("verdict", ["smaller-only", "no-gain", "slower"])
def test_whatever_the_speed(verdict: str) -> None:
    assert with_quality(report(quality_of({"x": perplexity(2.0)}, 1.1), verdict)).verdict == "quality-lost"


def test_a_higher_limit_allows_it() -> None:
    quality = quality_of({"x": perplexity(2.0)}, 2.5)
    assert with_quality(report(quality)) == report(quality)
    assert lost_quality(report(quality)) == []


def test_without_a_limit_anything_may_be_lost() -> None:
    for quality in (quality_of({"x": perplexity(None)}, None), drawn_quality("seeded", Slice(loss_of="cosine"), None)):
        assert with_quality(report(quality)).verdict == "faster"
        assert lost_quality(report(quality)) == []


def test_what_is_unverified_stays_so_and_says_what_was_lost() -> None:
    judged = with_quality(report(quality_of({"x": perplexity(2.0)}, 1.1), "unverified"))
    assert judged.verdict == "unverified"
    assert "Quality lost" in judged.verdict_why
    assert lost_quality(judged)


def test_unknown_quality_is_said() -> None:
    agreeing = Slice(loss=1 / 0.9, loss_of="cosine", mean_cosine=0.9)
    judged = with_quality(report(drawn_quality("seeded", agreeing, 1.1)))
    assert judged.verdict == "faster"  # beyond 1.1, and drawn inputs are nobody's data
    assert "Quality unknown: no evaluation data (--eval); the cosine to the dense model's outputs" in judged.verdict_why
    assert lost_quality(judged) == []
    assert "Quality unknown" in with_quality(report(None)).verdict_why
    assert "Quality unknown" not in with_quality(report(None, "unverified")).verdict_why


def test_a_destroyed_model_is_not_called_faster_without_data() -> None:
    gone = Slice(loss_of="cosine", mean_cosine=-0.05, samples=8)
    judged = with_quality(report(drawn_quality("seeded", gone, 1.1)))
    assert judged.verdict == "quality-lost"
    (gate,) = lost_quality(judged)
    assert gate["gate"] == "worst_slice_loss<=2x (always checked)"
    assert gate["value"] is None
