"""Build engines, or check that they can be built, in a process of its own.

TensorRT builds on the target's GPU and chooses kernels by timing them. TensorRT-RTX builds without a GPU for a compute capability
that it is told, in the same API: with it the graph, its types and its shapes are checked anywhere, and its engines are final only
on the GPU that compiles them when they are loaded.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from compile_sparse.backends.tensorrt.engine.build_errors import before_parsing, explain
from compile_sparse.backends.tensorrt.engine.build_messages import Build, ShapeProfile
from compile_sparse.backends.tensorrt.engine.build_progress import TOTAL
from compile_sparse.backends.tensorrt.engine.capabilities import BuiltFor, built_for
from compile_sparse.backends.tensorrt.engine.gpu import find_gpu
from compile_sparse.compiler.errors import EnvironmentFailure
from compile_sparse.compiler.files.durable import disk_errors, sync_folder
from compile_sparse.compiler.progress import Progress
from compile_sparse.compiler.runtimes.client import Worker
from compile_sparse.compiler.runtimes.wire import read

__all__ = ["EXTRAS", "BuildRequest", "Built", "build"]

BuilderName = Literal["tensorrt", "tensorrt_rtx"]
EXTRAS: Mapping[str, str] = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt-rtx"}
"""Builder -> the extra of this package that installs it."""
_SILENT_SECONDS = 3600
"""Longest time without a step of the builder: one step may time every kernel of a layer."""


@dataclass(frozen=True)
class BuildRequest:
    """What to build.

    Attributes:
        onnx: the model's file; external weights lie beside it.
        engine: where the engine goes, or None to check and discard it.
        builder: which builder, by the name of its Python module.
        compute_capability: of the target's GPU, such as '8.0'.
        profiles: ``{"name": ..., "shapes": {input: [least, optimal, largest]}}``, in the engine's order; none for a graph
            whose shapes are all fixed.
        sparse: let it choose sparse kernels where weights have the zeros.
        timing_cache: file of kernel timings to use and to update, or None. TensorRT only: the other one times nothing.
        parse_only: stop after the parser has accepted the graph.
    """

    onnx: Path
    engine: Path | None
    builder: BuilderName
    compute_capability: str
    profiles: Sequence[Mapping[str, Any]] = ()
    sparse: bool = False
    timing_cache: Path | None = None
    parse_only: bool = False


@dataclass(frozen=True)
class Built:
    """What was built.

    Attributes:
        sha256, bytes: of the engine; empty and 0 when only parsed.
        builder, version: what built it.
        compute_capability: that it was built for; not the requested one when ``substitute`` says so.
        gpu: name of the GPU that TensorRT chose kernels on; empty for TensorRT-RTX, which needs none.
        substitute: a sentence when another compute capability stood in for the requested one, else empty.
        flags: builder flags by name.
        seconds: parsing and building.
        peak_rss_bytes: of the building process.
        messages: the builder's warnings and errors and what it says of sparsity, each after '[W] ' or the like.
        inspector: JSON of the engine's layers, empty without a GPU.
        layers: of the network as parsed, before any fusion.
    """

    sha256: str
    bytes: int
    builder: BuilderName
    version: str
    compute_capability: str
    gpu: str
    substitute: str
    flags: tuple[str, ...]
    seconds: float
    peak_rss_bytes: int
    messages: tuple[str, ...]
    inspector: str
    layers: int


def build(request: BuildRequest, progress: Progress) -> Built:
    """Build as asked.

    Interrupting the call ends the building process; no half-written engine is left under its name.

    Raises:
        EnvironmentFailure: CS5210 the builder is not installed, CS5211 it does not load, CS5213 TensorRT's GPU is not here;
            CS5003 the disk; CS52xx what a process may do.
        Refusal: CS44xx, see ``build_errors``.
    """
    if find_spec(request.builder) is None:
        raise EnvironmentFailure(
            "CS5210",
            f"The builder {request.builder} is not installed.",
            where=sys.executable,
            why=f"There is no Python module {request.builder}.",
            hint=f"pip install 'compile-sparse[{EXTRAS[request.builder]}]'",
        )
    target, gpu = BuiltFor(request.compute_capability, ""), ""
    if request.builder == "tensorrt":
        gpu = "" if request.parse_only else _gpu_for(request.compute_capability)
    else:
        target = built_for(request.compute_capability)
        request = replace(request, timing_cache=None)
    before_parsing(request.onnx)
    command = [sys.executable, "-P", "-m", "compile_sparse.backends.tensorrt.engine.builder_worker", request.builder]
    asked = Build(
        onnx=str(request.onnx),
        engine=None if request.engine is None else str(request.engine),
        capability_name=target.name,
        profiles=[read(ShapeProfile, profile) for profile in request.profiles],
        sparse=request.sparse,
        timing_cache=None if request.timing_cache is None else str(request.timing_cache),
        parse_only=request.parse_only,
    )
    with progress.task("build", total=TOTAL) as task, Worker(command) as worker:
        reached = 0

        def advance(done: int, total: int) -> None:
            nonlocal reached
            task.advance(done - reached)
            reached = done

        reply = worker.call(asked, timeout=_SILENT_SECONDS, on_progress=advance)
        task.advance(TOTAL - reached)
    if reply.failure:
        raise explain(reply, request)
    if request.engine is not None and not request.parse_only:
        with disk_errors(request.engine.parent):
            sync_folder(request.engine.parent)
    return Built(
        sha256=reply.sha256,
        bytes=reply.bytes,
        builder=request.builder,
        version=reply.version,
        compute_capability=target.compute_capability,
        gpu=gpu,
        substitute=target.substitute,
        flags=("SPARSE_WEIGHTS",) if request.sparse else (),
        seconds=reply.seconds,
        peak_rss_bytes=reply.peak_rss_bytes,
        messages=tuple(reply.log),
        inspector=reply.inspector,
        layers=reply.layers,
    )


def _gpu_for(compute_capability: str) -> str:
    """Name of the GPU here, which TensorRT builds for whatever it is asked."""
    gpu = find_gpu()
    if gpu is not None and gpu.compute_capability == compute_capability:
        return gpu.name
    found = "There is none here" if gpu is None else f"The one here, {gpu.name}, has {gpu.compute_capability}"
    raise EnvironmentFailure(
        "CS5213",
        f"TensorRT builds on the GPU that it builds for, one of compute capability {compute_capability}.",
        where="tensorrt",
        why=f"{found}.",
        hint="Build on the target's GPU; TensorRT-RTX checks the graph anywhere.",
    )
