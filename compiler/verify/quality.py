"""Quality of the compiled model against the dense one, slice by slice, both in the runtime.

Every slice ends in one number on one scale, its *loss*: how many times worse than the dense model. Perplexities are divided; of
scores where more is better, the dense model's is divided by the compiled one's, and the dense model agrees with itself by 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from compile_sparse.compiler.artifact.report import Quality, Slice
from compile_sparse.compiler.progress import Progress
from compile_sparse.compiler.runtimes.client import Worker
from compile_sparse.compiler.runtimes.messages import Score, WindowScore
from compile_sparse.compiler.verify.performance import BASELINE, COMPILED
from compile_sparse.compiler.verify.statistics import perplexity_ratio

__all__ = [
    "DIVERGENCE_LIMIT",
    "DRAWN_LIMIT",
    "MAX_LOSS",
    "drawn_quality",
    "loss_of_score",
    "measure_divergence",
    "measure_perplexity",
    "perplexity_slice",
    "quality_of",
    "slice_loss",
]

MAX_LOSS = 1.10
"""Loss of the worst slice up to which a model is not called damaged, unless the user says otherwise."""
DRAWN_LIMIT = 2.0
"""The same where no evaluation data was given. Drawn inputs are nobody's data, so only what is certain counts there: less than
half of the dense model's direction is left."""
DIVERGENCE_LIMIT = 20.0
"""The same for decoders, 3 nats. Random tokens are far from any text and exaggerate: SmolLM2-135M in 4 bits diverges there by
1.0 (groups of 32) and 1.4 nats (of 128), and is 1.27x and 1.48x worse on text; without a tenth of its channels, by 5.7 nats."""
MAX_NATS = 300.0
"""Loss per token beyond which a model is broken and its perplexity no longer a useful number."""


def quality_of(slices: Mapping[str, Slice], max_loss: float | None, *, known: bool = True) -> Quality:
    """The section of the report for ``slices``; see ``Quality``."""
    worst = max(slices, key=lambda name: slice_loss(slices[name])) if slices else None
    return Quality(slices=dict(slices), worst_slice=worst, known=known, max_loss=max_loss)


def drawn_quality(name: str, found: Slice, max_loss: float | None, limit: float = DRAWN_LIMIT) -> Quality:
    """The section where no evaluation data was given.

    Args:
        name, found: its only slice.
        max_loss: what the user allows on data, None anything.
        limit: what is allowed anyway.
    """
    return quality_of({name: found}, None if max_loss is None else max(max_loss, limit), known=False)


def slice_loss(found: Slice) -> float:
    """Its loss; infinite when nothing is left or the answers are no numbers, so that such a slice is the worst."""
    loss = found.ratio if found.loss is None else found.loss  # earlier versions wrote the ratio only
    return math.inf if loss is None else loss


def loss_of_score(baseline: float, compiled: float) -> float | None:
    """Loss of a score of which more is better; None when nothing of it is left.

    A dense model without any score can lose nothing.
    """
    if not (math.isfinite(baseline) and math.isfinite(compiled)):
        return None
    if baseline <= 0:
        return 1.0
    return baseline / compiled if compiled > 0 else None


def measure_perplexity(
    worker: Worker,
    slices: Mapping[str, Sequence[Sequence[int]]],
    *,
    seed: int,
    progress: Progress,
    max_loss: float | None = MAX_LOSS,
) -> Quality:
    """Perplexity of both models per slice on the same windows, with KL divergence and top-1 agreement.

    The interval of a ratio is a paired bootstrap over windows: evaluation noise, not calibration or seed noise.
    """
    total = sum(map(len, slices.values()))
    measured: dict[str, Slice] = {}
    with progress.task("quality", total=total) as task:
        for name, windows in slices.items():
            request = Score(COMPILED, BASELINE, [list(w) for w in windows])
            reply = worker.call(request, on_progress=lambda done, count: task.advance())
            measured[name] = perplexity_slice(reply.windows, seed)
    return quality_of(measured, max_loss)


def perplexity_slice(scores: Sequence[WindowScore], seed: int) -> Slice:
    """Perplexities of windows that both models have scored; without any where one of them has none: gates on it then fail."""
    tokens = [s.tokens for s in scores]
    count = sum(tokens)
    if not _numbers(scores):
        return Slice(loss_of="perplexity", samples=len(scores), tokens=count)
    compiled, baseline = [s.nll for s in scores], [s.nll_against for s in scores]
    estimate = perplexity_ratio(baseline, compiled, tokens, seed=seed)
    return Slice(
        loss=estimate.value,
        loss_of="perplexity",
        ppl_baseline=math.exp(sum(baseline) / count),
        ppl_compiled=math.exp(sum(compiled) / count),
        ratio=estimate.value,
        ci95=(estimate.low, estimate.high),
        kl=_divergence(scores),
        top1_agreement=sum(s.top1_equal for s in scores) / count,
        samples=len(scores),
        tokens=count,
    )


def measure_divergence(
    worker: Worker, windows: Sequence[Sequence[int]], *, progress: Progress, max_loss: float | None = MAX_LOSS
) -> Quality:
    """How far a decoder is from the dense model on ``windows`` that may not be text: perplexities say nothing of random tokens.

    The loss is ``exp(KL)``, the factor by which text that the dense model itself would write is more perplexing to the compiled
    one. Where the runtime tells the given tokens' probabilities only, the mean difference of a window's log-likelihood stands for
    the divergence.
    """
    with progress.task("agreement with the dense model", total=len(windows)) as task:
        request = Score(COMPILED, BASELINE, [list(w) for w in windows])
        scores = worker.call(request, on_progress=lambda done, count: task.advance()).windows
    count = sum(s.tokens for s in scores)
    found = Slice(loss_of="divergence", samples=len(scores), tokens=count)
    if _numbers(scores):
        divergence = _divergence(scores)
        nats = divergence
        if nats is None:
            nats = float(np.mean([abs(s.nll - s.nll_against) / s.tokens for s in scores]))
        found = found.model_copy(
            update={
                "loss": math.exp(max(nats, 0.0)),
                "kl": divergence,
                "top1_agreement": sum(s.top1_equal for s in scores) / count,
            }
        )
    return drawn_quality("reference", found, max_loss, DIVERGENCE_LIMIT)


def _numbers(scores: Sequence[WindowScore]) -> bool:
    return all(math.isfinite(nll) and nll < MAX_NATS * s.tokens for s in scores for nll in (s.nll, s.nll_against))


def _divergence(scores: Sequence[WindowScore]) -> float | None:
    """Mean per token, nats. Some runtimes tell the given tokens' probabilities only: None then."""
    divergences = [s.kl for s in scores if s.kl is not None]
    return sum(divergences) / sum(s.tokens for s in scores) if len(divergences) == len(scores) else None
