"""Which emitter writes which operator: a table for standard ONNX, and one per runtime on top of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import fx

    from compile_sparse.backends.onnx.emission import Emission

__all__ = ["STANDARD", "Dialect", "Emitted", "Emitter", "Unsupported", "emits"]

Emitted = str | Sequence[str]
Emitter = Callable[["Emission", "fx.Node"], Emitted]


class Unsupported(Exception):
    """Raised by an emitter for arguments it cannot express; the message is a sentence without a full stop."""


class Dialect:
    """Emitters by qualified operator name (``aten::add``); what a dialect lacks it takes from its ``parent``.

    A *lazy* emitter runs only when another one asks for its value: a weight that a linear packs itself is never written in float.
    """

    def __init__(self, name: str, opset: int, ir_version: int, parent: Dialect | None = None) -> None:
        self.name, self.opset, self.ir_version = name, opset, ir_version
        self._parent = parent
        self._emitters: dict[str, Emitter] = {}
        self._lazy: set[str] = set()

    def emits(self, *names: str, lazy: bool = False) -> Callable[[Emitter], Emitter]:
        """Register an emitter for operator names."""

        def register(emitter: Emitter) -> Emitter:
            for name in names:
                self._emitters[name] = emitter
                if lazy:
                    self._lazy.add(name)
            return emitter

        return register

    def find(self, name: str) -> Emitter | None:
        """The emitter of an operator, or None."""
        own = self._emitters.get(name)
        return own if own is not None or self._parent is None else self._parent.find(name)

    def is_lazy(self, name: str) -> bool:
        """Whether the operator is written only when its value is asked for."""
        if name in self._emitters or self._parent is None:
            return name in self._lazy
        return self._parent.is_lazy(name)


# Opset 23 is the first with Attention; IR 11 is what it was released with.
STANDARD = Dialect("onnx", opset=23, ir_version=11)
emits = STANDARD.emits
