"""Collects an ONNX graph as plain records, so that planning needs no onnx package.

Names are unique; equal small constants are shared; weights go to a ``Sink`` the moment they are added.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import torch

from compile_sparse.backends.onnx.element_types import PACKED, element_type, kind_of, raw_values, storage_type
from compile_sparse.backends.onnx.external_data import Extent, Sink

__all__ = ["GraphWriter", "NodeRecord", "TensorRecord", "ValueRecord"]

_INLINE_BYTES = 1024


@dataclass
class NodeRecord:
    """One operator call; an empty input or output name means it is absent. ``source``: the module it came from, or empty."""

    op: str
    inputs: list[str]
    outputs: list[str]
    domain: str
    attributes: dict[str, Any]
    source: str = ""


@dataclass(frozen=True)
class TensorRecord:
    """One stored tensor: bytes inside the model file, or an extent of the weight file."""

    name: str
    element: int
    shape: tuple[int, ...]
    inline: bytes | None
    extent: Extent | None


@dataclass(frozen=True)
class ValueRecord:
    """A graph input or output; ``kind`` as ``kind_of`` names it, text dimensions are symbolic."""

    name: str
    kind: str
    shape: tuple[int | str, ...]


@dataclass
class GraphWriter:
    """The graph under construction. New nodes are said to come from the module ``source``."""

    sink: Sink
    nodes: list[NodeRecord] = field(default_factory=list)
    tensors: dict[str, TensorRecord] = field(default_factory=dict)
    inputs: list[ValueRecord] = field(default_factory=list)
    outputs: list[ValueRecord] = field(default_factory=list)
    source: str = ""
    _used: set[str] = field(default_factory=set)
    _constants: dict[tuple[int, tuple[int, ...], bytes], str] = field(default_factory=dict)

    def reserve(self, name: str) -> str:
        """A name for a graph input or output, taken exactly as given."""
        self._used.add(name)
        return name

    def fresh(self, hint: str) -> str:
        """An unused name that starts with ``hint``."""
        name, number = hint, 1
        while name in self._used:
            name, number = f"{hint}_{number}", number + 1
        self._used.add(name)
        return name

    def call(self, op: str, inputs: Sequence[str], *, hint: str = "", domain: str = "", **attributes: Any) -> str:
        """Append a node with one output and return its name."""
        return self.call_many(op, inputs, 1, hint=hint, domain=domain, **attributes)[0]

    def call_many(
        self,
        op: str,
        inputs: Sequence[str],
        outputs: int | Sequence[bool],
        *,
        hint: str = "",
        domain: str = "",
        **attributes: Any,
    ) -> list[str]:
        """Append a node; ``outputs`` is their number, or which of them are wanted (the others get an empty name)."""
        wanted = [True] * outputs if isinstance(outputs, int) else list(outputs)
        names = [self.fresh(hint or op) if want else "" for want in wanted]
        self.nodes.append(NodeRecord(op, list(inputs), names, domain, attributes, self.source))
        return names

    def constant(self, values: Any, dtype: str = "int64") -> str:
        """A small constant; equal ones share a name."""
        # numpy has no bfloat16.
        bfloat16 = dtype == "bfloat16"
        array = raw_values(torch.tensor(values, dtype=torch.bfloat16)) if bfloat16 else np.asarray(values, dtype=dtype)
        key = (element_type(dtype), array.shape, array.tobytes())
        if key not in self._constants:
            name = self.fresh(f"constant_{len(self._constants)}")
            self.tensors[name] = TensorRecord(name, key[0], array.shape, key[2], None)
            self._constants[key] = name
        return self._constants[key]

    def weight(
        self, name: str, shape: Sequence[int], dtype: np.dtype[Any] | str, make: Callable[[], np.ndarray]
    ) -> str:
        """Store a tensor under ``name`` once; ``make`` runs only when values are really written.

        ``make`` gives the elements as ``storage_type`` holds them; of a packed kind the bytes, in any shape.

        Raises:
            RuntimeError: ``make`` gave another shape or dtype than declared (a defect of an emitter).
        """
        if name in self.tensors:
            return name
        self._used.add(name)
        kind, inline, extent = kind_of(dtype), None, None
        if self.sink.stores:
            values = make()
            fits = values.size == -(-prod(shape) // 2) if kind in PACKED else values.shape == tuple(shape)
            if not fits or values.dtype != storage_type(kind):
                raise RuntimeError(f"{name} is {values.shape} {values.dtype}, declared {tuple(shape)} {kind}")
            if values.nbytes < _INLINE_BYTES:
                inline = np.ascontiguousarray(values).tobytes()
            else:
                extent = self.sink.append(values)
        self.tensors[name] = TensorRecord(name, element_type(kind), tuple(shape), inline, extent)
        return name

    def rename(self, names: dict[str, str]) -> None:
        """Give values other names, everywhere they are written and read."""
        for node in self.nodes:
            node.inputs = [names.get(name, name) for name in node.inputs]
            node.outputs = [names.get(name, name) for name in node.outputs]

    def drop_dead_nodes(self) -> None:
        """Remove nodes, and constants inside the model file, that no output needs."""
        needed = {value.name for value in self.outputs}
        kept: list[NodeRecord] = []
        for node in reversed(self.nodes):
            if needed.intersection(node.outputs):
                kept.append(node)
                needed.update(node.inputs)
        self.nodes = kept[::-1]
        self.tensors = {name: record for name, record in self.tensors.items() if name in needed}
