"""Tensors that a checkpoint stores in pieces: described at once, put together when they are loaded.

transformers fuses on load (the experts of a layer become one tensor, query, key and value may become one or three) and its own
table says how: a ``WeightConverter`` collects the pieces and runs a list of operations. The four operations nearly every entry is
made of are mirrored here as *destinations*: the result is allocated once and every piece is read straight into its place, so the
peak is the assembled tensor and one piece, where running the operations themselves would hold everything two or three times.

- ``MergeModulelist(d)``: pieces ``0 .. n-1`` become positions along a new dimension ``d``.
- ``Concatenate(d)``: the patterns' tensors one after the other along ``d``, in the order of the patterns.
- ``Transpose(a, b)``: two dimensions change places; with ``check_dims`` only when the stored shape is not the wanted one.
- ``Chunk(d)``: one tensor becomes equal consecutive parts along ``d``, one per target.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    ConversionOps,
    MergeModulelist,
    Transpose,
    WeightConverter,
)

from compile_sparse.compiler.ir.weights import DerivedTensor, TensorSource

__all__ = ["CannotAssemble", "assembled"]


class CannotAssemble(Exception):
    """The pieces do not fit together, or an operation is not one of the four. The message is a clause."""


class _Part(Protocol):
    @property
    def shape(self) -> tuple[int, ...]: ...

    def write(self, out: torch.Tensor) -> None:
        """Fill ``out``, a view of ``shape``."""
        ...


@dataclass(frozen=True)
class _Piece:
    source: TensorSource

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    def write(self, out: torch.Tensor) -> None:
        out.copy_(self.source.load())


@dataclass(frozen=True)
class _Stacked:
    parts: Sequence[_Part]
    dim: int
    shape: tuple[int, ...]

    def write(self, out: torch.Tensor) -> None:
        for place, part in enumerate(self.parts):
            part.write(out.select(self.dim, place))


@dataclass(frozen=True)
class _Joined:
    parts: Sequence[_Part]
    dim: int
    shape: tuple[int, ...]

    def write(self, out: torch.Tensor) -> None:
        start = 0
        for part in self.parts:
            part.write(out.narrow(self.dim, start, part.shape[self.dim]))
            start += part.shape[self.dim]


@dataclass(frozen=True)
class _Transposed:
    part: _Part
    dims: tuple[int, int]
    shape: tuple[int, ...]

    def write(self, out: torch.Tensor) -> None:
        self.part.write(out.transpose(*self.dims))


@dataclass(frozen=True)
class _Slice:
    part: _Part
    dim: int
    start: int
    shape: tuple[int, ...]

    def write(self, out: torch.Tensor) -> None:
        whole = torch.empty(self.part.shape, dtype=out.dtype)
        self.part.write(whole)
        out.copy_(whole.narrow(self.dim, self.start, self.shape[self.dim]))


_Collected = dict[str, list[_Part]]
"""Source pattern, or target pattern once an operation has named it -> tensors in order."""


def assembled(
    converter: WeightConverter,
    target: str,
    pieces: Mapping[str, Sequence[TensorSource]],
    wanted: Mapping[str, tuple[int, ...]],
) -> dict[str, TensorSource]:
    """Sources of the tensors one conversion gives.

    Args:
        converter: transformers' own entry.
        target: name of the first tensor it gives, as ``rename_source_key`` answers.
        pieces: source pattern -> stored tensors in natural order (experts by number).
        wanted: shape of every tensor of the model, by name; decides ``check_dims``.

    Raises:
        CannotAssemble: see there.
    """
    dtypes = {source.dtype for sources in pieces.values() for source in sources}
    if len(dtypes) != 1:
        raise CannotAssemble("its pieces have different dtypes")
    collected: _Collected = {pattern: [_Piece(source) for source in found] for pattern, found in pieces.items()}
    for operation in converter.operations:
        collected = _applied(operation, collected, converter, wanted.get(target))
    dtype = dtypes.pop()
    stored = {getattr(source, "stored_dtype", None) for found in pieces.values() for source in found}
    alike = stored.pop() if len(stored) == 1 else None
    first = next((pattern for pattern in collected if pattern in target), None)
    if first is None:
        raise CannotAssemble("its conversion names no tensor of the model")
    before, _, after = target.partition(first)
    return {before + name + after: _lazy(_only(parts), dtype, alike) for name, parts in collected.items()}


def _applied(
    operation: ConversionOps, collected: _Collected, converter: WeightConverter, wanted: tuple[int, ...] | None
) -> _Collected:
    targets = converter.target_patterns
    # The exact class: a subclass may mean something else.
    if type(operation) is MergeModulelist:
        named = targets if len(collected) == 1 and len(targets) == 1 else list(collected)
        return {name: [_stacked(parts, operation.dim)] for name, parts in zip(named, collected.values(), strict=True)}
    if type(operation) is Concatenate and len(targets) == 1:
        parts = [part for name in converter.source_patterns for part in collected.get(name, ())]
        return {targets[0]: [_joined(parts, operation.dim)]}
    if type(operation) is Transpose and len(targets) == 1:
        part = _only(next(iter(collected.values()))) if len(collected) == 1 else None
        if part is None:
            raise CannotAssemble("a transposition of several tensors is unknown")
        if operation.check_dims and part.shape == wanted:
            return {targets[0]: [part]}
        return {targets[0]: [_transposed(part, operation.dim0, operation.dim1)]}
    if type(operation) is Chunk and operation.num_shards_attribute is None and len(collected) == 1:
        return _chunked(_only(next(iter(collected.values()))), operation.dim, targets)
    raise CannotAssemble(f"its conversion uses {operation!r}, which is not supported")


def _stacked(parts: list[_Part], dim: int) -> _Part:
    if len({part.shape for part in parts}) != 1:
        raise CannotAssemble("the pieces to be stacked have different shapes")
    shape = parts[0].shape
    return _Stacked(parts, dim, (*shape[:dim], len(parts), *shape[dim:]))


def _joined(parts: list[_Part], dim: int) -> _Part:
    rests = {(*part.shape[:dim], *part.shape[dim + 1 :]) for part in parts}
    if len(rests) != 1 or any(len(part.shape) <= dim for part in parts):
        raise CannotAssemble("the pieces to be concatenated do not fit")
    shape = list(parts[0].shape)
    shape[dim] = sum(part.shape[dim] for part in parts)
    return _Joined(parts, dim, tuple(shape))


def _transposed(part: _Part, a: int, b: int) -> _Part:
    shape = list(part.shape)
    if max(a, b) >= len(shape):
        raise CannotAssemble("the tensor to be transposed has too few dimensions")
    shape[a], shape[b] = shape[b], shape[a]
    return _Transposed(part, (a, b), tuple(shape))


def _chunked(part: _Part, dim: int, targets: Sequence[str]) -> _Collected:
    if len(part.shape) <= dim or part.shape[dim] % len(targets):
        raise CannotAssemble(f"a dimension of {part.shape} does not divide into {len(targets)} equal parts")
    size = part.shape[dim] // len(targets)
    shape = (*part.shape[:dim], size, *part.shape[dim + 1 :])
    return {name: [_Slice(part, dim, place * size, shape)] for place, name in enumerate(targets)}


def _only(parts: Sequence[_Part]) -> _Part:
    if len(parts) != 1:
        raise CannotAssemble("several stored tensors claim the same place")
    return parts[0]


def _lazy(part: _Part, dtype: torch.dtype, stored: torch.dtype | None) -> TensorSource:
    def compute() -> torch.Tensor:
        out = torch.empty(part.shape, dtype=dtype)
        part.write(out)
        return out

    return DerivedTensor(part.shape, dtype, compute, stored)
