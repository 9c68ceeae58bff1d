"""Installed passes: entry-point group ``compile_sparse.passes``, and the order of phases."""

from __future__ import annotations

import difflib
from importlib.metadata import EntryPoint, entry_points

from pydantic import BaseModel

from compile_sparse.compiler.errors import EnvironmentFailure, Refusal

__all__ = ["PHASES", "installed_passes", "load_pass", "phase_of_name"]

PHASES = ("structural", "depth", "low-rank", "masks", "recovery", "quantization")
"""Order of phases. Shapes first, then zeros, then integers: each later phase would undo or hide an earlier one's freedom."""

_PHASE_OF_NAME = {
    "prune-layers": "depth",
    "low-rank": "low-rank",
    "mask": "masks",
    "recover": "recovery",
    "quantize": "quantization",
    "quantize-cache": "quantization",
}


def phase_of_name(name: str) -> str | None:
    """Phase of a pass that command-line shorthand can name, without importing it; None for other passes."""
    return _PHASE_OF_NAME.get(name) or ("structural" if name.startswith("prune-") else None)


def installed_passes() -> dict[str, EntryPoint]:
    """Entry points by pass name, sorted."""
    return {entry.name: entry for entry in sorted(entry_points(group="compile_sparse.passes"), key=lambda e: e.name)}


def load_pass(name: str, *, where: str = "") -> type[BaseModel]:
    """The class of pass ``name``.

    Raises:
        Refusal: CS4101 when no installed package provides it.
        EnvironmentFailure: CS5002 when the package that provides it cannot be imported.
    """
    installed = installed_passes()
    if name not in installed:
        near = difflib.get_close_matches(name, installed, n=1, cutoff=0.75)
        raise Refusal(
            "CS4101",
            f"Pass {name!r} is not available in this version.",
            where=where,
            why=f"Installed passes: {', '.join(installed) or 'none'}.",
            hint=f"Did you mean {near[0]!r}?" if near else "Leave it out, or install a package that provides it.",
        )
    try:
        found = installed[name].load()
    except (ImportError, AttributeError) as error:
        raise EnvironmentFailure(
            "CS5002",
            f"Pass {name!r} cannot be imported.",
            where=f"entry point {installed[name].value}",
            why=f"{type(error).__name__}: {error}",
            hint="Reinstall the package that provides it.",
        ) from error
    if not (isinstance(found, type) and issubclass(found, BaseModel)):
        raise EnvironmentFailure(
            "CS5002",
            f"Pass {name!r} is not a pydantic model class.",
            where=f"entry point {installed[name].value}",
            hint="See 'write a pass' in CONTRIBUTING.md.",
        )
    return found
