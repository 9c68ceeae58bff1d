"""What Triton must know of an ONNX file: inputs, outputs, and whether requests may be computed together."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compile_sparse.backends.triton.tensors import Tensor
from compile_sparse.compiler.artifact.manifest import is_contained
from compile_sparse.compiler.errors import EnvironmentFailure, Refusal

__all__ = ["OnnxModel", "read_onnx"]

_COUPLING = {
    "GroupQueryAttention": "several new tokens on top of a cache are computed wrongly in batches",
}
"""Operators through which rows of a batch influence each other, and how."""


@dataclass(frozen=True)
class OnnxModel:
    """Facts of a file.

    Attributes:
        inputs, outputs: in order.
        data_files: names of the files beside it that hold weights.
        coupling: why requests must not be computed in one batch, a clause; empty when they may.
    """

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    data_files: tuple[str, ...]
    coupling: str


def read_onnx(path: Path) -> OnnxModel:
    """Read ``path`` without its weights.

    Raises:
        EnvironmentFailure: CS5012 when the package onnx is missing.
        Refusal: CS4625 when the file cannot be read.
    """
    try:
        import onnx
        from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    except ImportError as error:
        raise EnvironmentFailure(
            "CS5012",
            "The package onnx is not installed.",
            where="--emit triton",
            why=str(error),
            hint="pip install 'compile-sparse[ort]'",
        ) from error
    try:
        graph = onnx.load(path, load_external_data=False).graph
    except (OSError, DecodeError) as error:
        raise Refusal(
            "CS4625",
            "The model file cannot be read.",
            where=str(path),
            why=f"{type(error).__name__}: {error}",
            hint="Compile again.",
        ) from error
    stored = {tensor.name for tensor in graph.initializer}
    operators = {node.op_type for node in graph.node}
    return OnnxModel(
        tuple(_tensor(onnx, value) for value in graph.input if value.name not in stored),
        tuple(_tensor(onnx, value) for value in graph.output),
        _data_files(graph, path),
        next((why for name, why in _COUPLING.items() if name in operators), ""),
    )


def _data_files(graph: Any, path: Path) -> tuple[str, ...]:
    locations = {
        str(entry.value) for tensor in graph.initializer for entry in tensor.external_data if entry.key == "location"
    }
    if stray := sorted(name for name in locations if not is_contained(name)):
        raise Refusal(
            "CS4625",
            "The model file names weights outside its folder.",
            where=str(path),
            why=f"It names {stray[0]!r}.",
            hint="Compile again.",
        )
    return tuple(sorted(locations))


def _tensor(onnx: Any, value: Any) -> Tensor:
    described = value.type.tensor_type
    sizes = tuple(
        dimension.dim_value if dimension.HasField("dim_value") else dimension.dim_param or f"{value.name}_dim_{place}"
        for place, dimension in enumerate(described.shape.dim)
    )
    name = str(onnx.helper.tensor_dtype_to_np_dtype(described.elem_type).name)
    return Tensor(value.name, name, sizes)
