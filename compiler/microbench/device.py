"""The GPU that is measured: what it is, and how a GEMM is run and timed on it. All code that needs CUDA is here."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from compile_sparse.compiler.errors import EnvironmentFailure
from compile_sparse.compiler.microbench.timing import Runner
from compile_sparse.compiler.targets.target import Target

__all__ = ["CudaDevice", "Device", "mismatch", "open_cuda"]

Call = Callable[[], torch.Tensor]
CALLS_PER_RUN = 20
MOST_COPIES = 64


class Device(Protocol):
    """Where GEMMs run.

    Attributes:
        where: torch's name of it.
        name: as the driver says it.
        capability: compute capability.
    """

    @property
    def where(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def capability(self) -> tuple[int, int]: ...

    def facts(self) -> dict[str, Any]:
        """What a table must say of where it was measured, as plain data."""
        ...

    def copies(self, weight_bytes: int) -> int:
        """How many weights of this size to take in turn, so that none is still in a cache when its turn comes."""
        ...

    def runner(self, calls: Sequence[Call], *, graph: bool) -> Runner:
        """The calls, one after the other, ready to be timed; ``graph``: recorded once and replayed, where that works."""
        ...

    def release(self) -> None:
        """Give back memory that nothing holds any more."""
        ...


@dataclass(frozen=True)
class CudaDevice:
    """The first CUDA device that torch sees. See ``Device``."""

    name: str
    capability: tuple[int, int]
    cache_bytes: int
    memory_bytes: int
    where: str = "cuda"

    def facts(self) -> dict[str, Any]:
        """Name, compute capability, sizes, and versions of torch, CUDA, cuSPARSELt and the driver."""
        sparse = torch.backends.cusparselt.version() if torch.backends.cusparselt.is_available() else None
        return {
            "name": self.name,
            "compute_capability": ".".join(map(str, self.capability)),
            "memory_bytes": self.memory_bytes,
            "l2_cache_bytes": self.cache_bytes,
            "torch": str(torch.__version__),
            "cuda": str(torch.version.cuda),
            "cusparselt": sparse,
            "driver": _driver(),
        }

    def copies(self, weight_bytes: int) -> int:
        """Twice the second-level cache in weights, and at least one."""
        return max(1, min(MOST_COPIES, -(-2 * self.cache_bytes // max(1, weight_bytes))))

    def runner(self, calls: Sequence[Call], *, graph: bool) -> Runner:
        """A CUDA graph, which leaves out what Python and launches take; where recording fails, plain launches."""
        cycles = -(-CALLS_PER_RUN // len(calls))
        for call in calls:
            call()
        torch.cuda.synchronize()
        if graph:
            try:
                return _Replayed(_record(calls, cycles), cycles * len(calls))
            except RuntimeError:
                torch.cuda.synchronize()
        return _Launched(tuple(calls) * cycles)

    def release(self) -> None:
        """Empty torch's cache."""
        torch.cuda.empty_cache()


@dataclass(frozen=True)
class _Replayed:
    graph: torch.cuda.CUDAGraph
    calls: int
    mode: str = "graph"

    def seconds(self, runs: int) -> float:
        return _timed(self.graph.replay, runs) / self.calls


@dataclass(frozen=True)
class _Launched:
    calls: tuple[Call, ...]
    mode: str = "launches"

    def seconds(self, runs: int) -> float:
        return _timed(self._once, runs) / len(self.calls)

    def _once(self) -> None:
        for call in self.calls:
            call()


def _timed(run: Callable[[], Any], runs: int) -> float:
    """Seconds per run on the GPU's own clock."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(runs):
        run()
    end.record()
    end.synchronize()
    return max(float(start.elapsed_time(end)) * 1e-3, 1e-9) / runs


def _record(calls: Sequence[Call], cycles: int) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what libraries set up at their first call must not be recorded
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(cycles):
            for call in calls:
                call()
    return graph


def open_cuda() -> CudaDevice:
    """The GPU that torch sees.

    Raises:
        EnvironmentFailure: CS5401 without one.
    """
    if not torch.cuda.is_available():
        built = torch.version.cuda
        why = f"torch {torch.__version__} " + (
            f"is built for CUDA {built} and finds no device." if built else "is built without CUDA."
        )
        raise EnvironmentFailure(
            "CS5401",
            "There is no GPU to probe.",
            where="torch.cuda",
            why=why,
            hint="Run it on the target's machine, with NVIDIA's driver and a torch built for CUDA; no other runtime is needed.",
        )
    properties = torch.cuda.get_device_properties(0)
    return CudaDevice(
        name=str(properties.name),
        capability=(int(properties.major), int(properties.minor)),
        cache_bytes=int(getattr(properties, "L2_cache_size", 0)),
        memory_bytes=int(properties.total_memory),
    )


def mismatch(target: Target, device: Device) -> str:
    """Why ``device`` is not the target's GPU, or an empty string."""
    found = ".".join(map(str, device.capability))
    if found != target.compute_capability:
        return f"{device.name} has compute capability {found}, {target.name} has {target.compute_capability}."
    if target.gpu and not re.search(rf"\b{re.escape(target.gpu)}\b", device.name):
        return f"The GPU here is called {device.name!r}, {target.name} is for the {target.gpu}."
    return ""


def _driver() -> str:
    """Version of the kernel module, where Linux tells it; empty elsewhere."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return ""
    found = re.search(r"\b(\d+\.\d+(?:\.\d+)?)\b", text)
    return found.group(1) if found else ""
