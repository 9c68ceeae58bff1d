"""Installed passes: entry-point group ``compile_sparse.passes``. A class is checked when it is loaded, before anything runs."""

from __future__ import annotations

from typing import cast

from compile_sparse.compiler.errors import EnvironmentFailure, Refusal
from compile_sparse.compiler.extension.entry_points import find_entry, incomplete, load_entry
from compile_sparse.compiler.extension.pass_contract import PHASES, Pass

__all__ = ["load_pass", "what_lacks"]

_GROUP = "compile_sparse.passes"


def load_pass(name: str, *, where: str = "") -> type[Pass]:
    """The class of pass ``name``.

    Raises:
        Refusal: CS4101 when no installed package provides it.
        EnvironmentFailure: CS5002 when the package that provides it cannot be imported, or its class is no complete pass.
    """

    def missing(why: str, hint: str) -> Refusal:
        return Refusal("CS4101", f"Pass {name!r} is not available in this version.", where=where, why=why, hint=hint)

    entry = find_entry(_GROUP, name, missing, nearness=0.75)
    found = load_entry(entry, f"Pass {name!r}", "CS5002")
    if problem := what_lacks(name, found):
        raise EnvironmentFailure(
            "CS5002",
            f"What is registered as pass {name!r} is not a complete pass.",
            where=f"entry point {entry.value}",
            why=problem,
            hint="See 'Write a pass' in CONTRIBUTING.md; its author can correct it.",
        )
    return found  # type: ignore[no-any-return]


def what_lacks(name: str, found: object) -> str:
    """What keeps ``found`` from being the class of pass ``name``, a sentence; else empty."""
    if problem := incomplete(name, found, Pass, ("phase", "changes_numerics")):
        return problem
    made = cast(type[Pass], found)
    if made.phase not in PHASES:
        return f"Its phase is {made.phase!r}; phases are {', '.join(PHASES)}."
    if not isinstance(made.changes_numerics, bool):
        return f"Its changes_numerics is {made.changes_numerics!r}, neither True nor False."
    return ""
