"""Inputs and outputs of a model, and how Triton's configuration describes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compile_sparse.backends.triton.text_format import Word
from compile_sparse.compiler.errors import Refusal

__all__ = ["Tensor", "batch_symbol", "instances", "with_tensors"]

_TYPES = {
    "bool": "TYPE_BOOL",
    "uint8": "TYPE_UINT8",
    "uint16": "TYPE_UINT16",
    "uint32": "TYPE_UINT32",
    "uint64": "TYPE_UINT64",
    "int8": "TYPE_INT8",
    "int16": "TYPE_INT16",
    "int32": "TYPE_INT32",
    "int64": "TYPE_INT64",
    "float16": "TYPE_FP16",
    "bfloat16": "TYPE_BF16",
    "float32": "TYPE_FP32",
    "float64": "TYPE_FP64",
}
_KINDS = {"cuda": "KIND_GPU", "cpu": "KIND_CPU"}


@dataclass(frozen=True)
class Tensor:
    """A named input or output.

    Attributes:
        name: in the model.
        dtype: numpy's name of its type.
        shape: sizes; a symbol's name where it varies.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]


def batch_symbol(tensors: Sequence[Tensor]) -> str | None:
    """The symbol that is the first dimension of every tensor, or None.

    Triton puts a batch dimension in front of the sizes in the configuration when ``max_batch_size`` is above 0, and refuses a
    model of which one input or output has none (``CompareDimsSupported`` in its backends).
    """
    first = {tensor.shape[0] if tensor.shape else None for tensor in tensors}
    symbol = first.pop() if len(first) == 1 else None
    return symbol if isinstance(symbol, str) else None


def with_tensors(
    inputs: Sequence[Tensor], outputs: Sequence[Tensor], largest_batch: int
) -> tuple[dict[str, Any], bool]:
    """``max_batch_size``, ``input`` and ``output`` of a configuration, and whether Triton adds the batch dimension.

    Args:
        inputs, outputs: of the model.
        largest_batch: most requests at once, if the model has a batch dimension.

    Raises:
        Refusal: CS4624 for a type that Triton does not have, or a scalar without a batch.
    """
    batched = largest_batch > 0 and batch_symbol([*inputs, *outputs]) is not None
    config = {
        "max_batch_size": largest_batch if batched else 0,
        "input": [_described(tensor, batched=batched) for tensor in inputs],
        "output": [_described(tensor, batched=batched) for tensor in outputs],
    }
    return config, batched


def instances(device: str) -> dict[str, Any]:
    """One instance of the model on ``cpu`` or ``cuda``."""
    return {"count": 1, "kind": Word(_KINDS[device])}


def _described(tensor: Tensor, *, batched: bool) -> Mapping[str, Any]:
    if tensor.dtype not in _TYPES:
        raise Refusal(
            "CS4624",
            "Triton has no such type.",
            where=tensor.name,
            why=f"It is {tensor.dtype}; Triton's tensors are {', '.join(_TYPES)}.",
            hint="Serve the model without Triton.",
        )
    sizes = [-1 if isinstance(size, str) else size for size in tensor.shape[1 if batched else 0 :]]
    entry: dict[str, Any] = {"name": tensor.name, "data_type": Word(_TYPES[tensor.dtype])}
    if sizes:
        return {**entry, "dims": sizes}
    if batched:  # one number per request: Triton wants at least one dimension, and takes it away again
        return {**entry, "dims": [1], "reshape": {"shape": []}}
    raise Refusal(
        "CS4624",
        "Triton has no tensors without dimensions.",
        where=tensor.name,
        why="It is a single number, and the model has no batch dimension.",
        hint="Serve the model without Triton.",
    )
