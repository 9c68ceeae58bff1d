"""compile-sparse: compile a trained model for a serving runtime, and prove what it gained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["CompileResult", "__version__", "compile", "explain", "load_recipe"]

if TYPE_CHECKING:
    from compile_sparse.api import CompileResult, compile, explain, load_recipe


def __getattr__(name: str) -> Any:
    """Import the compiler only when it is used: ``import compile_sparse`` stays free of torch."""
    if name in __all__:
        from compile_sparse import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
