"""Verification: load baseline and artifact into one worker and measure fidelity, speed and quality."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from compile_sparse.compiler.artifact.report import Fidelity, Interval, Performance, Quality, RuntimeSection
from compile_sparse.compiler.extension.backend_contract import Backend
from compile_sparse.compiler.pipeline.building import ENGINES
from compile_sparse.compiler.progress import Progress
from compile_sparse.compiler.runtimes.client import Worker
from compile_sparse.compiler.runtimes.messages import Load
from compile_sparse.compiler.targets.target import Target
from compile_sparse.compiler.targets.workload import Workload
from compile_sparse.compiler.verify.fidelity import check_fidelity, has_dense_traces
from compile_sparse.compiler.verify.performance import (
    BASELINE,
    COMPILED,
    measure_decoder,
    measure_memory,
    measure_samples,
    measure_twin,
)
from compile_sparse.compiler.verify.quality import measure_agreement, measure_perplexity
from compile_sparse.compiler.verify.reference import DECODER_FILE, SAMPLE_FILE
from compile_sparse.compiler.verify.reference import TOKENS as REFERENCE_TOKENS

__all__ = ["BESIDE", "TWIN", "Measured", "cannot_measure", "folder_bytes", "measure", "measure_answers"]

LOAD_TIMEOUT_SECONDS = 1800
BESIDE = "checkpoint"
"""Folder of a model folder that holds the same model in another form."""
TWIN = "twin"
"""Folder of a model folder that holds the same model built without sparse kernels, to be measured against it."""
LARGE_SHARE = 4
"""Models that are this many times as large as free memory allows are not run beside each other."""


@dataclass(frozen=True)
class Measured:
    """Everything one verification found. ``runtime`` and ``performance`` are None where another runtime stood in. ``twin``: speed
    over the same model without sparse kernels, by optimization profile; empty where there is none.
    """

    runtime: RuntimeSection | None
    fidelity: Fidelity
    baseline_fidelity: Fidelity
    performance: Performance | None
    quality: Quality | None
    twin: Mapping[str, Interval] = field(default_factory=dict)


def cannot_measure(backend: Backend, model: Path, target: Target) -> str:
    """Why ``model`` cannot be measured here although the runtime is there, or an empty string."""
    if target.tensor_parallel > 1:
        return (
            f"A model split over {target.tensor_parallel} GPUs is not measured by this version; its sizes were checked."
        )
    return backend.cannot_run(model, target)


def folder_bytes(folder: Path) -> int:
    """Bytes of the model in a folder: its graph or checkpoint, not what else lies there in another form, engines included."""
    files = (path for path in folder.rglob("*") if path.relative_to(folder).parts[0] not in (BESIDE, TWIN))
    return sum(path.stat().st_size for path in files if path.is_file() and path.suffix != ENGINES)


def measure(
    backend: Backend,
    target: Target,
    *,
    baseline: Path,
    artifact: Path,
    workload: Workload,
    threads: int,
    vocabulary: int,
    slices: Mapping[str, Sequence[Sequence[int]]],
    seed: int,
    progress: Progress,
) -> Measured:
    """Measure ``artifact/model`` against ``baseline/model``; each folder also holds its reference file."""
    command = backend.worker_command(target)
    folders = {BASELINE: baseline / "model", COMPILED: artifact / "model"}
    decoder = (artifact / DECODER_FILE).is_file()
    memory: dict[str, int] = {}
    exact = target.baseline_precision == "fp32" and target.device == "cpu"
    if decoder:
        # Both at once where memory is plenty, because starting a runtime may take a while. The workers are ended before the
        # threads are waited for, so that an interruption need not wait.
        large = LARGE_SHARE * sum(map(folder_bytes, folders.values())) > psutil.virtual_memory().available
        with (
            progress.task("memory", total=len(folders)) as task,
            ThreadPoolExecutor(1 if large else len(folders)) as pool,
            ExitStack() as stack,
        ):
            workers = {name: stack.enter_context(Worker(command)) for name in folders}
            options: dict[str, Any] = {"threads": threads, "vocabulary": vocabulary, "device": target.device}
            waiting = {
                name: pool.submit(measure_memory, workers[name], folder, workload, **options)
                for name, folder in folders.items()
            }
            for name, found in waiting.items():
                memory[name] = found.result()
                task.advance()
    with Worker(command) as worker:
        _load(worker, folders, workload, slices, threads=threads, device=target.device)
        baseline_fidelity, fidelity = _check_both(worker, baseline, artifact, progress)
        if decoder:
            performance = measure_decoder(
                worker,
                workload,
                threads=threads,
                vocabulary=vocabulary,
                seed=seed,
                # A runtime in 16 bits may compute in another type than it reads from disk, and a GPU has its own bandwidth.
                weight_bytes={name: folder_bytes(folder) for name, folder in folders.items()} if exact else {},
                peak_rss_bytes=memory,
                progress=progress,
            )
            quality = measure_perplexity(worker, slices, seed=seed, progress=progress) if slices else None
        else:
            feeds = _reference_feeds(artifact / SAMPLE_FILE)
            batch = {name: _repeat(value, workload.batch) for name, value in feeds.items()}
            performance = measure_samples(worker, workload, batch, threads=threads, progress=progress)
            quality = measure_agreement(worker, feeds, progress=progress)
        twin = folders[COMPILED] / TWIN
        ratios = {}
        if twin.is_dir():
            _load(worker, {TWIN: twin}, workload, slices, threads=threads, device=target.device)
            ratios = measure_twin(
                worker, TWIN, workload, None if decoder else batch, vocabulary=vocabulary, seed=seed, progress=progress
            )
        runtime = RuntimeSection(**asdict(worker.runtime))
    return Measured(runtime, fidelity, baseline_fidelity, performance, quality, ratios)


def measure_answers(
    command: Sequence[str],
    *,
    baseline: Path,
    artifact: Path,
    workload: Workload,
    slices: Mapping[str, Sequence[Sequence[int]]],
    threads: int,
    seed: int,
    progress: Progress,
) -> Measured:
    """What ``measure`` finds of answers, not of speed, in a runtime that stands in for the target's (on a processor)."""
    folders = {BASELINE: baseline / "model", COMPILED: artifact / "model"}
    with Worker(command) as worker:
        _load(worker, folders, workload, slices, threads=threads, device="cpu")
        baseline_fidelity, fidelity = _check_both(worker, baseline, artifact, progress)
        quality: Quality | None
        if not (artifact / DECODER_FILE).is_file():
            quality = measure_agreement(worker, _reference_feeds(artifact / SAMPLE_FILE), progress=progress)
        else:
            quality = measure_perplexity(worker, slices, seed=seed, progress=progress) if slices else None
        ran_in = f"{worker.runtime.name} {worker.runtime.version}"
    return Measured(
        runtime=None,
        fidelity=fidelity.model_copy(update={"runtime": ran_in}),
        baseline_fidelity=baseline_fidelity,
        performance=None,
        quality=quality,
    )


def _load(
    worker: Worker,
    folders: Mapping[str, Path],
    workload: Workload,
    slices: Mapping[str, Sequence[Sequence[int]]],
    *,
    threads: int,
    device: str,
) -> None:
    longest = max([REFERENCE_TOKENS, *(len(window) for windows in slices.values() for window in windows)])
    for name, folder in folders.items():
        request = Load(
            name=name,
            folder=str(folder),
            threads=threads,
            device=device,
            sequence=max(longest, workload.prompt + workload.output),
            sequences=max(workload.levels),
        )
        worker.call(request, timeout=LOAD_TIMEOUT_SECONDS)


def _check_both(worker: Worker, baseline: Path, artifact: Path, progress: Progress) -> tuple[Fidelity, Fidelity]:
    """Fidelity of the dense model and of the artifact. Where rounding in the runtime's precision is visible, the dense model
    shows how much, on the same windows.
    """
    dense = has_dense_traces(artifact)
    of_baseline = check_fidelity(worker, BASELINE, artifact if dense else baseline, progress, dense=dense)
    noise = of_baseline.mean_abs_logprob_diff if dense else None
    return of_baseline, check_fidelity(worker, COMPILED, artifact, progress, noise=noise)


def _reference_feeds(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    with np.load(path, allow_pickle=False) as archive:
        return {key[3:]: archive[key] for key in archive.files if key.startswith("in.")}


def _repeat(value: np.ndarray[Any, Any], batch: int) -> np.ndarray[Any, Any]:
    """``batch`` samples out of the reference's, repeated as needed."""
    return value[np.arange(batch) % value.shape[0]]
