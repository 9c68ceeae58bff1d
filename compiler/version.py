"""Versions that go into cache keys, manifests and reports."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.metadata import PackageNotFoundError, entry_points, version
from importlib.util import find_spec
from pathlib import Path

import compile_sparse

__all__ = ["TOOL_VERSION", "code_identity", "library_versions"]

TOOL_VERSION: str = compile_sparse.__version__
LIBRARIES = ("torch", "transformers", "safetensors", "numpy", "onnx", "onnxruntime")
PACKAGES = ("compile_sparse.compiler", "compile_sparse.passes", "compile_sparse.backends")


def library_versions() -> dict[str, str]:
    """Installed versions of what decides an artifact's content."""
    found: dict[str, str] = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@cache
def code_identity() -> dict[str, str]:
    """What produced a cached result: a digest of our own source, and every package that provides passes, quantizers or backends.

    A version number alone does not do: whoever changes a pass and runs again must not get the old pass's result.
    """
    digest = hashlib.sha256()
    for package in PACKAGES:
        spec = find_spec(package)
        for location in (spec.submodule_search_locations or ()) if spec else ():
            for path in sorted(Path(location).rglob("*.py")):
                digest.update(path.relative_to(location).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    found = {"source": digest.hexdigest(), "version": TOOL_VERSION}
    for group in ("compile_sparse.passes", "compile_sparse.quantizers", "compile_sparse.backends"):
        for entry in entry_points(group=group):
            if entry.dist is not None:
                found[f"{group}:{entry.name}"] = f"{entry.dist.name} {entry.dist.version}"
    return found
