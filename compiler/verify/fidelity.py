"""Does the runtime compute what the program means? "It loaded" proves nothing."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any, Literal

import numpy as np

from compile_sparse.compiler.artifact.report import Fidelity
from compile_sparse.compiler.progress import Progress
from compile_sparse.compiler.runtimes.client import Worker
from compile_sparse.compiler.runtimes.messages import Run, TokenTrace, Trace
from compile_sparse.compiler.runtimes.wire import read
from compile_sparse.compiler.verify.reference import DECODER_FILE, SAMPLE_FILE

__all__ = ["LARGEST_NOISE_NATS", "check_fidelity", "fidelity_bound", "has_dense_traces"]

TIE_NATS, LARGEST_TIE_NATS = 0.01, 0.1
"""A position where the program's best two tokens are closer than twice the mean difference between runtime and program is a
tie: noise decides it. At least 0.01 nats (1 % in probability), and at most 0.1, or four times what the dense model shows in the
same runtime, so that a wrong model cannot excuse itself."""
NOISE_FACTOR = 2.0
LARGEST_NOISE_NATS = 0.15
"""Mean difference of the dense model that rounding to 16 bits explains; beyond, the runtime computes the dense model wrongly too.
bfloat16 gives 0.04 on random Llamas of 12 layers, whose logits are noisier than trained ones."""
INDEPENDENT_ROUNDINGS = 2**0.5
"""Noise makes values on the border of two codes fall to the other one. At worst the runtime's roundings and the program's have
nothing in common; they then differ by this many times what one of them does."""
LEAST_BOUND_NATS = 1e-3
"""Mean difference that is never held against a runtime: float32 sums in another order stay far below, wrong layouts far above."""


def fidelity_bound(quantized: bool) -> float:
    """Lowest top-1 agreement that counts as the same model.

    Runtime kernels round activations to 8 bits in their own order, so a quantized artifact may flip near-ties; a
    floating-point one may not.
    """
    return 0.97 if quantized else 0.99


def check_fidelity(
    worker: Worker,
    name: str,
    folder: Path,
    progress: Progress,
    *,
    dense: bool = False,
    noise: float | None = None,
) -> Fidelity:
    """Compare the loaded model ``name`` with the reference files in ``folder``.

    Args:
        worker: with the model loaded.
        name: of the model.
        folder: of an artifact or a baseline.
        progress: where it is reported.
        dense: compare with the dense program on the artifact's windows, where the reference has that.
        noise: mean log-probability difference of the dense model in the same runtime and on the same windows. With it the
            model's own is held to ``NOISE_FACTOR`` times that, plus ``INDEPENDENT_ROUNDINGS`` times what quantized activations do
            to the program.
    """
    if (folder / DECODER_FILE).is_file():
        reference = json.loads((folder / DECODER_FILE).read_text(encoding="utf-8"))
        return _decoder(worker, name, reference, progress, "dense_traces" if dense else "traces", noise)
    return _samples(worker, name, folder / SAMPLE_FILE, progress)


def has_dense_traces(folder: Path) -> bool:
    """Whether the reference in ``folder`` tells the dense program's answers too."""
    path = folder / DECODER_FILE
    return path.is_file() and "dense_traces" in json.loads(path.read_text(encoding="utf-8"))


def _decoder(
    worker: Worker, name: str, reference: dict[str, Any], progress: Progress, traces: str, noise: float | None
) -> Fidelity:
    with progress.task("fidelity") as task:
        request = Trace(name, reference["windows"], reference["prefill"])
        found = worker.call(request, on_progress=lambda done, total: task.advance()).windows
    expected = [read(TokenTrace, trace) for trace in reference[traces]]
    difference = np.abs(_column(expected, "logprob") - _column(found, "logprob"))
    mean = float(difference.mean())
    allowed = min(mean if traces == "dense_traces" else noise or 0.0, LARGEST_NOISE_NATS)
    tie = min(max(2 * mean, TIE_NATS), max(LARGEST_TIE_NATS, 4 * allowed))
    real = _column(expected, "margin") >= tie
    equal = _column(expected, "top1") == _column(found, "top1")
    bound = None
    if noise is not None:
        quantized = float(reference.get("activation_error") or 0.0)
        bound = max(NOISE_FACTOR * noise, LEAST_BOUND_NATS) + INDEPENDENT_ROUNDINGS * quantized
    return Fidelity(
        tokens=int(difference.size),
        ties=int((~real).sum()),
        mean_abs_logprob_diff=mean if np.isfinite(mean) else None,
        logprob_bound=bound,
        max_abs_diff=float(difference.max()) if np.isfinite(mean) else None,
        top1_agreement=float(equal[real].mean()) if real.any() and np.isfinite(mean) else 0.0,
    )


def _column(traces: list[TokenTrace], field: Literal["top1", "logprob", "margin"]) -> np.ndarray[Any, Any]:
    return np.concatenate([np.asarray(getattr(trace, field), np.float64) for trace in traces])


def _samples(worker: Worker, name: str, path: Path, progress: Progress) -> Fidelity:
    with np.load(path, allow_pickle=False) as archive:
        feeds = {key[3:]: archive[key] for key in archive.files if key.startswith("in.")}
        expected = {key[4:]: archive[key] for key in archive.files if key.startswith("out.")}
    with progress.task("fidelity", total=1) as task, tempfile.TemporaryDirectory() as scratch:
        found = run_samples(worker, name, feeds, Path(scratch))
        task.advance()
    first = next(iter(expected))
    if not all(np.isfinite(values).all() for values in found.values()):
        return Fidelity(samples=int(expected[first].shape[0]), top1_agreement=0.0)
    return Fidelity(
        samples=int(expected[first].shape[0]),
        max_abs_diff=max(float(np.abs(expected[key] - found[key]).max()) for key in expected),
        mean_cosine=float(cosine(expected[first], found[first]).mean()),
        top1_agreement=float((_answers(expected[first]) == _answers(found[first])).mean()),
    )


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
    """Arg-max of the last dimension: the class for classifiers, a stable fingerprint of hidden states otherwise."""
    result: np.ndarray[Any, Any] = values.argmax(axis=-1)
    return result
