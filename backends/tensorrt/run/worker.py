"""The measuring process of the TensorRT target: ``python -m compile_sparse.backends.tensorrt.run.worker engine|stand-in``.

``engine`` runs the engines of a folder on the GPU here (unverified: never run). ``stand-in`` runs the folder's ONNX graph on the
processor with ONNX Runtime: what it computes is the graph's, how fast says nothing of the target, so that it measures no speed.

The protocol and most operations are those of ``backends/onnxruntime/worker.py``.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any

import numpy as np

from compile_sparse.backends.onnxruntime.worker import Report, RequestError, Worker, count, memory, serve, token_windows
from compile_sparse.backends.tensorrt.description import read_description
from compile_sparse.backends.tensorrt.engine.engines import check_engine, choose_engine
from compile_sparse.backends.tensorrt.processor import here, stand_in_available
from compile_sparse.backends.tensorrt.run.reference_session import ReferenceRuntime

__all__ = ["EngineWorker", "StandInWorker"]

_PROBE_BYTES = 1 << 30


class StandInWorker(Worker):
    """Answers for the graph; its speed is not the target's and is not told."""

    def runtime(self) -> dict[str, str]:
        """ONNX Runtime, in words that nobody takes for TensorRT."""
        return {"name": "onnxruntime, standing in for tensorrt", "version": stand_in_available(), "device": "cpu"}

    def open(self, folder: str, threads: int, device: str) -> ReferenceRuntime:
        """The graph in ``folder``."""
        return ReferenceRuntime(Path(folder), threads)

    def op_generate(self, request: dict[str, Any], report: Report) -> dict[str, Any]:
        """Greedy tokens after a batch of prompts of one length: ``output_tokens`` of each."""
        model, prompts = self._model(request.get("name")), _prompts(request)
        steps = count(request, "output_tokens", 1)
        generation = model.generation(prompts.shape[0], prompts.shape[1] + steps)
        tokens, ids = [], prompts
        for done in range(steps):
            ids = generation.step(ids)[:, -1].argmax(-1)[:, None]
            tokens.append(ids)
            report(done + 1, steps)
        return {"tokens": np.concatenate(tokens, axis=1).tolist()}

    def op_benchmark(self, request: dict[str, Any], report: Report) -> dict[str, Any]:
        raise _no_speed()

    def op_benchmark_samples(self, request: dict[str, Any], report: Report) -> dict[str, Any]:
        raise _no_speed()


class EngineWorker(Worker):
    """Runs engines of ours on the GPU here. Unverified: never run on one.

    Args:
        allow_foreign: load an engine that is not what was recorded.
    """

    def __init__(self, allow_foreign: bool = False) -> None:
        super().__init__()
        self._allow_foreign = allow_foreign
        self._log: Any = None

    def runtime(self) -> dict[str, str]:
        """The builder whose engines are preferred, and the GPU."""
        machine = here()
        name = next(iter(machine.versions), "tensorrt")
        return {"name": name, "version": machine.versions.get(name, ""), "device": machine.gpu or "cuda"}

    def open(self, folder: str, threads: int, device: str) -> Any:
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
        from compile_sparse.backends.tensorrt.run.engine_session import EngineSession, load_engine

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

    def generate(self, model: Any, tokens: np.ndarray[Any, Any], prompt: int) -> dict[str, Any]:
        """A prompt and greedy steps; as many as tokens are given after the prompt."""
        from compile_sparse.backends.tensorrt.run.decode_graph import time_generation

        return time_generation(model, tokens[:, :prompt], tokens.shape[1] - prompt)

    def call(self, model: Any, feeds: dict[str, np.ndarray[Any, Any]]) -> float:
        """Seconds of one call, from inputs on the device to outputs on the device."""
        from compile_sparse.backends.tensorrt.run.decode_graph import time_call

        return time_call(model, feeds)

    def op_generate(self, request: dict[str, Any], report: Report) -> dict[str, Any]:
        """Greedy tokens after a batch of prompts of one length: ``output_tokens`` of each."""
        model, prompts = self._model(request.get("name")), _prompts(request)
        steps = count(request, "output_tokens", 1)
        tokens = np.concatenate([prompts, np.zeros((len(prompts), steps), np.int64)], axis=1)
        # The token after the prompt comes before the first step.
        made = self.generate(model, tokens[:, :-1], prompts.shape[1]) if steps > 1 else None
        if made is None:
            logits = model.generation(prompts.shape[0], prompts.shape[1]).step(prompts)
            return {"tokens": logits[:, -1].argmax(-1)[:, None].tolist()}
        return {"tokens": made["tokens"]}

    def op_memory(self, request: dict[str, Any], report: Report) -> dict[str, Any]:
        """Peak memory of the process, and what the GPU has less to give after the model was loaded and ran than before."""
        import torch

        free_before, _ = torch.cuda.mem_get_info()
        answer = super().op_memory(request, report)
        free_after, _ = torch.cuda.mem_get_info()
        return {**answer, "peak_rss_bytes": memory("VmHWM"), "device_bytes": free_before - free_after}

    def op_bandwidth(self, request: dict[str, Any], report: Report) -> dict[str, Any]:
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
        return {"bytes_per_s": _PROBE_BYTES / best}


def _prompts(request: dict[str, Any]) -> np.ndarray[Any, Any]:
    windows = token_windows(request)
    if len({len(ids) for ids in windows}) != 1:
        raise RequestError("prompts must have equal lengths: they run as one batch")
    return np.stack(windows)


def _no_speed() -> RequestError:
    return RequestError(
        "the processor's speed says nothing of TensorRT's: this worker stands in for a GPU that is not here and measures none"
    )


def main(arguments: list[str]) -> int:
    """Serve as ``engine`` or ``stand-in``."""
    if arguments == ["stand-in"]:
        return serve(StandInWorker())
    if arguments[:1] == ["engine"] and set(arguments[1:]) <= {"--allow-foreign-engine"}:
        return serve(EngineWorker(allow_foreign=len(arguments) > 1))
    sys.stderr.write("usage: worker engine [--allow-foreign-engine] | worker stand-in\n")
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
