"""What reading a quantized checkpoint gives, and how it is refused."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

from pydantic import BaseModel, ValidationError

from compile_sparse.compiler.capture.safetensors_reader import StoredTensor
from compile_sparse.compiler.diagnostics import Diagnostic
from compile_sparse.compiler.errors import ModelError
from compile_sparse.compiler.files.validation_errors import explained
from compile_sparse.compiler.ir.weights import TensorSource

__all__ = ["Method", "Reading", "as_stored", "misfit", "parsed", "unread"]

_CACHE = "The key-value cache stays in floating point; --kv-cache fp8 quantizes it, with scales of its own."
M = TypeVar("M", bound=BaseModel)
HINT = (
    "Load it with transformers and the package that wrote it, call model.dequantize(), and save_pretrained the result."
)


class Method(Protocol):
    """One way to store quantized weights, with the settings of one checkpoint."""

    @property
    def name(self) -> str:
        """What people call it."""
        ...

    def read(self, tensors: Mapping[str, StoredTensor]) -> Reading:
        """The checkpoint with one tensor per weight.

        Args:
            tensors: every stored tensor by name.

        Raises:
            ModelError: CS2020 for a form that is not read, CS2021 for tensors that do not fit each other.
        """
        ...


@dataclass
class Reading:
    """A checkpoint whose quantized weights are one tensor each.

    Attributes:
        sources: by name; a quantized weight is a ``QuantizedTensor`` where our operators have its form, and another float32
            tensor, computed when it is loaded, where they do not.
        floats: why a weight is the latter -> names of weights.
        dropped: what is left out -> names of tensors.
    """

    sources: dict[str, TensorSource] = field(default_factory=dict)
    floats: dict[str, list[str]] = field(default_factory=dict)
    dropped: dict[str, list[str]] = field(default_factory=dict)

    def keep(self, rest: Mapping[str, StoredTensor], cache: Collection[str]) -> None:
        """Take in the tensors that are no part of a quantized weight; those called one of ``cache``, the scales of a quantized
        key-value cache, are left out.
        """
        for name, tensor in rest.items():
            if name.rpartition(".")[2] in cache:
                self.dropped.setdefault(_CACHE, []).append(name)
            else:
                self.sources[name] = tensor

    def add(self, weight: str, source: TensorSource, why_float: str) -> None:
        """Take in a quantized weight, and why it is in floating point; empty where it is codes."""
        self.sources[weight] = source
        if why_float:
            self.floats.setdefault(why_float, []).append(weight)

    def diagnostics(self) -> tuple[Diagnostic, ...]:
        """One for every reason, naming the first of its weights."""
        read = "It is read in floating point, as the values that its codes stand for."
        return (
            *(Diagnostic(_some(names), "CS2220", f"{why} {read}") for why, names in self.floats.items()),
            *(Diagnostic(_some(names), "CS2221", why) for why, names in self.dropped.items()),
        )


def _some(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def as_stored(tensor: StoredTensor) -> StoredTensor:
    """The tensor in the type of the file."""
    return replace(tensor, dtype=tensor.stored_dtype)


def unread(what: str, *, where: str, why: str) -> ModelError:
    """The refusal of a form that this version does not read."""
    return ModelError("CS2020", what, where=where, why=why, hint=HINT)


def misfit(name: str, why: str) -> ModelError:
    """The refusal of tensors that contradict each other or the config."""
    return ModelError(
        "CS2021",
        "A quantized weight does not fit its description.",
        where=name,
        why=why,
        hint="Use the config.json that was written with these weights, or write the checkpoint again.",
    )


def parsed(model: type[M], raw: Any, where: str) -> M:
    """``raw`` as ``model``.

    Raises:
        ModelError: CS2021 with what is wrong.
    """
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        raise misfit(where, explained(error, model, None, subject=where).why) from error
