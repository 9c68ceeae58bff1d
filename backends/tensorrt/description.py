"""``compile_sparse.json`` in a model's folder: what the graph takes and gives, and which engines were built from it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from compile_sparse.compiler.artifact.manifest import is_contained
from compile_sparse.compiler.errors import Refusal

__all__ = [
    "DESCRIPTION_FILE",
    "Description",
    "EngineRecord",
    "Intended",
    "Profile",
    "Sparsity",
    "Value",
    "read_description",
]

DESCRIPTION_FILE = "compile_sparse.json"

BuilderName = Literal["tensorrt", "tensorrt_rtx"]
Shape = tuple[int, ...]


def _contained(name: str) -> str:
    if not is_contained(name):
        raise ValueError("must be a relative path inside the model's folder")
    return name


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Value(_Section):
    """One input or output of the graph."""

    name: str
    dtype: str = Field(description="numpy's name, such as float16; bfloat16 for that type")
    shape: tuple[int | str, ...] = Field(description="a number, or the symbol of a dimension that may vary")


class Profile(_Section):
    """A range of shapes that kernels are chosen for."""

    name: str = Field(description="prefill, decode, or samples for models without a cache")
    shapes: Mapping[str, tuple[Shape, Shape, Shape]] = Field(description="input -> least, optimal and largest shape")


class Intended(_Section):
    """One GEMM whose weight was pruned for a sparse kernel."""

    node: str = Field(description="name of the ONNX node")
    tensor: str = Field(description="name of the weight")


class Sparsity(_Section):
    """What was pruned for sparse kernels."""

    pattern: str = Field(description="such as 2:4")
    intended: tuple[Intended, ...] = ()


class EngineRecord(_Section):
    """One engine of ours: the only engines that are loaded."""

    file: Annotated[str, AfterValidator(_contained)] = Field(description="relative to the model's folder")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    bytes: int = Field(ge=1)
    builder: BuilderName
    version: str = Field(description="of the builder")
    compute_capability: str = Field(pattern=r"^\d+\.\d+$", description="that it was built for, such as 8.0")
    gpu: str = Field(default="", description="name of the GPU it was built on; empty when it was built without one")
    flags: tuple[str, ...] = ()
    profiles: tuple[str, ...] = Field(default=(), description="names, in the engine's order")


class Description(_Section):
    """The whole file."""

    schema_version: Literal[1] = 1
    kind: str = Field(description="decoder, text, image, ...")
    precision: str = Field(description="fp16, bf16 or fp32: of values that are not quantized")
    max_length: int | None = Field(default=None, ge=1, description="tokens that fit the cache; null without a cache")
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    aliases: Mapping[str, str] = Field(default_factory=dict, description="output -> input that shares its memory")
    profiles: tuple[Profile, ...] = ()
    sparsity: Sparsity | None = None
    engines: tuple[EngineRecord, ...] = ()
    limits: tuple[str, ...] = ()


def read_description(folder: Path) -> Description:
    """The description in ``folder``.

    Raises:
        Refusal: CS4419 when it is missing or not one.
    """
    path = folder / DESCRIPTION_FILE
    try:
        return Description.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValidationError) as error:
        raise Refusal(
            "CS4419",
            "The folder does not describe its model.",
            where=str(path),
            why=str(error),
            hint="Give the folder 'model' of an artifact of this version of compile-sparse, unchanged.",
        ) from error
