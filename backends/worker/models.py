"""The worker of runtimes that load a folder as a ``Model``: a backend says which runtime it is and how a folder is opened."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Mapping
from typing import TypeVar

import numpy as np

from compile_sparse.backends.worker.base import Worker, in_turns, time_rounds
from compile_sparse.backends.worker.decoder import as_batch, observe_batch, score_window, time_generation, trace_batch
from compile_sparse.backends.worker.errors import RequestError
from compile_sparse.backends.worker.machine import resident_bytes
from compile_sparse.backends.worker.model import Array, Model, Tokens, Watched
from compile_sparse.compiler.runtimes.messages import (
    Benchmark,
    BenchmarkSamples,
    Done,
    Load,
    Loaded,
    Memory,
    Observe,
    PeakMemory,
    Ran,
    Round,
    Rounds,
    Run,
    SampleTimes,
    Score,
    Scores,
    Trace,
    Traces,
    Unload,
)
from compile_sparse.compiler.runtimes.wire import Handler, Report

__all__ = ["ModelWorker"]

M = TypeVar("M", bound=Model)


class ModelWorker(Worker[M]):
    """Answers every request of ``runtimes.messages``; what each means is said there."""

    @abstractmethod
    def open(self, folder: str, threads: int, device: str) -> M:
        """The model in ``folder``, ready to run.

        Raises:
            RequestError: there is none, or the runtime does not take it.
        """

    def generate(self, model: M, tokens: Tokens, prompt: int) -> Round:
        """Times of one generation: a prompt, the first of ``tokens [B, S]``, and as many steps as there are others."""
        return time_generation(model, tokens, prompt)

    def call(self, model: M, feeds: Mapping[str, Array]) -> float:
        """Seconds of one call."""
        began = time.perf_counter()
        model.run(feeds)
        return time.perf_counter() - began

    def handlers(self) -> list[Handler]:
        return [
            *super().handlers(),
            Load.handled_by(self.load),
            Unload.handled_by(self.unload),
            Trace.handled_by(self.trace),
            Score.handled_by(self.score),
            Benchmark.handled_by(self.benchmark),
            Memory.handled_by(self.memory),
            Run.handled_by(self.run),
            Observe.handled_by(self.observe),
            BenchmarkSamples.handled_by(self.benchmark_samples),
        ]

    def load(self, request: Load, report: Report) -> Loaded:
        began = time.perf_counter()
        model = self._models[request.name] = self.open(request.folder, request.threads, request.device)
        return Loaded(
            seconds=time.perf_counter() - began,
            rss_bytes=resident_bytes("VmRSS"),
            inputs=list(model.inputs),
            outputs=list(model.outputs),
            share_buffer=model.share_buffer,
        )

    def unload(self, request: Unload, report: Report) -> Done:
        self.model(request.name)
        del self._models[request.name]
        return Done()

    def trace(self, request: Trace, report: Report) -> Traces:
        model = self.model(request.name)
        return Traces(trace_batch(model, as_batch(request.windows), request.prefill, report))

    def score(self, request: Score, report: Report) -> Scores:
        model, against = self.model(request.name), self.model(request.against)
        scores = []
        for window in request.windows:
            scores.append(score_window(model, against, window))
            report(len(scores), len(request.windows))
        return Scores(scores)

    def benchmark(self, request: Benchmark, report: Report) -> Rounds:
        models = {name: self.model(name) for name in request.names}
        shape = (request.batch, request.prompt_tokens + request.output_tokens)
        tokens = np.random.default_rng(request.seed).integers(0, request.vocab, shape)

        def generate(name: str, tokens: Tokens) -> Round:
            return self.generate(models[name], tokens, request.prompt_tokens)

        return time_rounds(request, lambda: tokens, generate, report)

    def memory(self, request: Memory, report: Report) -> PeakMemory:
        model = self.open(request.folder, request.threads, request.device)
        shape = (request.batch, request.prompt_tokens + request.output_tokens)
        tokens = np.random.default_rng(0).integers(0, request.vocab, shape)
        self.generate(model, tokens, request.prompt_tokens)
        return PeakMemory(resident_bytes("VmHWM"))

    def run(self, request: Run, report: Report) -> Ran:
        results = self.model(request.name).run(_arrays(request.feeds))
        np.savez(request.outputs, **results)  # type: ignore[arg-type]  # numpy's types take them for its options
        return Ran(list(results))

    def observe(self, request: Observe, report: Report) -> Ran:
        model = self.model(request.name)
        if not isinstance(model, Watched):
            raise RequestError("this runtime does not show the outputs of single layers")
        with model.watch(request.values) as latest:
            if request.windows:
                calls = observe_batch(model, latest, as_batch(request.windows), request.prefill, report)
            else:
                model.run(_arrays(request.feeds))
                calls = [dict(latest)]
        found = {f"{number}.{name}": value for number, values in enumerate(calls) for name, value in values.items()}
        np.savez(request.outputs, **found)  # type: ignore[arg-type]  # numpy's types take them for its options
        return Ran(list(found))

    def benchmark_samples(self, request: BenchmarkSamples, report: Report) -> SampleTimes:
        models, feeds = {name: self.model(name) for name in request.names}, _arrays(request.feeds)
        times: dict[str, list[float]] = {name: [] for name in request.names}
        total = request.warmup + request.rounds
        for done, (counts, order) in enumerate(in_turns(request.names, request.warmup, request.rounds), 1):
            for name in order:
                seconds = self.call(models[name], feeds)
                if counts:
                    times[name].append(seconds)
            report(done, total)
        return SampleTimes(times)


def _arrays(path: str) -> dict[str, Array]:
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}
