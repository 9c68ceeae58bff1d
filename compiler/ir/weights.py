"""Weights that stay on disk until a tensor is needed.

A ``WeightStore`` maps names to ``TensorSource`` objects. A source knows its shape and dtype at once and reads or computes
its values only on ``load()``. Passes never edit tensors: they wrap sources (slice, cast, quantize), so memory follows the
largest tensor in flight and never the whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Generic, Protocol, TypeVar

import torch

from compile_sparse.compiler.errors import ModelError

__all__ = [
    "AbsentTensor",
    "DerivedTensor",
    "DowncastTensor",
    "LastComputed",
    "ResidentTensor",
    "TensorSource",
    "WeightStore",
]

T = TypeVar("T")


class TensorSource(Protocol):
    """A tensor that can be described for free and loaded on demand."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def load(self) -> torch.Tensor:
        """Read or compute the values. The caller owns the result; it must not be written to."""
        ...


@dataclass(frozen=True)
class ResidentTensor:
    """A small tensor already in memory (buffers, constants, tests)."""

    value: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.value.dtype

    def load(self) -> torch.Tensor:
        return self.value


@dataclass(frozen=True)
class AbsentTensor:
    """A tensor known only by shape: the model was captured from its config, without weights."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    name: str = ""

    def load(self) -> torch.Tensor:
        raise ModelError(
            "CS2001",
            "This model was read without weights.",
            where=self.name,
            why="The folder has a config.json but no safetensors file, so only the plan can be made.",
            hint="Use 'compile-sparse explain', or point MODEL at a folder with model.safetensors.",
        )


@dataclass(frozen=True)
class DerivedTensor:
    """A tensor computed from others when it is loaded.

    ``compute`` must be pure and give exactly ``shape`` and ``dtype``; ``load`` checks both, because a wrong shape here would
    surface much later as a wrong answer. ``stored_dtype`` is the type in the source's file, for what is put together from there.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    compute: Callable[[], torch.Tensor]
    stored_dtype: torch.dtype | None = None

    def load(self) -> torch.Tensor:
        value = self.compute()
        if tuple(value.shape) != self.shape or value.dtype != self.dtype:
            raise RuntimeError(
                f"derived tensor is {tuple(value.shape)} {value.dtype}, declared {self.shape} {self.dtype}"
            )
        return value


class LastComputed(Generic[T]):
    """Remembers one result. Tensors that are made together (codes and their scales, two factors) are loaded one after the other:
    what makes them runs once, and memory is one result's.
    """

    def __init__(self) -> None:
        self._last: tuple[object, T] | None = None

    def get(self, key: object, compute: Callable[[], T]) -> T:
        """``compute()``, or the last result if it was for an equal ``key``."""
        if self._last is None or self._last[0] != key:
            self._last = None  # freed before the next one is made
            self._last = (key, compute())
        return self._last[1]


@dataclass(frozen=True)
class DowncastTensor:
    """A float32 tensor whose values are representable in a shorter type, in which it will be stored.

    Attributes:
        source: float32, any values.
        storage: the shorter type.
    """

    source: TensorSource
    storage: torch.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.source.dtype

    def load(self) -> torch.Tensor:
        return self.source.load().to(self.storage).to(self.source.dtype)

    def stored(self) -> TensorSource:
        """The same values in the shorter type."""
        if isinstance(self.source, AbsentTensor):
            return AbsentTensor(self.shape, self.storage, self.source.name)
        return DerivedTensor(self.shape, self.storage, lambda: self.source.load().to(self.storage))


class WeightStore(Mapping[str, TensorSource]):
    """Immutable mapping of tensor name to source; ``updated`` returns a new store."""

    def __init__(self, sources: Mapping[str, TensorSource]) -> None:
        self._sources = dict(sources)

    def __getitem__(self, name: str) -> TensorSource:
        return self._sources[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)

    def load(self, name: str) -> torch.Tensor:
        """Values of one tensor."""
        return self._sources[name].load()

    def updated(self, changes: Mapping[str, TensorSource], *, keep: set[str] | None = None) -> WeightStore:
        """A new store with ``changes`` applied; with ``keep``, only those names survive."""
        merged = {**self._sources, **changes}
        if keep is not None:
            merged = {name: source for name, source in merged.items() if name in keep}
        return WeightStore(merged)

    @property
    def has_values(self) -> bool:
        """False when any tensor is known by shape only."""
        return not any(
            isinstance(source.source if isinstance(source, DowncastTensor) else source, AbsentTensor)
            for source in self._sources.values()
        )

    def elements(self, name: str) -> int:
        """Number of elements of one tensor."""
        return prod(self._sources[name].shape)

    def nbytes(self, name: str) -> int:
        """Bytes of one tensor at its dtype."""
        return self.elements(name) * self._sources[name].dtype.itemsize
