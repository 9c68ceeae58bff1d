"""Parse an ONNX file and build it, in this process. Import after ``bindings.choose``.

Uses names that TensorRT and TensorRT-RTX share. What goes wrong is returned, not raised: it is data for the compiler's process.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

from compile_sparse.backends.tensorrt.engine.bindings import trt
from compile_sparse.backends.tensorrt.engine.build_messages import (
    Build,
    BuildReply,
    ParserError,
    ProfileProblem,
    ShapeProfile,
)
from compile_sparse.backends.tensorrt.engine.build_progress import BuildProgress
from compile_sparse.backends.tensorrt.engine.observers import Log, Monitor

__all__ = ["run_build"]

_MOST_ERRORS = 20


def run_build(request: Build, report: Callable[[int], None]) -> BuildReply:
    """Serve one build; ``report`` is called with progress out of ``build_progress.TOTAL``.

    Raises:
        OSError: a file cannot be written.
    """
    began = time.monotonic()
    log = Log(driverless=bool(request.capability_name))
    builder = trt.Builder(log)
    network = builder.create_network(_network_flags())
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(request.onnx):
        return BuildReply(log.lines, "parse", errors=_parser_errors(parser))
    version, layers = trt.__version__, network.num_layers
    if request.parse_only:
        return BuildReply(log.lines, version=version, layers=layers, seconds=time.monotonic() - began)
    expected: Sequence[ShapeProfile | None] = request.profiles or [None]
    for profile in expected:
        if problem := _profile_problem(network, profile):
            return BuildReply(log.lines, "profile", problem=problem)
    config, monitor = _configure(builder, request), Monitor(BuildProgress(report))
    config.progress_monitor = monitor
    cache = _load_timing_cache(config, request.timing_cache, log)
    for profile in request.profiles:
        if config.add_optimization_profile(_shapes(builder, profile)) < 0:
            return BuildReply(log.lines, "build")
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        return BuildReply(log.lines, "build")
    if cache is not None and request.timing_cache:
        _replace(Path(request.timing_cache), _content(cache.serialize()))
    seconds, lines = time.monotonic() - began, list(log.lines)
    content = _content(plan)
    inspector = _inspect(content, log)
    if request.engine:
        _replace(Path(request.engine), content)
    return BuildReply(
        lines,
        version=version,
        layers=layers,
        seconds=seconds,
        sha256=hashlib.sha256(content).hexdigest(),
        bytes=content.nbytes,
        inspector=inspector,
    )


def _content(memory: trt.IHostMemory) -> memoryview:
    return memoryview(cast(bytes, memory))  # it has the buffer protocol, which no type says


def _network_flags() -> int:
    """Strong typing, where it is still a choice."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _parser_errors(parser: trt.OnnxParser) -> list[ParserError]:
    errors = []
    for index in range(min(parser.num_errors, _MOST_ERRORS)):
        error: trt.ParserError = parser.get_error(index)
        code = error.code().name
        errors.append(ParserError(code, error.node_name(), error.node_operator(), error.desc()))
    return errors


def _profile_problem(network: trt.INetworkDefinition, profile: ShapeProfile | None) -> ProfileProblem | None:
    """What a profile (None: there is none) does not say or says wrongly of an input; None when all is well."""
    given = profile.shapes if profile else {}
    for index in range(network.num_inputs):
        value = network.get_input(index)
        shape = [int(value.shape[axis]) for axis in range(len(value.shape))]
        problem = ""
        if value.name not in given:
            if -1 in shape:
                problem = "it has no range for this input"
        else:
            ranges = [tuple(bound) for bound in given[value.name]]
            if len(ranges) != 3 or any(len(bound) != len(shape) for bound in ranges):
                problem = f"its range {ranges} does not have the input's dimensions"
            elif any(not 0 <= low <= best <= high for low, best, high in zip(*ranges, strict=True)):
                problem = f"its range {ranges} is not least, optimal, largest"
            elif any(have not in (-1, size) for bound in ranges for have, size in zip(shape, bound, strict=True)):
                problem = f"its range {ranges} changes a dimension that is fixed"
        if problem:
            names = [value.get_dimension_name(axis) or str(size) for axis, size in enumerate(shape)]
            return ProfileProblem(value.name, f"[{', '.join(names)}]", profile.name if profile else "", problem)
    return None


def _configure(builder: trt.Builder, request: Build) -> trt.IBuilderConfig:
    config = builder.create_builder_config()
    if request.sparse:
        config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if request.capability_name:  # TensorRT-RTX; left out, it would take formats that the target's GPU lacks
        config.num_compute_capabilities = 1
        if not config.set_compute_capability(getattr(trt.ComputeCapability, request.capability_name), 0):
            raise RuntimeError(f"the builder does not take compute capability {request.capability_name}")
    return config


def _shapes(builder: trt.Builder, profile: ShapeProfile) -> trt.IOptimizationProfile:
    made = builder.create_optimization_profile()
    for name, ranges in profile.shapes.items():
        made.set_shape(name, *(trt.Dims(bound) for bound in ranges))
    return made


def _load_timing_cache(config: trt.IBuilderConfig, path: str | None, log: Log) -> trt.ITimingCache | None:
    """Kernel timings of earlier builds, so that the same kernels are chosen; None when no cache is wanted.

    One of another GPU, version or driver is not used and will be replaced.
    """
    if path is None:
        return None
    try:
        stored = Path(path).read_bytes()
    except FileNotFoundError:
        stored = b""
    cache = config.create_timing_cache(stored)
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        log.lines.append(f"[W] The timing cache {Path(path).name} is of another GPU or version; a new one was started.")
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, ignore_mismatch=False)
    return cache


def _inspect(plan: memoryview, log: Log) -> str:
    """What the engine's layers became, as JSON; empty without a GPU, which loading an engine takes."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return ""
    engine = trt.Runtime(log).deserialize_cuda_engine(plan)
    if engine is None:
        return ""
    return str(engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON))


def _replace(path: Path, content: memoryview) -> None:
    """Write ``path`` so that it is there whole or not at all."""
    temporary = path.with_name(f".{path.name}.new")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
