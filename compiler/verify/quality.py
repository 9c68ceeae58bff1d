"""Quality of the compiled model against the dense one, slice by slice, both in the runtime."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from compile_sparse.compiler.artifact.report import Quality, Slice
from compile_sparse.compiler.progress import Progress
from compile_sparse.compiler.runtimes.client import Worker
from compile_sparse.compiler.runtimes.messages import Score, WindowScore
from compile_sparse.compiler.verify.fidelity import cosine, run_samples
from compile_sparse.compiler.verify.performance import BASELINE, COMPILED
from compile_sparse.compiler.verify.statistics import perplexity_ratio

__all__ = ["measure_agreement", "measure_perplexity"]

MAX_NATS = 300.0
"""Loss per token beyond which a model is broken and its perplexity no longer a useful number."""


def measure_perplexity(
    worker: Worker, slices: Mapping[str, Sequence[Sequence[int]]], *, seed: int, progress: Progress
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
            measured[name] = _slice(reply.windows, seed)
    worst = max(measured, key=lambda name: _damage(measured[name])) if measured else None
    return Quality(slices=measured, worst_slice=worst)


def _damage(found: Slice) -> float:
    """Ratio of perplexities; infinite when it is not a number, so that such a slice is the worst."""
    return math.inf if found.ratio is None else found.ratio


def _slice(scores: Sequence[WindowScore], seed: int) -> Slice:
    tokens = [s.tokens for s in scores]
    count = sum(tokens)
    if not all(math.isfinite(nll) and nll < MAX_NATS * s.tokens for s in scores for nll in (s.nll, s.nll_against)):
        return Slice(samples=len(scores), tokens=count)  # no perplexity: gates on it fail
    compiled, baseline = [s.nll for s in scores], [s.nll_against for s in scores]
    divergences = [s.kl for s in scores if s.kl is not None]
    estimate = perplexity_ratio(baseline, compiled, tokens, seed=seed)
    return Slice(
        ppl_baseline=math.exp(sum(baseline) / count),
        ppl_compiled=math.exp(sum(compiled) / count),
        ratio=estimate.value,
        ci95=(estimate.low, estimate.high),
        # Some runtimes tell the given tokens' probabilities only: no divergence then.
        kl=sum(divergences) / count if len(divergences) == len(scores) else None,
        top1_agreement=sum(s.top1_equal for s in scores) / count,
        samples=len(scores),
        tokens=count,
    )


def measure_agreement(worker: Worker, feeds: dict[str, np.ndarray[Any, Any]], *, progress: Progress) -> Quality:
    """Agreement of the first output of an encoder or vision model with the dense model's, on seeded inputs."""
    with progress.task("quality", total=1) as task, tempfile.TemporaryDirectory() as scratch:
        dense, compiled = (run_samples(worker, name, feeds, Path(scratch)) for name in (BASELINE, COMPILED))
        task.advance()
    name = next(iter(dense))
    agreement = (dense[name].argmax(axis=-1) == compiled[name].argmax(axis=-1)).mean()
    found = Slice(
        top1_agreement=float(agreement),
        mean_cosine=float(cosine(dense[name], compiled[name]).mean()),
        samples=int(dense[name].shape[0]),
    )
    return Quality(slices={"seeded": found}, worst_slice="seeded")
