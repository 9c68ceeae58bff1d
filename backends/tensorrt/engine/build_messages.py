"""What the building process is asked, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass, field

from compile_sparse.compiler.runtimes.wire import Request

__all__ = ["Build", "BuildReply", "ParserError", "ProfileProblem", "ShapeProfile"]


@dataclass(frozen=True)
class ParserError:
    """A node that the parser refuses."""

    code: str
    node: str
    operator: str
    text: str


@dataclass(frozen=True)
class ProfileProblem:
    """What ``profile`` (empty: there is none) does not say or says wrongly of an input."""

    input: str
    shape: str
    profile: str
    why: str


@dataclass(frozen=True)
class BuildReply:
    """What was built, or what failed.

    Attributes:
        log: the builder's lines, each after '[W] ' or the like.
        failure: ``import``, ``disk``, ``parse``, ``profile`` or ``build``; empty when all went well.
        why: of ``import`` and ``disk``; ``errno``, ``file``: of ``disk``; ``errors``: of ``parse``; ``problem``: of ``profile``.
        version: of the builder. layers: of the network as parsed. seconds: of parsing and building.
        sha256, bytes: of the engine; empty and 0 when only parsed.
        inspector: JSON of the engine's layers, empty without a GPU.
        peak_rss_bytes: of the process.
    """

    log: list[str]
    failure: str = ""
    why: str = ""
    errno: int | None = None
    file: str = ""
    errors: list[ParserError] = field(default_factory=list)
    problem: ProfileProblem | None = None
    version: str = ""
    layers: int = 0
    seconds: float = 0.0
    sha256: str = ""
    bytes: int = 0
    inspector: str = ""
    peak_rss_bytes: int = 0


@dataclass(frozen=True)
class ShapeProfile:
    """Per input, the least, optimal and largest shape."""

    name: str
    shapes: dict[str, list[list[int]]]


@dataclass(frozen=True)
class Build(Request[BuildReply], operation="build"):
    """Build one engine; see ``builder.BuildRequest``. ``capability_name``: for TensorRT-RTX, what it builds for; else empty."""

    onnx: str
    engine: str | None
    capability_name: str
    profiles: list[ShapeProfile]
    sparse: bool
    timing_cache: str | None
    parse_only: bool
