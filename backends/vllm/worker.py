"""The measuring process of vLLM: whole engines answer, so the operations are its own; the rest is that of ``backends.worker``.

It runs under vLLM's own interpreter, where compile-sparse need not be installed (``backends.worker.start``). A model that was
loaded stays until the process ends: taking one engine down would take the process groups of the others with it. Times are on the
engine's own clock.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from compile_sparse.backends.vllm.engine import WINDOWS_AT_ONCE, Engine
from compile_sparse.backends.vllm.layer_hooks import LayerHooks
from compile_sparse.backends.vllm.machine import cpu_dtype, gpu_name, instruction_set, version
from compile_sparse.backends.worker.base import Worker, time_rounds
from compile_sparse.backends.worker.errors import RequestError
from compile_sparse.backends.worker.machine import resident_bytes
from compile_sparse.backends.worker.serve import serve
from compile_sparse.compiler.runtimes.messages import (
    Benchmark,
    Load,
    Loaded,
    Memory,
    Observe,
    PeakMemory,
    Ran,
    Round,
    Rounds,
    Runtime,
    Score,
    Scores,
    TokenTrace,
    Trace,
    Traces,
    WindowScore,
)
from compile_sparse.compiler.runtimes.wire import Handler, Report

__all__ = ["VllmWorker", "main"]

_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",  # a window as long as the model's context needs room for one more token
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


class VllmWorker(Worker[Engine]):
    """Answers for checkpoint folders."""

    def __init__(self) -> None:
        super().__init__()
        self._retired: list[Engine] = []

    def runtime(self) -> Runtime:
        gpu = gpu_name()
        return Runtime(
            "vllm", version(), f"cuda ({gpu}, bfloat16)" if gpu else f"cpu ({instruction_set()}, {cpu_dtype()})"
        )

    def handlers(self) -> list[Handler]:
        return [
            *super().handlers(),
            Load.handled_by(self.load),
            Trace.handled_by(self.trace),
            Observe.handled_by(self.observe),
            Score.handled_by(self.score),
            Benchmark.handled_by(self.benchmark),
            Memory.handled_by(self.memory),
        ]

    def load(self, request: Load, report: Report) -> Loaded:
        began = time.perf_counter()
        if request.name in self._models:
            self._retired.append(self._models.pop(request.name))
        self._models[request.name] = _loaded(request)
        return Loaded(time.perf_counter() - began, resident_bytes("VmRSS"))

    def trace(self, request: Trace, report: Report) -> Traces:
        from vllm import SamplingParams

        engine = self.model(request.name)
        traces: list[TokenTrace] = []
        for windows in _chunks(request.windows):
            begins = [min(request.prefill, len(ids) - 1) for ids in windows]
            parameters = [
                SamplingParams(
                    temperature=0.0,
                    max_tokens=len(ids) - begin,
                    min_tokens=len(ids) - begin,
                    ignore_eos=True,
                    logprobs=1,
                    prompt_logprobs=1,
                    detokenize=False,
                    extra_args={"forced_tokens": ids[begin:]},
                )
                for ids, begin in zip(windows, begins, strict=True)
            ]
            prompts = [ids[:begin] for ids, begin in zip(windows, begins, strict=True)]
            for ids, begin, output in zip(windows, begins, engine.generate(prompts, parameters), strict=True):
                generated = output.outputs[0]
                if list(generated.token_ids) != ids[begin:]:
                    raise RequestError("vLLM did not generate the tokens it was made to")
                traces.append(_token_trace([*output.prompt_logprobs[1:], *generated.logprobs], ids[1:]))
            report(len(traces), len(request.windows))
        return Traces(traces)

    def observe(self, request: Observe, report: Report) -> Ran:
        """Windows one after another: a step of the engine is then a step of one sequence."""
        engine = self.model(request.name)
        with LayerHooks(engine.engine, request.values) as hooks:
            found = []
            for done, ids in enumerate(request.windows, 1):
                hooks.calls.clear()
                self.trace(Trace(request.name, [ids], request.prefill), lambda *_: None)
                begin = min(request.prefill, len(ids) - 1)
                found.append([hooks.rows(0, begin), *(hooks.rows(step, 1) for step in range(1, len(ids) - begin))])
                report(done, len(request.windows))
        stacked = {
            f"{number}.{name}": np.stack([window[number][name] for window in found])
            for number in range(len(found[0]))
            for name in found[0][number]
        }
        np.savez(request.outputs, **stacked)  # type: ignore[arg-type]  # numpy's types take them for its options
        return Ran(list(stacked))

    def score(self, request: Score, report: Report) -> Scores:
        """No divergences: they would need whole distributions."""
        model, against = self.model(request.name), self.model(request.against)
        scores: list[WindowScore] = []
        for windows in _chunks(request.windows):
            for own, other in zip(_traced(model, windows), _traced(against, windows), strict=True):
                equal = sum(a == b for a, b in zip(own.top1, other.top1, strict=True))
                scores.append(WindowScore(len(own.top1), -sum(own.logprob), -sum(other.logprob), equal))
                report(len(scores), len(request.windows))
        return Scores(scores)

    def benchmark(self, request: Benchmark, report: Report) -> Rounds:
        """Prompts are new every round."""
        engines = {name: self.model(name) for name in request.names}
        draws = np.random.default_rng(request.seed)

        def tokens() -> list[list[int]]:
            drawn: list[list[int]] = draws.integers(0, request.vocab, (request.batch, request.prompt_tokens)).tolist()
            return drawn

        def generate(name: str, prompts: list[list[int]]) -> Round:
            return _generate(engines[name], prompts, request.output_tokens)

        return time_rounds(request, tokens, generate, report)

    def memory(self, request: Memory, report: Report) -> PeakMemory:
        engine = _loaded(
            Load(
                name="",
                folder=request.folder,
                threads=request.threads,
                device=request.device,
                sequence=request.prompt_tokens + request.output_tokens,
                sequences=request.batch,
            )
        )
        tokens = np.random.default_rng(0).integers(0, request.vocab, (request.batch, request.prompt_tokens))
        _generate(engine, tokens.tolist(), request.output_tokens)
        return PeakMemory(resident_bytes("VmHWM"))


def _loaded(request: Load) -> Engine:
    if request.sequence is None:
        raise RequestError("field 'sequence' must be given: vLLM reserves memory for the longest one when it loads")
    # OpenMP reads this once, when vLLM's libraries are loaded with the first model.
    os.environ["OMP_NUM_THREADS"] = str(request.threads)
    return Engine(request.folder, request.device, request.sequence, request.sequences)


def _traced(engine: Engine, windows: Sequence[Sequence[int]]) -> list[TokenTrace]:
    """Every window as one prompt."""
    from vllm import SamplingParams

    parameters = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1, detokenize=False)
    outputs = engine.generate(windows, parameters)
    return [_token_trace(output.prompt_logprobs[1:], ids[1:]) for output, ids in zip(outputs, windows, strict=True)]


def _generate(engine: Engine, tokens: Sequence[Sequence[int]], output: int) -> Round:
    """One batch of prompts and ``output`` further tokens each, timed by the engine."""
    from vllm import SamplingParams

    # The prompt's own pass makes the first token, so one more is asked for: ``output`` are decoded.
    wanted = output + 1
    parameters = SamplingParams(
        temperature=0.0, max_tokens=wanted, min_tokens=wanted, ignore_eos=True, detokenize=False
    )
    found = engine.generate(tokens, parameters)
    if any(len(request.outputs[0].token_ids) != wanted for request in found):
        raise RequestError("vLLM stopped before the length it was asked for")
    stats = [request.metrics for request in found]
    first = max(s.first_token_ts for s in stats)
    return Round(
        prefill_s=first - min(s.scheduled_ts for s in stats),
        # Of the slowest request from its own first token on: prompts that take several steps let others decode meanwhile.
        decode_s=max(s.last_token_ts - s.first_token_ts for s in stats),
        token_s=[(s.last_token_ts - s.first_token_ts) / output for s in stats],
        ttft_s=[s.first_token_latency for s in stats],
    )


def _token_trace(found: Sequence[Mapping[int, Any]], targets: Sequence[int]) -> TokenTrace:
    """Best token and the given token's log-probability at each position."""
    trace = TokenTrace([], [])
    for entries, target in zip(found, targets, strict=True):
        trace.top1.append(max(entries, key=lambda token: entries[token].logprob))
        trace.logprob.append(float(entries[target].logprob))
    return trace


def _chunks(windows: list[list[int]]) -> Iterator[list[list[int]]]:
    for start in range(0, len(windows), WINDOWS_AT_ONCE):
        yield windows[start : start + WINDOWS_AT_ONCE]


def main(arguments: Sequence[str] = ()) -> int:
    """Serve until shutdown or end of input. Arguments: folders with vLLM plugins, found by this process and its children."""
    os.environ.update(_ENVIRONMENT)
    sys.path[:0] = arguments
    os.environ["PYTHONPATH"] = os.pathsep.join(arguments)
    serve(VllmWorker().handlers())
    os._exit(0)  # an orderly end of the engines takes up to half a minute and gains nothing
