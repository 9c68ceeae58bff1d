"""``manifest.json``: what an artifact is made of. Written last; without it there is no artifact."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from compile_sparse.compiler.artifact.report import PassSection, RuntimeSection

TOOL_NAME = "compile-sparse"

__all__ = ["TOOL_NAME", "FileEntry", "Manifest", "Source", "Tool", "is_contained"]


def is_contained(name: str) -> bool:
    """True for a plain relative path: no root, drive, ``..``, backslash or empty part."""
    path = PurePosixPath(name)
    return (
        bool(name)
        and "\\" not in name
        and "\0" not in name
        and not re.match(r"[A-Za-z]:", name)
        and not path.is_absolute()
        and ".." not in path.parts
        and str(path) == name
        and name != "."
    )


def _contained(name: str) -> str:
    if not is_contained(name):
        raise ValueError("must be a relative path inside the artifact")
    return name


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Tool(_Section):
    """What made the artifact."""

    name: str = TOOL_NAME
    version: str


class Source(_Section):
    """The dense model."""

    name: str = Field(description="folder or hub id as people call it, without local folders")
    digest: str = Field(description="sha256 of its config and weights, hexadecimal")
    commit: str = Field(default="", description="that a hub id stood for; empty for a folder")


class FileEntry(_Section):
    """One file of the artifact."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    bytes: int = Field(ge=0)


class Manifest(_Section):
    """The whole file. ``files`` lists every file of the folder except the manifest itself."""

    schema_version: Literal[1] = 1
    tool: Tool
    source: Source
    recipe: dict[str, Any] = Field(description="canonical recipe: files by name and sha256")
    target: str
    passes: tuple[PassSection, ...] = ()
    runtime: RuntimeSection | None = None
    libraries: dict[str, str] = Field(default_factory=dict, description="package -> version used")
    form: dict[str, Any] = Field(default_factory=dict, description="runtime form chosen, per aspect")
    limits: tuple[str, ...] = Field(default=(), description="what the runtime must respect")
    files: dict[Annotated[str, AfterValidator(_contained)], FileEntry] = Field(default_factory=dict)
