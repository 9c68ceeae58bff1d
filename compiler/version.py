"""Versions that go into cache keys, manifests and reports."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import compile_sparse

__all__ = ["TOOL_VERSION", "library_versions"]

TOOL_VERSION: str = compile_sparse.__version__
LIBRARIES = ("torch", "transformers", "safetensors", "numpy", "onnx", "onnxruntime")


def library_versions() -> dict[str, str]:
    """Installed versions of what decides an artifact's content."""
    found: dict[str, str] = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
