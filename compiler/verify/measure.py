"""Verification: load baseline and artifact into one worker and measure fidelity, speed and quality."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from compile_sparse.compiler.artifact.report import (
    Fidelity,
    Interval,
    LayerFidelity,
    Performance,
    Quality,
    RuntimeSection,
)
from compile_sparse.compiler.extension.backend_contract import Backend, DerivedFiles
from compile_sparse.compiler.extension.run_settings import RunSettings
from compile_sparse.compiler.progress import Progress
from compile_sparse.compiler.runtimes.client import Worker
from compile_sparse.compiler.runtimes.messages import Load
from compile_sparse.compiler.targets.target import Target
from compile_sparse.compiler.targets.workload import Workload
from compile_sparse.compiler.verify.agreement import measure_agreement
from compile_sparse.compiler.verify.evaluation.models import EvaluationSlice, measure_evaluation
from compile_sparse.compiler.verify.fidelity import check_fidelity
from compile_sparse.compiler.verify.performance import (
    BASELINE,
    COMPILED,
    measure_decoder,
    measure_memory,
    measure_over_dense,
    measure_samples,
)
from compile_sparse.compiler.verify.quality import MAX_LOSS, measure_divergence, measure_perplexity
from compile_sparse.compiler.verify.reference import DECODER_FILE, SAMPLE_FILE
from compile_sparse.compiler.verify.reference import TOKENS as REFERENCE_TOKENS

__all__ = [
    "LOAD_TIMEOUT_SECONDS",
    "MeasureRequest",
    "Measured",
    "cannot_measure",
    "folder_bytes",
    "measure",
    "measure_answers",
    "model_bytes",
]

LOAD_TIMEOUT_SECONDS = 1800
DENSE_BUILD = "dense build"
"""What the worker calls the same model built without sparse kernels."""
LARGE_SHARE = 4
"""Models that are this many times as large as free memory allows are not run beside each other."""


@dataclass(frozen=True)
class MeasureRequest:
    """What is measured.

    Attributes:
        baseline, artifact: folders with ``model/`` and a reference file each.
        workload: what speed is measured on.
        slices: evaluation windows of a decoder by slice name.
        threads: of the runtime.
        vocabulary: token ids are drawn below it; 0 for models without tokens.
        seed: of what is drawn.
        evaluation: evaluation data of other models by slice name.
        max_loss: loss of the worst slice up to which quality does not count as lost, None for any; see ``quality``.
    """

    baseline: Path
    artifact: Path
    workload: Workload
    slices: Mapping[str, Sequence[Sequence[int]]]
    threads: int
    vocabulary: int
    seed: int
    evaluation: Mapping[str, EvaluationSlice] = field(default_factory=dict)
    max_loss: float | None = MAX_LOSS

    @property
    def folders(self) -> dict[str, Path]:
        """What the runtime loads, by the name it gets there."""
        return {BASELINE: self.baseline / "model", COMPILED: self.artifact / "model"}

    @property
    def decoder(self) -> bool:
        """Whether the model generates."""
        return (self.artifact / DECODER_FILE).is_file()


@dataclass(frozen=True)
class Measured:
    """Everything one verification found.

    Attributes:
        runtime, performance: None where a reference runtime answered for the target's.
        fidelity, baseline_fidelity: of the artifact and of the dense model.
        quality: of the compiled model against the dense one; without evaluation data only how far apart they are.
        over_dense: speed over the same model without sparse kernels, by optimization profile; empty where there is none.
    """

    runtime: RuntimeSection | None
    fidelity: Fidelity
    baseline_fidelity: Fidelity
    performance: Performance | None
    quality: Quality | None
    over_dense: Mapping[str, Interval] = field(default_factory=dict)

    def with_layers(self, layers: LayerFidelity | None) -> Measured:
        """With what was found layer by layer."""
        return replace(self, fidelity=self.fidelity.model_copy(update={"layers": layers}))


def cannot_measure(backend: Backend, model: Path, target: Target, settings: RunSettings) -> str:
    """Why ``model`` cannot be measured here although the runtime is there, or an empty string."""
    gpus = settings.tensor_parallel
    if gpus > 1:
        return f"A model split over {gpus} GPUs is not measured by this version; its sizes were checked."
    return backend.cannot_run(model, target)


def folder_bytes(folder: Path, *, without: Collection[str] = ()) -> int:
    """Bytes of the files in ``folder``; those that match a pattern of ``without`` are left out."""
    files = (path for path in folder.rglob("*") if path.is_file())
    names = {path: path.relative_to(folder).as_posix() for path in files}
    return sum(
        path.stat().st_size for path, name in names.items() if not any(fnmatch(name, pattern) for pattern in without)
    )


def model_bytes(backend: Backend, folder: Path) -> int:
    """Bytes of the model in a lowered folder, not of what was made from it and lies beside."""
    return folder_bytes(folder, without=backend.derived if isinstance(backend, DerivedFiles) else ())


def measure(
    request: MeasureRequest, backend: Backend, target: Target, settings: RunSettings, progress: Progress
) -> Measured:
    """Measure artifact and baseline in the target's runtime."""
    command = backend.worker_command(target, settings)
    workload, folders, seed = request.workload, request.folders, request.seed
    sizes = {name: model_bytes(backend, folder) for name, folder in folders.items()}
    memory: dict[str, int] = {}
    exact = settings.precision_on(target) == "fp32" and target.device == "cpu"
    if request.decoder:
        # Both at once where memory is plenty, because starting a runtime may take a while. The workers are ended before the
        # threads are waited for, so that an interruption need not wait.
        large = LARGE_SHARE * sum(sizes.values()) > psutil.virtual_memory().available
        with (
            progress.task("memory", total=len(folders)) as task,
            ThreadPoolExecutor(1 if large else len(folders)) as pool,
            ExitStack() as stack,
        ):
            workers = {name: stack.enter_context(Worker(command)) for name in folders}
            waiting = {
                name: pool.submit(
                    measure_memory,
                    workers[name],
                    folder,
                    workload,
                    threads=request.threads,
                    vocabulary=request.vocabulary,
                    device=target.device,
                )
                for name, folder in folders.items()
            }
            for name, found in waiting.items():
                memory[name] = found.result()
                task.advance()
    with Worker(command) as worker:
        _load(worker, request, folders, device=target.device)
        baseline_fidelity, fidelity = _check_both(worker, request.baseline, request.artifact, progress)
        batch: dict[str, np.ndarray[Any, Any]] | None = None
        if request.decoder:
            performance = measure_decoder(
                worker,
                workload,
                threads=request.threads,
                vocabulary=request.vocabulary,
                seed=seed,
                # A runtime in 16 bits may compute in another type than it reads from disk, and a GPU has its own bandwidth.
                weight_bytes=sizes if exact else {},
                peak_rss_bytes=memory,
                progress=progress,
            )
        else:
            feeds = _reference_feeds(request.artifact / SAMPLE_FILE)
            batch = {name: _repeat(value, workload.batch) for name, value in feeds.items()}
            performance = measure_samples(worker, workload, batch, threads=request.threads, progress=progress)
        quality = _quality(worker, request, progress)
        dense = backend.dense_build(folders[COMPILED]) if isinstance(backend, DerivedFiles) else None
        ratios = {}
        if dense is not None:
            _load(worker, request, {DENSE_BUILD: dense}, device=target.device)
            ratios = measure_over_dense(
                worker, DENSE_BUILD, workload, batch, vocabulary=request.vocabulary, seed=seed, progress=progress
            )
        runtime = RuntimeSection(**asdict(worker.runtime))
    return Measured(runtime, fidelity, baseline_fidelity, performance, quality, ratios)


def measure_answers(request: MeasureRequest, command: Sequence[str], progress: Progress) -> Measured:
    """What ``measure`` finds of answers, not of speed, in a reference runtime (on a processor).

    Args:
        request: what is measured.
        command: of the reference runtime's worker.
        progress: where it is reported.
    """
    with Worker(command) as worker:
        _load(worker, request, request.folders, device="cpu")
        baseline_fidelity, fidelity = _check_both(worker, request.baseline, request.artifact, progress)
        quality = _quality(worker, request, progress)
        ran_in = f"{worker.runtime.name} {worker.runtime.version}"
    return Measured(
        runtime=None,
        fidelity=fidelity.model_copy(update={"runtime": ran_in}),
        baseline_fidelity=baseline_fidelity,
        performance=None,
        quality=quality,
    )


def _quality(worker: Worker, request: MeasureRequest, progress: Progress) -> Quality:
    limit = request.max_loss
    if not request.decoder:
        feeds = _reference_feeds(request.artifact / SAMPLE_FILE)
        if request.evaluation:
            return measure_evaluation(worker, request.evaluation, feeds, request.seed, progress, limit)
        return measure_agreement(worker, feeds, progress=progress, max_loss=limit)
    if request.slices:
        return measure_perplexity(worker, request.slices, seed=request.seed, progress=progress, max_loss=limit)
    windows = json.loads((request.artifact / DECODER_FILE).read_text(encoding="utf-8"))["windows"]
    return measure_divergence(worker, windows, progress=progress, max_loss=limit)


def _load(worker: Worker, request: MeasureRequest, folders: Mapping[str, Path], *, device: str) -> None:
    workload = request.workload
    longest = max([REFERENCE_TOKENS, *(len(window) for windows in request.slices.values() for window in windows)])
    longest = max([longest, *(each.longest for each in request.evaluation.values())])
    for name, folder in folders.items():
        load = Load(
            name=name,
            folder=str(folder),
            threads=request.threads,
            device=device,
            sequence=max(longest, workload.prompt + workload.output),
            sequences=max(workload.levels),
        )
        worker.call(load, timeout=LOAD_TIMEOUT_SECONDS)


def _check_both(worker: Worker, baseline: Path, artifact: Path, progress: Progress) -> tuple[Fidelity, Fidelity]:
    """Fidelity of the dense model and of the artifact."""
    return check_fidelity(worker, BASELINE, baseline, progress), check_fidelity(worker, COMPILED, artifact, progress)


def _reference_feeds(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    with np.load(path, allow_pickle=False) as archive:
        return {key[3:]: archive[key] for key in archive.files if key.startswith("in.")}


def _repeat(value: np.ndarray[Any, Any], batch: int) -> np.ndarray[Any, Any]:
    """``batch`` samples out of the reference's, repeated as needed."""
    return value[np.arange(batch) % value.shape[0]]
