"""Find the backend of a target through entry points."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import cast

from compile_sparse.compiler.errors import EnvironmentFailure
from compile_sparse.compiler.extension.backend_contract import Backend
from compile_sparse.compiler.targets.target import Target

__all__ = ["find_backend"]


def find_backend(target: Target) -> Backend:
    """An instance of the backend ``target`` names.

    Raises:
        EnvironmentFailure: CS5006 when no installed package provides it.
    """
    for entry in entry_points(group="compile_sparse.backends"):
        if entry.name == target.backend:
            return cast(Backend, entry.load()())
    raise EnvironmentFailure(
        "CS5006",
        f"The backend {target.backend!r} is not installed.",
        where=f"target {target.name}",
        why="No installed package registers it under 'compile_sparse.backends'.",
        hint="Install the package that provides the target.",
    )
