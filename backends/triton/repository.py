"""Write a Triton model repository: ``NAME/config.pbtxt`` and ``NAME/1/`` with what the backend loads.

Layout and semantics: Triton's user guide (model repository, model configuration) and the sources of its tensorrt, onnxruntime and
vllm backends (2025-2026). No Triton server was run by this project.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from compile_sparse.backends.triton.model_folder import ModelFolder
from compile_sparse.backends.triton.serve_onnxruntime import serve_onnxruntime
from compile_sparse.backends.triton.serve_tensorrt import serve_tensorrt
from compile_sparse.backends.triton.serve_vllm import serve_vllm
from compile_sparse.backends.triton.text_format import as_text
from compile_sparse.compiler.errors import UsageError
from compile_sparse.compiler.files.durable import disk_errors

__all__ = ["MOUNTED_AT", "Backend", "Repository", "write_repository"]

Backend = Literal["tensorrt", "onnxruntime", "vllm"]
MOUNTED_AT = "/models"
"""Where the containers of Triton's own instructions have the repository."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
_NOTHING: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True)
class Repository:
    """What was written.

    Attributes:
        files: path below the repository -> sha256.
        limits: what whoever serves it must know, as sentences.
    """

    files: Mapping[str, str]
    limits: tuple[str, ...]


def write_repository(
    model: Path,
    out: Path,
    *,
    name: str,
    backend: Backend,
    device: str,
    largest_batch: int = 8,
    gpus: int = 1,
    mounted_at: str = MOUNTED_AT,
    known: Mapping[str, str] = _NOTHING,
) -> Repository:
    """Write ``out/name``, which does not exist yet. Files are hard links where that is possible and safe.

    Args:
        model: a lowered folder, on the file system of ``out``.
        out: the repository, which may hold other models.
        name: of the model in Triton.
        backend: Triton's.
        device: ``cpu`` or ``cuda``.
        largest_batch: most requests at once, where the model leaves it open.
        gpus: over which vLLM splits the model.
        mounted_at: absolute path of the repository where Triton runs. Only vLLM needs it: ``model.json`` names the checkpoint by
            it.
        known: digests of files of ``model`` that were computed when they were written; others are read.

    Raises:
        UsageError: CS1062 for a name that is no folder's.
        Refusal: CS4621 to CS4625; CS4419 for an engine's folder without description.
        EnvironmentFailure: CS5003, CS5012.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(
            "CS1062",
            f"{name!r} is no name for a model in Triton.",
            where="--emit triton",
            why="It becomes a folder and a part of addresses: letters, digits, '_', '-' and '.', at most 128.",
            hint="Choose another name for the artifact.",
        )
    with disk_errors(out):
        folder = ModelFolder(model, out, name, known)
        if backend == "vllm":
            config, limits = serve_vllm(folder, device, gpus, mounted_at)
        elif backend == "tensorrt":
            config, limits = serve_tensorrt(folder)
        else:
            config, limits = serve_onnxruntime(folder, device, largest_batch)
        folder.write_config(as_text({"name": name, "backend": backend, **config}))
    return Repository(folder.files, tuple(limits))
