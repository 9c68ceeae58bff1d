"""How far the compiled model's outputs are from the dense model's on the same inputs, where nobody says what is right."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compile_sparse.compiler.artifact.report import Quality, Slice
from compile_sparse.compiler.progress import Progress
from compile_sparse.compiler.runtimes.client import Worker
from compile_sparse.compiler.verify.fidelity import cosine, run_samples
from compile_sparse.compiler.verify.performance import BASELINE, COMPILED
from compile_sparse.compiler.verify.quality import MAX_LOSS, drawn_quality, loss_of_score

__all__ = ["agreement_slice", "finite", "logit_error", "measure_agreement"]

Array = NDArray[Any]


def measure_agreement(
    worker: Worker, feeds: Mapping[str, Array], *, progress: Progress, max_loss: float | None = MAX_LOSS
) -> Quality:
    """Agreement of the first output with the dense model's on seeded inputs: what is known of quality without anybody's data.

    The loss is one over the mean cosine. Arg-max is reported for logits only: that of hidden states means nothing.
    """
    with progress.task("agreement with the dense model", total=1) as task, tempfile.TemporaryDirectory() as scratch:
        dense, compiled = (run_samples(worker, name, dict(feeds), Path(scratch)) for name in (BASELINE, COMPILED))
        task.advance()
    name = next(iter(dense))
    return drawn_quality("seeded", agreement_slice(dense[name], compiled[name], logits=name == "logits"), max_loss)


def agreement_slice(dense: Array, compiled: Array, *, logits: bool) -> Slice:
    """Of outputs ``[samples, ...]`` of both models, judged by their cosine."""
    found = Slice(loss_of="cosine", samples=int(dense.shape[0]))
    if not finite(dense, compiled):
        return found
    alike = float(cosine(dense, compiled).mean())
    return found.model_copy(
        update={
            "loss": loss_of_score(1.0, alike),
            "mean_cosine": alike,
            "top1_agreement": float((dense.argmax(axis=-1) == compiled.argmax(axis=-1)).mean()) if logits else None,
            "logit_error": logit_error(dense, compiled) if logits else None,
        }
    )


def logit_error(dense: Array, compiled: Array) -> float:
    """Root mean square difference over the dense logits' standard deviation; 0 where both are constant and equal."""
    wide, other = dense.astype(np.float64), compiled.astype(np.float64)
    error, spread = float(np.sqrt(((wide - other) ** 2).mean())), float(wide.std())
    return error / spread if spread > 0 else error


def finite(*arrays: Array) -> bool:
    """Whether every element is a number."""
    return all(bool(np.isfinite(array).all()) for array in arrays)
