"""Walks a program and emits one or a few ONNX nodes per operator.

Emitters register by qualified operator name in a dialect (``dialect.py``) and live in ``emitters/`` by family.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from compile_sparse.backends.onnx.dialect import STANDARD, Dialect, Emitted, Emitter, Unsupported, emits
from compile_sparse.backends.onnx.element_types import element_type, kind_of, raw_values
from compile_sparse.backends.onnx.graph_writer import GraphWriter
from compile_sparse.compiler.diagnostics import Diagnostic
from compile_sparse.compiler.ir.nodes import dimensions, qualified_name
from compile_sparse.compiler.ir.program import Program

__all__ = ["Emission", "Emitter", "Unsupported", "emits"]

# float64 is not: runtimes have few kernels for it.
_WRITABLE = (
    *(torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn),
    *(torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool),
)


class Emission:
    """State of one lowering: the program, the graph written so far and the ONNX name of every value.

    Sizes (symbolic integers) are int64 tensors of shape ``[1]``, which concatenate into shapes without further nodes.

    Attributes:
        forms: how many times each runtime form was used, for the report.
        unsupported: operators nothing was emitted for; when there are any the graph is incomplete.
        diagnostics: operators that could not use their fast form.
    """

    def __init__(
        self,
        program: Program,
        graph: GraphWriter,
        on_weight: Callable[[], None] = lambda: None,
        dialect: Dialect = STANDARD,
    ) -> None:
        self.program, self.graph, self.dialect = program, graph, dialect
        self.forms: dict[str, int] = {}
        self.unsupported: list[Diagnostic] = []
        self.diagnostics: list[Diagnostic] = []
        self.shared: dict[Any, Any] = {}
        self._on_weight = on_weight
        self._names: dict[fx.Node, Emitted] = {}

    def run(self) -> None:
        """Emit every node; operators without an emitter are collected instead of stopping at the first."""
        for node in self.program.graph.nodes:
            if node.op != "call_function" or node in self._names or self.dialect.is_lazy(qualified_name(node)):
                continue
            try:
                self._emit(node)
            except Unsupported as reason:
                where = _source_of(node)
                why = f"{qualified_name(node)} has no ONNX form here: {reason}."
                self.unsupported.append(Diagnostic(where, "CS2311", why, "Report the model; an emitter can be added."))
                self._names[node] = [""] * 64 if isinstance(node.meta.get("val"), (list, tuple)) else ""

    def _emit(self, node: fx.Node) -> None:
        emitter = self.dialect.find(qualified_name(node))
        if emitter is None:
            raise Unsupported("no emitter is registered for it")
        enclosing, self.graph.source = self.graph.source, _module_of(node)
        try:
            emitted = emitter(self, node)
        finally:
            self.graph.source = enclosing
        self._names.setdefault(node, emitted)

    def bind(self, node: fx.Node, name: Emitted) -> None:
        """Set the value of a node: inputs, and nodes fused into an earlier one."""
        self._names[node] = name

    def names(self, node: fx.Node) -> Emitted:
        """Name or names of a node's value, emitting it now when it is a weight or lazy."""
        if node not in self._names:
            if node.op == "placeholder":
                self._names[node] = self.stored(node)
            else:
                self._emit(node)
        return self._names[node]

    def value(self, node: fx.Node) -> str:
        """Name of a node with a single value."""
        name = self.names(node)
        return name if isinstance(name, str) else name[0]

    def tensor(self, operand: Any, dtype: torch.dtype | None = None) -> str:
        """A node, size or Python number as a tensor, cast to ``dtype`` when that differs."""
        if not isinstance(operand, fx.Node):
            kind = dtype or (torch.float32 if isinstance(operand, float) else torch.int64)
            return self.graph.constant(_clipped(operand, kind), kind_of(kind))
        name = self.value(operand)
        have = self.dtype(operand)
        if not isinstance(operand.meta["val"], torch.Tensor):
            name = self.graph.call("Squeeze", [name], hint="size")
        return name if dtype in (None, have) else self.graph.call("Cast", [name], to=element_type(dtype))

    def dtype(self, operand: Any) -> torch.dtype:
        """Element type of an operand; sizes are int64."""
        value = operand.meta.get("val") if isinstance(operand, fx.Node) else operand
        if isinstance(value, torch.Tensor):
            return value.dtype
        if isinstance(value, bool):
            return torch.bool
        return torch.float32 if isinstance(value, (float, torch.SymFloat)) else torch.int64

    def integers(self, values: Sequence[Any]) -> str:
        """An int64 vector of Python integers and sizes."""
        if all(isinstance(value, int) for value in values):
            return self.graph.constant(list(values))
        parts = [self.value(v) if isinstance(v, fx.Node) else self.graph.constant([v]) for v in values]
        return parts[0] if len(parts) == 1 else self.graph.call("Concat", parts, axis=0, hint="shape")

    def size(self, node: fx.Node, dim: int) -> str:
        """Size of one dimension, shape ``[1]``."""
        return self.graph.call("Shape", [self.value(node)], start=dim, end=dim + 1, hint="size")

    def rank(self, node: fx.Node) -> int:
        """Number of dimensions."""
        return len(dimensions(node))

    def axis(self, node: fx.Node, dim: int) -> int:
        """``dim`` counted from the front."""
        return dim % max(self.rank(node), 1)

    def stored(
        self,
        placeholder: fx.Node,
        suffix: str = "",
        shape: Sequence[int] | None = None,
        dtype: str | None = None,
        change: Callable[[torch.Tensor], np.ndarray] | None = None,
    ) -> str:
        """A weight as an initializer; ``change`` lays its values out for the kernel.

        Raises:
            Unsupported: the weight's dtype has no place in a graph.
        """
        tensor = self.program.tensor_of(placeholder)
        if tensor is None:
            raise Unsupported(f"{placeholder.name} is neither an input nor a weight")
        source = self.program.weights[tensor]
        if source.dtype not in _WRITABLE:
            raise Unsupported(f"weight {tensor} has dtype {source.dtype}")

        def make() -> np.ndarray:
            self._on_weight()
            values = source.load().detach()
            return raw_values(values) if change is None else change(values)

        kind = dtype or kind_of(source.dtype)
        return self.graph.weight(tensor + suffix, source.shape if shape is None else shape, kind, make)

    def count(self, form: str) -> None:
        """Note that a runtime form was used once more."""
        self.forms[form] = self.forms.get(form, 0) + 1


def _clipped(value: Any, dtype: torch.dtype) -> Any:
    """Python constants that stand for infinity in another dtype saturate instead of overflowing."""
    if dtype.is_floating_point and isinstance(value, float) and value == value and abs(value) != float("inf"):
        limit = torch.finfo(dtype).max
        return max(-limit, min(limit, value))
    return value


def _module_of(node: fx.Node) -> str:
    """Path of the innermost module a node came from; empty when it is not known."""
    stack: Mapping[str, Any] = node.meta.get("nn_module_stack") or {}
    path = [entry[0] for entry in stack.values() if isinstance(entry, tuple)]
    return str(path[-1]) if path else ""


def _source_of(node: fx.Node) -> str:
    """Node name with the module it came from."""
    module = _module_of(node)
    return f"{node.name} ({module})" if module else node.name
