"""Find what packages register under entry points, by name: passes, quantizers, backends, deployments."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from compile_sparse.compiler.errors import CompileSparseError, EnvironmentFailure

__all__ = ["find_entry", "incomplete", "installed", "load_entry"]


def installed(group: str) -> dict[str, EntryPoint]:
    """Entry points of ``group`` by name, sorted."""
    return {entry.name: entry for entry in sorted(entry_points(group=group), key=lambda entry: entry.name)}


def find_entry(
    group: str, name: str, missing: Callable[[str, str], CompileSparseError], *, nearness: float = 0.4
) -> EntryPoint:
    """The entry point ``name`` of ``group``.

    Args:
        group: such as ``compile_sparse.passes``.
        name: what is asked for.
        missing: makes the error that is raised when nothing has that name, of two sentences: which names there are, and the
            nearest of them or what else to do.
        nearness: of a name that is suggested, 0 to 1.
    """
    found = installed(group)
    if name in found:
        return found[name]
    near = difflib.get_close_matches(name, found, n=1, cutoff=nearness)
    hint = f"Did you mean {near[0]!r}?" if near else "Leave it out, or install a package that provides it."
    noun = group.rpartition(".")[2].capitalize()
    raise missing(f"Installed {noun.lower()}: {', '.join(found) or 'none'}.", hint)


def load_entry(entry: EntryPoint, what: str, code: str) -> Any:
    """The object that ``entry`` names.

    Args:
        entry: of any group.
        what: it is, for people: ``Pass 'mask'``.
        code: of the error.

    Raises:
        EnvironmentFailure: the package that provides it cannot be imported.
    """
    try:
        return entry.load()
    except (ImportError, AttributeError) as error:
        raise EnvironmentFailure(
            code,
            f"{what} cannot be imported.",
            where=f"entry point {entry.value}",
            why=f"{type(error).__name__}: {error}",
            hint="Reinstall the package that provides it.",
        ) from error


def incomplete(name: str, found: object, base: type, attributes: Sequence[str]) -> str:
    """What keeps ``found`` from being a complete class registered as ``name``, a sentence; else empty.

    Args:
        name: of the entry point.
        found: what it gave.
        base: the contract, an abstract class; the entry is a subclass of it.
        attributes: that the subclass has to define, beside ``name`` and what is abstract.
    """
    if not (isinstance(found, type) and issubclass(found, base)):
        return f"It is no subclass of {base.__module__}.{base.__name__}."
    lacking = [each for each in ("name", *attributes) if not hasattr(found, each)]
    lacking += sorted(getattr(found, "__abstractmethods__", ()))
    if lacking:
        return f"Its class lacks {', '.join(map(repr, lacking))}."
    if found.name != name:  # type: ignore[attr-defined]
        return f"Its class is called {found.name!r}; both names must be the same."  # type: ignore[attr-defined]
    return ""
