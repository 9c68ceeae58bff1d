"""From the graph to engines: which builder, what for, and what is only checked.

=========== ============================================ ====================================================================
--engine    on the target's GPU, with TensorRT           anywhere else
=========== ============================================ ====================================================================
auto        engine, kernels timed there                  TensorRT-RTX (where installed) parses and builds for the target's compute
                                                         capability; the engine is thrown away
rtx-aot     TensorRT-RTX engine, kept                    TensorRT-RTX engine, kept
none        the graph only                               the graph only
=========== ============================================ ====================================================================
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from compile_sparse.backends.tensorrt.description import EngineRecord, Profile
from compile_sparse.backends.tensorrt.engine.builder import EXTRAS, BuildRequest, Built, build
from compile_sparse.backends.tensorrt.engine.capabilities import built_for
from compile_sparse.backends.tensorrt.layout import AHEAD_OF_TIME, ENGINE, TWIN
from compile_sparse.backends.tensorrt.options import EngineSettings
from compile_sparse.backends.tensorrt.processor import installed_builders, probe_runtime
from compile_sparse.compiler.errors import EnvironmentFailure, Refusal
from compile_sparse.compiler.files.cache import Cache
from compile_sparse.compiler.files.durable import disk_errors
from compile_sparse.compiler.progress import Progress
from compile_sparse.compiler.targets.target import Target

__all__ = ["EngineBuild", "build_engines"]

_MEMORY_SHARE = 3
"""A build keeps the weights, their copies in the engine's layout and the engine in memory at once."""


@dataclass(frozen=True)
class EngineBuild:
    """What came of building.

    Attributes:
        records: engines that lie in the folder.
        built: what the builder said about the engine that kernels were chosen for on the target's GPU, or None.
        form: for the report.
        limits: sentences for people who use the folder.
        unverified: why no kernels were chosen on the target's GPU; empty when they were.
        twin: the engine built without sparse kernels, in the folder ``twin``; None when nothing is sparse or there is no GPU.
    """

    records: tuple[EngineRecord, ...] = ()
    built: Built | None = None
    form: str = ""
    limits: tuple[str, ...] = ()
    unverified: str = ""
    twin: EngineRecord | None = None


def build_engines(
    model: Path,
    target: Target,
    options: EngineSettings,
    profiles: Sequence[Profile],
    *,
    sparse: bool,
    progress: Progress,
) -> EngineBuild:
    """Build or check what ``options.engine`` asks for, from ``model`` (``model.onnx``); engines go beside it.

    Raises:
        Refusal: CS44xx, the graph does not build; CS4430, no ahead-of-time engine for the target's compute capability.
        EnvironmentFailure: CS5210, an ahead-of-time engine is asked for without TensorRT-RTX.
    """
    probe = probe_runtime(target)
    if options.engine == "none":
        return EngineBuild(form="none", unverified="No engine was built (--engine none).")
    if options.engine == "rtx-aot":
        return _ahead_of_time(model, target, profiles, sparse=sparse, progress=progress)
    if probe.available:
        request = _request(model, target, profiles, sparse=sparse, engine=model.with_name(ENGINE))
        built = build(request, progress)
        record = _record(ENGINE, built, profiles)
        form = f"TensorRT {built.version}"
        twin = None
        if sparse:
            # The same graph and the same timings of dense kernels: what differs in speed is what sparse ones bring.
            folder = model.with_name(TWIN)
            folder.mkdir()
            dense = build(replace(request, engine=folder / ENGINE, sparse=False), progress)
            twin = _record(ENGINE, dense, profiles)
        return EngineBuild((record,), built, form, twin=twin)
    why = f"{probe.why_not} Which kernels TensorRT would choose is not known."
    if "tensorrt_rtx" not in installed_builders():
        limit = (
            "The graph was not parsed by TensorRT: neither it nor TensorRT-RTX, which needs no GPU, is installed "
            f"(pip install 'compile-sparse[{EXTRAS['tensorrt_rtx']}]')."
        )
        return EngineBuild(form="graph only, not parsed", limits=(limit,), unverified=why)
    size = sum(path.stat().st_size for path in model.parent.glob("model.onnx*"))
    parse_only = _MEMORY_SHARE * size > psutil.virtual_memory().available
    request = _request(
        model, target, profiles, sparse=sparse, engine=None, builder="tensorrt_rtx", parse_only=parse_only
    )
    built = build(request, progress)
    did = "parsed" if parse_only else "parsed and built, not kept"
    limits = [built.substitute] if built.substitute else []
    if parse_only:
        limits.append("The graph was parsed but not built here: there is too little memory for its size.")
    form = f"{did} by TensorRT-RTX {built.version} for compute capability {built.compute_capability}"
    return EngineBuild(form=form, limits=tuple(limits), unverified=why)


def _ahead_of_time(
    model: Path, target: Target, profiles: Sequence[Profile], *, sparse: bool, progress: Progress
) -> EngineBuild:
    place = built_for(target.compute_capability)
    if place.substitute:
        raise Refusal(
            "CS4430",
            f"TensorRT-RTX builds no ahead-of-time engine for {target.name}.",
            where="--engine rtx-aot",
            why=place.substitute,
            hint="Leave --engine out: the graph is checked, and TensorRT builds the engine on the GPU.",
        )
    if "tensorrt_rtx" not in installed_builders():
        raise EnvironmentFailure(
            "CS5210",
            "The builder tensorrt_rtx is not installed.",
            where="--engine rtx-aot",
            why="It builds engines without a GPU; TensorRT does not.",
            hint=f"pip install 'compile-sparse[{EXTRAS['tensorrt_rtx']}]'",
        )
    request = _request(
        model, target, profiles, sparse=sparse, engine=model.with_name(AHEAD_OF_TIME), builder="tensorrt_rtx"
    )
    built = build(request, progress)
    return EngineBuild(
        (_record(AHEAD_OF_TIME, built, profiles),),
        form=f"TensorRT-RTX {built.version}, ahead of time for compute capability {built.compute_capability}",
        limits=(
            "The TensorRT-RTX engine is completed on the GPU when it is first loaded, by the same release of TensorRT-RTX; which "
            "kernels it uses is decided there.",
        ),
        unverified="TensorRT-RTX chooses kernels when the engine is loaded on a GPU, and does not say which.",
    )


def _request(
    model: Path,
    target: Target,
    profiles: Sequence[Profile],
    *,
    sparse: bool,
    engine: Path | None,
    builder: str = "tensorrt",
    parse_only: bool = False,
) -> BuildRequest:
    return BuildRequest(
        onnx=model,
        engine=engine,
        builder=builder,  # type: ignore[arg-type]
        compute_capability=target.compute_capability,
        profiles=[profile.model_dump(mode="json") for profile in profiles],
        sparse=sparse,
        timing_cache=_timing_cache(target) if builder == "tensorrt" else None,
        parse_only=parse_only,
    )


def _timing_cache(target: Target) -> Path:
    """Timings of kernels, kept between compilations: the same layers then get the same kernels, and sparse engine and dense twin
    differ in nothing but the sparse ones. TensorRT checks that they were taken on the same GPU.
    """
    folder = Cache().root / "tensorrt"
    with disk_errors(folder):
        folder.mkdir(exist_ok=True)
    version = installed_builders().get("tensorrt", "")
    return folder / f"timing-{target.name}-{version}.cache"


def _record(file: str, built: Built, profiles: Sequence[Profile]) -> EngineRecord:
    return EngineRecord(
        file=file,
        sha256=built.sha256,
        bytes=built.bytes,
        builder=built.builder,
        version=built.version,
        compute_capability=built.compute_capability,
        gpu=built.gpu,
        flags=built.flags,
        profiles=tuple(profile.name for profile in profiles),
    )
