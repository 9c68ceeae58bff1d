"""Quality in the verdict: a model that lost more than is allowed is called ``quality-lost``, however fast it is."""

from __future__ import annotations

import math
from typing import Any

from compile_sparse.compiler.artifact.report import Quality, Report, Slice
from compile_sparse.compiler.verify.quality import slice_loss

__all__ = ["lost_quality", "with_quality"]

_MEASURED = ("faster", "smaller-only", "slower", "no-gain")


def with_quality(report: Report) -> Report:
    """``report`` with its verdict corrected by what was measured of quality, and saying so where nothing is known of it."""
    quality, why = report.quality, report.verdict_why
    lost = _lost(quality)
    if lost:
        verdict = "quality-lost" if report.verdict in _MEASURED else report.verdict
        return report.model_copy(update={"verdict": verdict, "verdict_why": f"{lost} {why}".strip()})
    if report.verdict in _MEASURED and (quality is None or not quality.known):
        return report.model_copy(update={"verdict_why": f"{why} {_unknown(quality)}".strip()})
    return report


def lost_quality(report: Report) -> list[dict[str, Any]]:
    """A failed gate when quality was lost; nothing otherwise. It needs no asking for, as the wrong model's does not."""
    quality = report.quality
    lost = _lost(quality)
    if quality is None or not lost:
        return []
    loss = slice_loss(quality.slices[quality.worst_slice or ""])
    value = loss if math.isfinite(loss) else None
    return [
        {
            "gate": f"worst_slice_loss<={_limit(quality):.4g}x (always checked)",
            "value": value,
            "bound": value,
            "passed": False,
            "why": lost,
        }
    ]


def _limit(quality: Quality) -> float:
    return math.inf if quality.max_loss is None else quality.max_loss


def _lost(quality: Quality | None) -> str:
    """What was lost, as a sentence; empty when nothing was that counts."""
    if quality is None or quality.worst_slice is None:
        return ""
    name = quality.worst_slice
    found = quality.slices[name]
    loss = slice_loss(found)
    if loss <= _limit(quality):
        return ""
    times = f"{loss:.4g}x worse than dense" if math.isfinite(loss) else "nothing is left"
    return f"Quality lost: {describe(name, found)} ({times}, at most {_limit(quality):.4g}x is allowed by --max-quality-loss)."


def describe(name: str, found: Slice) -> str:
    """The figure that the loss of slice ``name`` is of, as a clause."""
    kind = found.loss_of or "perplexity"
    if kind == "perplexity":
        if found.ppl_compiled is None:
            return f"the model's probabilities are no numbers on [{name}]"
        return f"perplexity on [{name}] went from {found.ppl_baseline:.4g} to {found.ppl_compiled:.4g}"
    if score := (found.scores or {}).get(kind):
        return f"{kind} on [{name}] went from {score.baseline:.4g} to {score.compiled:.4g}"
    if kind == "divergence" and found.top1_agreement is not None:
        return f"it predicts the dense model's token at {found.top1_agreement:.1%} of positions of its {name} windows"
    if kind == "cosine" and found.mean_cosine is not None:
        return f"the cosine to the dense model's outputs on [{name}] is {found.mean_cosine:.3f}"
    if kind == "rank_agreement" and found.rank_agreement is not None:
        return f"the rank correlation with the dense model's scores on [{name}] is {found.rank_agreement:.3f}"
    if kind == "agreement" and found.top1_agreement is not None:
        return f"it gives the dense model's answer on {found.top1_agreement:.1%} of [{name}]"
    return f"the model's outputs are no numbers on [{name}]"


def _unknown(quality: Quality | None) -> str:
    if quality is None or quality.worst_slice is None:
        return "Quality unknown: no evaluation data (--eval)."
    name = quality.worst_slice
    return f"Quality unknown: no evaluation data (--eval); {describe(name, quality.slices[name])}."
