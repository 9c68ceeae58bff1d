"""Does the runtime compute what the program means? "It loaded" proves nothing."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from compile_sparse.compiler.artifact.report import Fidelity
from compile_sparse.compiler.progress import Progress
from compile_sparse.compiler.runtimes.client import Worker
from compile_sparse.compiler.runtimes.messages import Run, TokenTrace, Trace
from compile_sparse.compiler.runtimes.wire import read
from compile_sparse.compiler.verify.reference import DECODER_FILE, SAMPLE_FILE
from compile_sparse.compiler.verify.rounding import LEAST_NATS, LEAST_RELATIVE, NOISE_FACTOR

__all__ = ["check_fidelity", "cosine", "run_samples"]

TIE_NATS, LARGEST_TIE_NATS = 0.01, 0.1
"""A position where the program's best two tokens are closer than twice the mean difference between runtime and program is a
tie: noise decides it. At least 0.01 nats (1 % in probability), and at most 0.1, or four times the noise, so that a wrong model
cannot excuse itself."""
LEAST_DISAGREEMENT = 0.01
"""Share of top-1 answers that is never held against a runtime."""
LOGITS = "logits"
"""Output whose largest element is an answer. An arg-max over features means nothing."""


def check_fidelity(worker: Worker, name: str, folder: Path, progress: Progress) -> Fidelity:
    """Compare the loaded model ``name`` with the reference file in ``folder``.

    Args:
        worker: with the model loaded.
        name: of the model.
        folder: of an artifact or a baseline.
        progress: where it is reported.
    """
    if (folder / DECODER_FILE).is_file():
        reference = json.loads((folder / DECODER_FILE).read_text(encoding="utf-8"))
        return _decoder(worker, name, reference, progress)
    return _samples(worker, name, folder / SAMPLE_FILE, progress)


def _decoder(worker: Worker, name: str, reference: Mapping[str, Any], progress: Progress) -> Fidelity:
    with progress.task("fidelity") as task:
        request = Trace(name, reference["windows"], reference["prefill"])
        found = worker.call(request, on_progress=lambda done, total: task.advance()).windows
    expected = [read(TokenTrace, trace) for trace in reference["traces"]]
    # Artifacts of earlier versions lack it: they have no measured bound.
    noisy = [read(TokenTrace, trace) for trace in reference.get("disturbed", ())]
    difference = np.abs(_column(expected, "logprob") - _column(found, "logprob"))
    mean = float(difference.mean())
    noise = float(np.abs(_column(expected, "logprob") - _column(noisy, "logprob")).mean()) if noisy else None
    tie = min(max(2 * mean, TIE_NATS), max(LARGEST_TIE_NATS, 4 * (noise or 0.0)))
    real = _column(expected, "margin") >= tie
    equal = _column(expected, "top1") == _column(found, "top1")
    flipped = _column(expected, "top1") != _column(noisy, "top1") if noisy else None
    finite = bool(np.isfinite(mean))
    agreement = float(equal[real].mean()) if finite and real.any() else None if finite else 0.0
    lost = None if flipped is None else float(flipped[real].mean()) if real.any() else 0.0
    return Fidelity(
        tokens=int(difference.size),
        ties=int((~real).sum()),
        mean_abs_logprob_diff=mean if finite else None,
        logprob_bound=None if noise is None else NOISE_FACTOR * noise + LEAST_NATS,
        max_abs_diff=float(difference.max()) if finite else None,
        top1_agreement=agreement,
        top1_bound=None if lost is None else max(0.0, 1.0 - LEAST_DISAGREEMENT - NOISE_FACTOR * lost),
    )


def _column(traces: list[TokenTrace], field: Literal["top1", "logprob", "margin"]) -> np.ndarray[Any, Any]:
    return np.concatenate([np.asarray(getattr(trace, field), np.float64) for trace in traces])


def _samples(worker: Worker, name: str, path: Path, progress: Progress) -> Fidelity:
    with np.load(path, allow_pickle=False) as archive:
        feeds, expected, noisy = (
            {key.removeprefix(kind): archive[key] for key in archive.files if key.startswith(kind)}
            for kind in ("in.", "out.", "disturbed.")
        )
    with progress.task("fidelity", total=1) as task, tempfile.TemporaryDirectory() as scratch:
        found = run_samples(worker, name, feeds, Path(scratch))
        task.advance()
    first = next(iter(expected))
    count = int(expected[first].shape[0])
    # Artifacts of earlier versions lack what rounding does: they have no measured bound.
    bounds = {key: NOISE_FACTOR * _relative(value, expected[key]) + LEAST_RELATIVE for key, value in noisy.items()}
    if not all(np.isfinite(found[key]).all() for key in expected):
        return Fidelity(samples=count, error_bound=bounds.get(first, 0.0))
    errors = {key: _relative(found[key], expected[key]) for key in expected}
    # The output that is farthest beyond what rounding explains of it speaks for all.
    worst = max(errors, key=lambda key: errors[key] / bounds.get(key, 1.0))
    agreement = (_answers(expected[first]) == _answers(found[first])).mean() if first == LOGITS else None
    return Fidelity(
        samples=count,
        max_abs_diff=max(float(np.abs(expected[key] - found[key]).max()) for key in expected),
        mean_cosine=float(cosine(expected[first], found[first]).mean()),
        relative_error=errors[worst],
        error_bound=bounds.get(worst),
        top1_agreement=None if agreement is None else float(agreement),
    )


def _relative(found: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> float:
    """Length of the difference over that of the output, root mean square over samples."""
    a, b = (x.reshape(x.shape[0], -1).astype(np.float64) for x in (found, expected))
    lengths = np.linalg.norm(b, axis=1)
    ratios = np.linalg.norm(a - b, axis=1) / np.where(lengths == 0, 1.0, lengths)
    return float(np.sqrt(np.square(ratios).mean()))


def run_samples(
    worker: Worker, name: str, feeds: dict[str, np.ndarray[Any, Any]], scratch: Path
) -> dict[str, np.ndarray[Any, Any]]:
    """Outputs of the loaded model ``name``; arrays travel through files in ``scratch``."""
    inputs, outputs = scratch / f"{name}.in.npz", scratch / f"{name}.out.npz"
    np.savez(inputs, **feeds)  # type: ignore[arg-type]
    worker.call(Run(name, str(inputs), str(outputs)))
    with np.load(outputs, allow_pickle=False) as archive:
        return {key: archive[key] for key in archive.files}


def cosine(left: np.ndarray[Any, Any], right: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Cosine similarity per sample, all other dimensions flattened."""
    a, b = (x.reshape(x.shape[0], -1).astype(np.float64) for x in (left, right))
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    result: np.ndarray[Any, Any] = (a * b).sum(axis=1) / np.where(norms == 0, 1.0, norms)
    return result


def _answers(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Arg-max of the last dimension: the class of a sample or a position."""
    result: np.ndarray[Any, Any] = values.argmax(axis=-1)
    return result
