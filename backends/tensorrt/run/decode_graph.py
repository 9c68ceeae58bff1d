"""Speed of an engine: a prompt, then greedy steps that are one CUDA graph each, from token to token on the device.

Unverified: never run on a GPU.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from compile_sparse.backends.tensorrt.run.engine_session import CacheOnDevice, EngineSession
from compile_sparse.backends.tensorrt.run.io_binding import bind, largest_call
from compile_sparse.backends.worker.errors import RequestError
from compile_sparse.backends.worker.model import Array, Tokens, taken
from compile_sparse.compiler.runtimes.messages import Round

if TYPE_CHECKING:
    import torch

__all__ = ["GreedyStep", "TimedGeneration", "prefill", "time_call", "time_generation"]


@dataclass(frozen=True)
class TimedGeneration:
    """What one generation took and gave.

    Attributes:
        round: prefill is from ids on the host to the first token on the host, a step from one CUDA event to the next.
        tokens: per row, the first token and those of all steps.
        cuda_graph: whether steps were replayed; where they cannot be recorded they are enqueued one by one, which is slower.
    """

    round: Round
    tokens: list[list[int]]
    cuda_graph: bool


class GreedyStep:
    """One decode step with fixed buffers: runs the engine, takes the likeliest token, and moves on by one position.

    Every address stays the same from step to step, so that a recorded step can be replayed.

    Attributes:
        ids: ``[B, 1]`` the token that the next step reads.
        written: ``[B]`` tokens in the cache.
        chosen: ``[B, steps]`` tokens chosen so far.
    """

    def __init__(self, cache: CacheOnDevice, first: torch.Tensor, steps: int) -> None:
        import torch

        session = cache.session
        self._session, self._start, self._first = session, cache.length, first
        self.ids = first.clone()
        self.written = session.on_device("write_indices", np.full(cache.batch, cache.length, np.int64))
        self.chosen = torch.zeros(cache.batch, steps, dtype=self.ids.dtype, device=self.ids.device)
        self._column = torch.zeros(cache.batch, 1, dtype=torch.int64, device=self.ids.device)
        feeds = {"input_ids": self.ids, "write_indices": self.written, **cache.past}
        self._context = session.context(feeds)
        self._logits = bind(self._context, session.description, feeds)["logits"]

    def run(self) -> None:
        """Enqueue the step."""
        self._session.enqueue(self._context)
        self.ids.copy_(self._logits[:, -1].argmax(-1, keepdim=True))
        self.chosen.scatter_(1, self._column, self.ids)
        self._column.add_(1)
        self.written.add_(1)

    def rewind(self) -> None:
        """Go back to where it began; the positions written since are written again."""
        self.ids.copy_(self._first)
        self.written.fill_(self._start)
        self._column.zero_()


def prefill(cache: CacheOnDevice, ids: torch.Tensor) -> torch.Tensor:
    """Feed a prompt ``[B, P]`` in as few calls as the profiles allow; the likeliest next token, ``[B, 1]``."""
    most = largest_call(cache.session.profiles, "input_ids", 1) or ids.shape[1]
    for at in range(0, ids.shape[1], most):
        logits = cache.feed(ids[:, at : at + most])
    return logits[:, -1].argmax(-1, keepdim=True)


def time_generation(session: EngineSession, prompt: Tokens, steps: int) -> TimedGeneration:
    """Run one generation and time it.

    Args:
        session: of a decoder, on a GPU.
        prompt: ids ``[B, P]``.
        steps: greedy steps after the prompt.
    """
    import torch

    session.require_decoder()
    cache = CacheOnDevice(session, prompt.shape[0], prompt.shape[1] + steps)
    torch.cuda.synchronize()
    began = time.perf_counter()
    first = prefill(cache, session.on_device("input_ids", prompt))
    first_host = first.cpu()
    prefill_s = time.perf_counter() - began
    step = GreedyStep(cache, first, steps)
    step.run()  # TensorRT wants a call in these shapes before it can be recorded
    step.rewind()
    torch.cuda.synchronize()
    graph = _recorded(step)
    step.rewind()
    advance = step.run if graph is None else graph.replay
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    events[0].record()
    for event in events[1:]:
        advance()
        event.record()
    torch.cuda.synchronize()
    seconds = [early.elapsed_time(late) / 1e3 for early, late in pairwise(events)]
    tokens = torch.cat([first_host, step.chosen.cpu()], dim=1).tolist()
    return TimedGeneration(Round(prefill_s, sum(seconds), seconds), tokens, cuda_graph=graph is not None)


def _recorded(step: GreedyStep) -> torch.cuda.CUDAGraph | None:
    """The step as a CUDA graph; None where it cannot be recorded."""
    import torch

    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            step.run()
    except (RuntimeError, RequestError):
        return None
    return graph


def time_call(session: EngineSession, feeds: Mapping[str, Array]) -> float:
    """Seconds of one call of a model without a cache, its inputs on the device; outputs stay there."""
    import torch

    given = {name: session.on_device(name, value) for name, value in taken(session.inputs, feeds).items()}
    context = session.context(given)
    bind(context, session.description, given)
    torch.cuda.synchronize()
    began = time.perf_counter()
    session.enqueue(context)
    torch.cuda.synchronize()
    return time.perf_counter() - began
