"""Find the backend of a target: entry-point group ``compile_sparse.backends``."""

from __future__ import annotations

from typing import cast

from compile_sparse.compiler.errors import EnvironmentFailure
from compile_sparse.compiler.extension.backend_contract import Backend
from compile_sparse.compiler.extension.entry_points import find_entry, load_entry
from compile_sparse.compiler.targets.target import Target

__all__ = ["find_backend"]

_GROUP = "compile_sparse.backends"


def find_backend(target: Target) -> Backend:
    """An instance of the backend ``target`` names.

    Raises:
        EnvironmentFailure: CS5006 when no installed package provides it, or it cannot be imported.
    """

    def missing(why: str, hint: str) -> EnvironmentFailure:
        return EnvironmentFailure(
            "CS5006",
            f"The backend {target.backend!r} is not installed.",
            where=f"target {target.name}",
            why=f"No installed package registers it under {_GROUP!r}.",
            hint="Install the package that provides the target.",
        )

    made = load_entry(find_entry(_GROUP, target.backend, missing), f"Backend {target.backend!r}", "CS5006")
    return cast(Backend, made())
