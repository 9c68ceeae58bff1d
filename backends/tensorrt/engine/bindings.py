"""The bindings that this process uses: ``tensorrt`` or ``tensorrt_rtx``, one of the two per process.

Both have the same names for everything that is used here, except that only TensorRT-RTX is told what to build for. Modules
that need them import ``trt`` from here at their top, and are themselves imported after ``choose`` was called, so that no vendor
package is loaded before it is wanted. Type checkers see the bindings of TensorRT-RTX.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tensorrt_rtx as trt

__all__ = ["choose", "trt"]

_chosen: list[ModuleType] = []


def choose(name: str) -> ModuleType:
    """Load the bindings called ``name`` for this process.

    Raises:
        ImportError, OSError: they are missing or their libraries do not load.
        RuntimeError: the process uses others already. Their libraries hold process-wide state.
    """
    if _chosen and _chosen[0].__name__ != name:
        raise RuntimeError(f"this process uses {_chosen[0].__name__} already")
    module = importlib.import_module(name)
    _chosen[:] = [module]
    return module


def __getattr__(name: str) -> Any:
    if name == "trt":
        if not _chosen:
            raise ImportError("no bindings are chosen yet: call bindings.choose first")
        return _chosen[0]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
