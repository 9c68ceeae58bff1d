"""The measuring process of the TensorRT target: ``python -m compile_sparse.backends.tensorrt.run.worker engine|reference``.

``engine`` runs the engines of a folder on the GPU here (unverified: never run). ``reference``, the reference runtime, runs the
folder's ONNX graph on the processor with ONNX Runtime: what it computes is the graph's, how fast says nothing of the target, so
that it measures no speed.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from compile_sparse.backends.tensorrt.description import read_description
from compile_sparse.backends.tensorrt.engine.engines import check_engine, choose_engine
from compile_sparse.backends.tensorrt.processor import here, reference_version
from compile_sparse.backends.tensorrt.run.engine_session import EngineSession
from compile_sparse.backends.tensorrt.run.reference_session import ReferenceRuntime
from compile_sparse.backends.worker.decoder import as_batch
from compile_sparse.backends.worker.errors import RequestError
from compile_sparse.backends.worker.model import Array, Tokens
from compile_sparse.backends.worker.models import ModelWorker
from compile_sparse.backends.worker.serve import serve
from compile_sparse.compiler.runtimes.messages import (
    Bandwidth,
    Benchmark,
    BenchmarkSamples,
    Memory,
    PeakMemory,
    Positive,
    ReadSpeed,
    Round,
    Rounds,
    Runtime,
    SampleTimes,
    Window,
)
from compile_sparse.compiler.runtimes.wire import Handler, Report, Request

if TYPE_CHECKING:
    from compile_sparse.backends.tensorrt.engine.observers import Log

__all__ = ["EngineWorker", "Generate", "Generated", "ReferenceWorker"]

_PROBE_BYTES = 1 << 30


@dataclass(frozen=True)
class Generated:
    """Per prompt."""

    tokens: list[list[int]]


@dataclass(frozen=True)
class Generate(Request[Generated], operation="generate"):
    """Greedy tokens after a batch of prompts of one length: ``output_tokens`` of each."""

    name: str
    windows: list[Window]
    output_tokens: Positive


class ReferenceWorker(ModelWorker[ReferenceRuntime]):
    """Answers for the graph; its speed is not the target's and is not told."""

    def runtime(self) -> Runtime:
        """ONNX Runtime, in words that nobody takes for TensorRT."""
        return Runtime("onnxruntime, standing in for tensorrt", reference_version(), "cpu")

    def open(self, folder: str, threads: int, device: str) -> ReferenceRuntime:
        return ReferenceRuntime(Path(folder), threads)

    def handlers(self) -> list[Handler]:
        return [*super().handlers(), Generate.handled_by(self.greedy)]

    def greedy(self, request: Generate, report: Report) -> Generated:
        ids = as_batch(request.windows)
        generation = self.model(request.name).generation(ids.shape[0], ids.shape[1] + request.output_tokens)
        tokens = []
        for done in range(request.output_tokens):
            ids = generation.step(ids)[:, -1].argmax(-1)[:, None]
            tokens.append(ids)
            report(done + 1, request.output_tokens)
        return Generated(np.concatenate(tokens, axis=1).tolist())

    def benchmark(self, request: Benchmark, report: Report) -> Rounds:
        raise _no_speed()

    def benchmark_samples(self, request: BenchmarkSamples, report: Report) -> SampleTimes:
        raise _no_speed()


class EngineWorker(ModelWorker[EngineSession]):
    """Runs engines of ours on the GPU here. Unverified: never run on one.

    Args:
        allow_foreign: load an engine that is not what was recorded.
    """

    def __init__(self, allow_foreign: bool = False) -> None:
        super().__init__()
        self._allow_foreign = allow_foreign
        self._log: Log | None = None

    def runtime(self) -> Runtime:
        """The builder whose engines are preferred, and the GPU."""
        machine = here()
        name = next(iter(machine.versions), "tensorrt")
        return Runtime(name, machine.versions.get(name, ""), machine.gpu or "cuda")

    def handlers(self) -> list[Handler]:
        return [*super().handlers(), Generate.handled_by(self.greedy)]

    def open(self, folder: str, threads: int, device: str) -> EngineSession:
        """The engine in ``folder`` that fits this machine.

        Raises:
            Refusal, EnvironmentFailure: see ``engines``.
            RequestError: the runtime does not take it.
        """
        path, machine = Path(folder), here()
        description = read_description(path)
        record = choose_engine(description, machine)
        check_engine(path, record, machine, allow_foreign=self._allow_foreign)
        import torch

        from compile_sparse.backends.tensorrt.engine.bindings import choose
        from compile_sparse.backends.tensorrt.run.engine_session import load_engine

        choose(record.builder)
        from compile_sparse.backends.tensorrt.engine.observers import Log

        if self._log is None:
            self._log = Log(driverless=False)
            torch.cuda.set_stream(
                torch.cuda.Stream()
            )  # engines do not like the default stream, and it cannot be recorded
        plan = (path / record.file).read_bytes()
        if not self._allow_foreign and hashlib.sha256(plan).hexdigest() != record.sha256:
            raise RequestError(f"{record.file} was changed while it was being loaded")
        engine = load_engine(plan, self._log)
        return EngineSession(engine, description, record.profiles)

    def generate(self, model: EngineSession, tokens: Tokens, prompt: int) -> Round:
        """A prompt and greedy steps; as many as tokens are given after the prompt."""
        from compile_sparse.backends.tensorrt.run.decode_graph import time_generation

        return time_generation(model, tokens[:, :prompt], tokens.shape[1] - prompt).round

    def call(self, model: EngineSession, feeds: Mapping[str, Array]) -> float:
        """Seconds of one call, from inputs on the device to outputs on the device."""
        from compile_sparse.backends.tensorrt.run.decode_graph import time_call

        return time_call(model, feeds)

    def greedy(self, request: Generate, report: Report) -> Generated:
        from compile_sparse.backends.tensorrt.run.decode_graph import time_generation

        model, prompts = self.model(request.name), as_batch(request.windows)
        if request.output_tokens == 1:  # the token after the prompt comes before the first step
            logits = model.generation(prompts.shape[0], prompts.shape[1]).step(prompts)
            return Generated(logits[:, -1].argmax(-1)[:, None].tolist())
        return Generated(time_generation(model, prompts, request.output_tokens - 1).tokens)

    def memory(self, request: Memory, report: Report) -> PeakMemory:
        """Peak memory of the process, and what the GPU has less to give after the model was loaded and ran than before."""
        import torch

        free_before, _ = torch.cuda.mem_get_info()
        answer = super().memory(request, report)
        free_after, _ = torch.cuda.mem_get_info()
        return replace(answer, device_bytes=free_before - free_after)

    def bandwidth(self, request: Bandwidth, report: Report) -> ReadSpeed:
        """Best of several reads of an array much larger than the GPU's cache."""
        import torch

        values = torch.ones(_PROBE_BYTES // 4, dtype=torch.float32, device="cuda")
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        best = float("inf")
        for _ in range(6):
            begin.record()
            values.sum()
            end.record()
            torch.cuda.synchronize()
            best = min(best, begin.elapsed_time(end) / 1e3)
        return ReadSpeed(_PROBE_BYTES / best)


def _no_speed() -> RequestError:
    return RequestError(
        "the processor's speed says nothing of TensorRT's: this worker stands in for a GPU that is not here and measures none"
    )


def main(arguments: list[str]) -> int:
    """Serve as ``engine`` or ``reference``."""
    if arguments == ["reference"]:
        return serve(ReferenceWorker().handlers())
    if arguments[:1] == ["engine"] and set(arguments[1:]) <= {"--allow-foreign-engine"}:
        return serve(EngineWorker(allow_foreign=len(arguments) > 1).handlers())
    sys.stderr.write("usage: worker engine [--allow-foreign-engine] | worker reference\n")
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
