"""Does the runtime compute what the program means? "It loaded" proves nothing."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from compile_sparse.compiler.progress import Progress
from compile_sparse.compiler.report import Fidelity
from compile_sparse.compiler.verify.reference import DECODER_FILE, SAMPLE_FILE
from compile_sparse.compiler.worker import Worker

__all__ = ["check_fidelity", "fidelity_bound"]

TIE_NATS, LARGEST_TIE_NATS = 0.01, 0.1
"""A position where the program's best two tokens are closer than twice the mean difference between runtime and program is a
tie: noise decides it. At least 0.01 nats (1 % in probability), and at most 0.1, so that a wrong model cannot excuse itself."""


def fidelity_bound(quantized: bool) -> float:
    """Lowest top-1 agreement that counts as the same model.

    Runtime kernels round activations to 8 bits in their own order, so a quantized artifact may flip near-ties; a
    floating-point one may not.
    """
    return 0.97 if quantized else 0.99


def check_fidelity(worker: Worker, name: str, folder: Path, progress: Progress) -> Fidelity:
    """Compare the loaded model ``name`` with the reference files in ``folder``."""
    if (folder / DECODER_FILE).is_file():
        return _decoder(worker, name, json.loads((folder / DECODER_FILE).read_text(encoding="utf-8")), progress)
    return _samples(worker, name, folder / SAMPLE_FILE, progress)


def _decoder(worker: Worker, name: str, reference: dict[str, Any], progress: Progress) -> Fidelity:
    with progress.task("fidelity") as task:
        reply = worker.call(
            "trace",
            name=name,
            windows=reference["windows"],
            prefill=reference["prefill"],
            on_progress=lambda done, total: task.advance(),
        )
    expected, found = reference["traces"], reply["windows"]

    def column(traces: list[dict[str, Any]], key: str) -> np.ndarray[Any, Any]:
        return np.concatenate([np.asarray(trace[key], np.float64) for trace in traces])

    difference = np.abs(column(expected, "logprob") - column(found, "logprob"))
    tie = min(max(2 * float(difference.mean()), TIE_NATS), LARGEST_TIE_NATS)
    real = column(expected, "margin") >= tie
    equal = column(expected, "top1") == column(found, "top1")
    return Fidelity(
        tokens=int(difference.size),
        ties=int((~real).sum()),
        mean_abs_logprob_diff=float(difference.mean()),
        max_abs_diff=float(difference.max()),
        top1_agreement=float(equal[real].mean()) if real.any() else 0.0,
    )


def _samples(worker: Worker, name: str, path: Path, progress: Progress) -> Fidelity:
    with np.load(path, allow_pickle=False) as archive:
        feeds = {key[3:]: archive[key] for key in archive.files if key.startswith("in.")}
        expected = {key[4:]: archive[key] for key in archive.files if key.startswith("out.")}
    with progress.task("fidelity", total=1) as task, tempfile.TemporaryDirectory() as scratch:
        found = run_samples(worker, name, feeds, Path(scratch))
        task.advance()
    first = next(iter(expected))
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
    worker.call("run", name=name, feeds=str(inputs), outputs=str(outputs))
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
