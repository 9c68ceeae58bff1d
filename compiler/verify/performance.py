"""Speed of baseline and compiled model in the same runtime and process, in alternating rounds."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from compile_sparse.compiler.artifact.report import (
    Interval,
    Level,
    MeasuredWorkload,
    Percentiles,
    Performance,
    Ratios,
    Speed,
)
from compile_sparse.compiler.progress import Progress
from compile_sparse.compiler.runtimes.client import Worker
from compile_sparse.compiler.runtimes.messages import Bandwidth, Benchmark, BenchmarkSamples, Memory, Round
from compile_sparse.compiler.targets.workload import Workload
from compile_sparse.compiler.verify.statistics import percentiles, ratio_of_rounds

__all__ = ["BASELINE", "COMPILED", "measure_decoder", "measure_memory", "measure_over_dense", "measure_samples"]

BASELINE, COMPILED = "baseline", "compiled"
NAMES = (BASELINE, COMPILED)
WARMUP_ROUNDS = 2


def measure_decoder(
    worker: Worker,
    workload: Workload,
    *,
    threads: int,
    vocabulary: int,
    seed: int,
    weight_bytes: Mapping[str, int],
    peak_rss_bytes: Mapping[str, int],
    progress: Progress,
) -> Performance:
    """Prefill and decode of the two loaded models on random tokens, for each number of requests at once.

    Args:
        worker: with both models loaded under ``NAMES``.
        workload: prompt and output length, requests at once, rounds.
        threads: of the runtime, for the record.
        vocabulary: token ids are drawn below it.
        seed: of the draw.
        weight_bytes: bytes a decode step reads at least, per model; empty where that is not known.
        peak_rss_bytes: measured in processes of their own.
        progress: where rounds are reported.
    """
    ideal: dict[str, float] = {}
    if weight_bytes:
        bandwidth = worker.call(Bandwidth(threads)).bytes_per_s
        ideal = {name: weight_bytes[name] / bandwidth for name in NAMES}
    levels: dict[int, Level] = {}
    total = (WARMUP_ROUNDS + workload.rounds) * len(NAMES) * len(workload.levels)
    with progress.task("performance", total=total) as task:
        for batch in workload.levels:
            request = _benchmark(NAMES, workload, batch, vocabulary, seed)
            reply = worker.call(request, on_progress=lambda done, count: task.advance())
            # Memory was measured with the first number of requests.
            memory = peak_rss_bytes if batch == workload.levels[0] else {}
            levels[batch] = _level(reply.rounds, workload, batch, memory, ideal)
    first = levels[workload.levels[0]]
    return Performance(
        workload=MeasuredWorkload(
            batch=workload.levels[0],
            prompt_tokens=workload.prompt,
            output_tokens=workload.output,
            rounds=workload.rounds,
            threads=threads,
        ),
        baseline=first.baseline,
        compiled=first.compiled,
        ratio=first.ratio,
        concurrency={str(batch): level for batch, level in levels.items()} if len(levels) > 1 else None,
    )


def _benchmark(names: Sequence[str], workload: Workload, batch: int, vocabulary: int, seed: int) -> Benchmark:
    return Benchmark(
        names=list(names),
        prompt_tokens=workload.prompt,
        output_tokens=workload.output,
        rounds=workload.rounds,
        vocab=vocabulary,
        batch=batch,
        warmup=WARMUP_ROUNDS,
        seed=seed,
    )


def _level(
    rounds: Mapping[str, Sequence[Round]],
    workload: Workload,
    batch: int,
    peak_rss_bytes: Mapping[str, int],
    ideal_step_s: Mapping[str, float],
) -> Level:
    def ratio(quantity: Callable[[Round], float]) -> Interval:
        return _interval([quantity(r) for r in rounds[BASELINE]], [quantity(r) for r in rounds[COMPILED]])

    speeds = {
        name: _speed(rounds[name], workload, batch, peak_rss_bytes.get(name), ideal_step_s.get(name)) for name in NAMES
    }
    return Level(
        baseline=speeds[BASELINE],
        compiled=speeds[COMPILED],
        ratio=Ratios(
            prefill_tok_s=ratio(lambda r: 1 / r.prefill_s),
            decode_tok_s=ratio(lambda r: 1 / r.decode_s),
            workload=ratio(lambda r: 1 / (r.prefill_s + r.decode_s)),
        ),
    )


def _speed(
    rounds: Sequence[Round],
    workload: Workload,
    batch: int,
    peak_rss_bytes: int | None,
    ideal_step_s: float | None,
) -> Speed:
    prefill = float(np.median([r.prefill_s for r in rounds]))
    decode = float(np.median([r.decode_s for r in rounds]))
    steps = [t for r in rounds for t in r.token_s]
    # A runtime that schedules requests itself tells each one's time; elsewhere the whole batch starts and ends together.
    first = [t for r in rounds for t in r.ttft_s or [r.prefill_s]]
    return Speed(
        prefill_tok_s=batch * workload.prompt / prefill,
        decode_tok_s=batch * workload.output / decode,
        ttft_ms=Percentiles(**percentiles([1e3 * t for t in first])),
        tpot_ms=Percentiles(**percentiles([1e3 * t for t in steps])),
        peak_rss_bytes=peak_rss_bytes,
        roofline=None if ideal_step_s is None else ideal_step_s / float(np.median(steps)),
    )


def measure_samples(
    worker: Worker,
    workload: Workload,
    feeds: dict[str, np.ndarray[Any, Any]],
    *,
    threads: int,
    progress: Progress,
) -> Performance:
    """Whole calls of the two loaded models on ``feeds`` (``workload.batch`` samples)."""
    rounds = max(workload.rounds, 10)  # one call is short, so more of them
    with progress.task("performance", total=1) as task, tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "feeds.npz")
        np.savez(path, **feeds)  # type: ignore[arg-type]
        seconds = worker.call(BenchmarkSamples(list(NAMES), str(path), rounds, WARMUP_ROUNDS)).rounds
        task.advance()

    def speed(name: str) -> Speed:
        return Speed(
            samples_s=workload.batch / float(np.median(seconds[name])),
            latency_ms=Percentiles(**percentiles([1e3 * s for s in seconds[name]])),
        )

    return Performance(
        workload=MeasuredWorkload(batch=workload.batch, rounds=rounds, threads=threads),
        baseline=speed(BASELINE),
        compiled=speed(COMPILED),
        ratio=Ratios(samples_s=_interval([1 / s for s in seconds[BASELINE]], [1 / s for s in seconds[COMPILED]])),
    )


def measure_over_dense(
    worker: Worker,
    dense: str,
    workload: Workload,
    feeds: dict[str, np.ndarray[Any, Any]] | None,
    *,
    vocabulary: int,
    seed: int,
    progress: Progress,
) -> dict[str, Interval]:
    """Speed of the compiled model over the loaded model ``dense``, in alternating rounds: by optimization profile.

    Args:
        worker: with both loaded.
        dense: name of the same model, built without sparse kernels.
        workload: what is run.
        feeds: a batch of samples; None for decoders, whose prompts are drawn.
        vocabulary, seed: of the draw.
        progress: where it is reported.
    """
    names = [dense, COMPILED]
    with progress.task("sparse kernels against dense ones", total=1) as task, tempfile.TemporaryDirectory() as scratch:
        if feeds is None:
            decoded = worker.call(_benchmark(names, workload, workload.levels[0], vocabulary, seed)).rounds
            times = {
                "prefill": [[r.prefill_s for r in decoded[name]] for name in names],
                "decode": [[r.decode_s for r in decoded[name]] for name in names],
            }
        else:
            path = Path(scratch, "feeds.npz")
            np.savez(path, **feeds)  # type: ignore[arg-type]
            rounds = max(workload.rounds, 10)
            sampled = worker.call(BenchmarkSamples(names, str(path), rounds, WARMUP_ROUNDS)).rounds
            times = {"samples": [sampled[name] for name in names]}
        task.advance()
    return {
        profile: _interval([1 / t for t in of_dense], [1 / t for t in of_sparse])
        for profile, (of_dense, of_sparse) in times.items()
    }


def measure_memory(
    worker: Worker, folder: Path, workload: Workload, *, threads: int, vocabulary: int, device: str
) -> int:
    """Peak resident bytes of a fresh process, ``worker``, that loads one model and generates once."""
    request = Memory(
        folder=str(folder),
        threads=threads,
        prompt_tokens=workload.prompt,
        output_tokens=workload.output,
        batch=workload.levels[0],
        vocab=vocabulary,
        device=device,
    )
    return worker.call(request).peak_rss_bytes


def _interval(baseline: Sequence[float], compiled: Sequence[float]) -> Interval:
    estimate = ratio_of_rounds(baseline, compiled)
    return Interval(value=estimate.value, ci95=(estimate.low, estimate.high))
