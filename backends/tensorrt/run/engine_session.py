"""An engine in TensorRT or TensorRT-RTX, with torch's CUDA tensors as its buffers.

Unverified: written against the bindings' types, and tested with a double of the engine on a processor; never run on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from compile_sparse.backends.tensorrt.description import Description
from compile_sparse.backends.tensorrt.run.io_binding import bind, fitting_profile, largest_call, torch_type
from compile_sparse.backends.tensorrt.run.reference_session import cache_shape, require_decoder
from compile_sparse.backends.worker.errors import RequestError
from compile_sparse.backends.worker.model import Array, Tokens, taken

if TYPE_CHECKING:
    import tensorrt_rtx as trt
    import torch

__all__ = ["CacheOnDevice", "EngineSession", "load_engine"]


def load_engine(plan: bytes, log: Any) -> trt.ICudaEngine:
    """Deserialize ``plan``, whose digest was checked. Call after ``bindings.choose``.

    Args:
        plan: the engine's bytes.
        log: an ``observers.Log``; the reasons of a failure are in it.

    Raises:
        RequestError: the runtime does not take it.
    """
    from compile_sparse.backends.tensorrt.engine.bindings import trt

    runtime = trt.Runtime(log)
    # TensorRT-RTX alone can say beforehand; without a GPU it calls every engine invalid and gives no reason.
    if hasattr(runtime, "get_engine_validity"):
        validity, reasons = runtime.get_engine_validity(plan)
        if validity == trt.EngineValidity.INVALID and int(reasons):
            names = [
                flag.name for flag in trt.EngineInvalidityDiagnostics.__members__.values() if int(reasons) & int(flag)
            ]
            raise RequestError(f"the engine cannot run here: {', '.join(names) or reasons}")
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise RequestError(f"the engine does not load: {' '.join(log.lines[-3:]) or 'no reason is given'}")
    return engine


class EngineSession:
    """One loaded engine, a ``worker.model.Model``.

    Args:
        engine: deserialized.
        description: of its folder.
        profiles: names of its profiles in its own order.
        device: where its buffers are.
        stream: the CUDA stream's handle that calls go to; torch's current one.
    """

    share_buffer = True

    def __init__(
        self,
        engine: trt.ICudaEngine,
        description: Description,
        profiles: Sequence[str],
        *,
        device: str = "cuda",
        stream: Callable[[], int] | None = None,
    ) -> None:
        self.description, self.device = description, device
        self.inputs = {value.name: value for value in description.inputs}
        self.outputs = [value.name for value in description.outputs]
        self.stream = stream or _current_stream
        by_name = {profile.name: profile for profile in description.profiles}
        if missing := [name for name in profiles if name not in by_name]:
            raise RequestError(f"the description lacks the engine's profile {missing[0]!r}")
        self._order = list(profiles)
        self.profiles = [by_name[name] for name in profiles]
        self._engine = engine
        self._contexts: dict[str, trt.IExecutionContext] = {}

    def require_decoder(self) -> None:
        """Raise unless the graph has a key-value cache and logits."""
        require_decoder(self.description)

    def context(self, feeds: Mapping[str, torch.Tensor]) -> trt.IExecutionContext:
        """The execution context for inputs of these shapes; one per profile is made and kept."""
        if not self.profiles:
            return self._context("", 0)
        profile = fitting_profile(self.profiles, {name: tuple(value.shape) for name, value in feeds.items()})
        return self._context(profile.name, self._order.index(profile.name))

    def _context(self, name: str, index: int) -> trt.IExecutionContext:
        if name not in self._contexts:
            made = self._engine.create_execution_context()
            if made is None:
                raise RequestError("TensorRT cannot make an execution context; is there enough memory on the GPU?")
            # Only the first context of an engine has a profile without being told.
            if not made.set_optimization_profile_async(index, self.stream()):
                raise RequestError(f"TensorRT does not switch to profile {name!r}")
            self._contexts[name] = made
        return self._contexts[name]

    def enqueue(self, context: trt.IExecutionContext) -> None:
        """Start a call whose addresses are bound; it ends when the stream reaches its end."""
        if not context.execute_async_v3(self.stream()):
            raise RequestError("TensorRT does not run the engine")

    def on_device(self, name: str, value: Array) -> torch.Tensor:
        """An input's value in the engine's type and memory."""
        import torch

        return torch.from_numpy(np.ascontiguousarray(value)).to(self.device, torch_type(self.inputs[name].dtype))

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name; more samples than a profile holds are run one part after another."""
        feeds = taken(self.inputs, feeds)
        first = next(iter(feeds))
        most = largest_call(self.profiles, first, 0) or len(feeds[first])
        parts = []
        for start in range(0, len(feeds[first]), most):
            given = {name: self.on_device(name, value[start : start + most]) for name, value in feeds.items()}
            context = self.context(given)
            results = bind(context, self.description, given)
            self.enqueue(context)
            parts.append({name: _to_host(results[name]) for name in self.outputs})
        return {name: np.concatenate([part[name] for part in parts]) for name in self.outputs}

    def generation(self, batch: int, capacity: int) -> Sequences:
        """``batch`` empty sequences that will not grow beyond ``capacity`` tokens."""
        self.require_decoder()
        return Sequences(self, batch, capacity)


class CacheOnDevice:
    """Buffers of one batch, at most as large as a profile holds: they are written in place and never move."""

    def __init__(self, session: EngineSession, batch: int, capacity: int) -> None:
        import torch

        longest = session.description.max_length
        if longest is not None and capacity > longest:
            raise RequestError(f"{capacity} tokens do not fit the cache, which holds {longest}")
        self.session, self.batch, self.length, self.capacity = session, batch, 0, capacity
        self.past = {}
        for name in session.description.aliases.values():
            value = session.inputs[name]
            kind = torch_type(value.dtype)
            self.past[name] = torch.zeros(cache_shape(value, batch), dtype=kind, device=session.device)

    def feed(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits ``[B, S, V]`` on the device of new tokens ``ids [B, S]``, which fit one call."""
        import torch

        if self.length + ids.shape[1] > self.capacity:
            raise RequestError(f"the sequences grow beyond the {self.capacity} tokens that were announced")
        indices = self.session.inputs["write_indices"]
        written = torch.full((self.batch,), self.length, dtype=torch_type(indices.dtype), device=self.session.device)
        feeds = {"input_ids": ids.contiguous(), "write_indices": written, **self.past}
        context = self.session.context(feeds)
        results = bind(context, self.session.description, feeds)
        self.session.enqueue(context)
        self.length += ids.shape[1]
        return results["logits"]


class Sequences:
    """A batch of any size and steps of any length, cut into calls that the engine's profiles hold."""

    def __init__(self, session: EngineSession, batch: int, capacity: int) -> None:
        self._session = session
        rows = largest_call(session.profiles, "input_ids", 0) or batch
        self._parts = [CacheOnDevice(session, min(rows, batch - start), capacity) for start in range(0, batch, rows)]

    def step(self, ids: Tokens) -> Array:
        """Logits ``[B, S, V]`` in float32 of new tokens ``ids [B, S]``."""
        most, results, start = largest_call(self._session.profiles, "input_ids", 1) or ids.shape[1], [], 0
        for part in self._parts:
            rows = ids[start : start + part.batch]
            pieces = []
            for at in range(0, ids.shape[1], most):
                pieces.append(_to_host(part.feed(self._session.on_device("input_ids", rows[:, at : at + most]))))
            results.append(np.concatenate(pieces, axis=1))
            start += part.batch
        return np.concatenate(results)


def _to_host(value: torch.Tensor) -> Array:
    """Waits for the stream; floats of 16 bits become float32, which holds them exactly."""
    import torch

    if value.dtype in (torch.float16, torch.bfloat16):
        value = value.float()
    result: Array = value.cpu().numpy()
    return result


def _current_stream() -> int:
    import torch

    return int(torch.cuda.current_stream().cuda_stream)
