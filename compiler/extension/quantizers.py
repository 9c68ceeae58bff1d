"""Installed quantizers: entry-point group ``compile_sparse.quantizers``."""

from __future__ import annotations

from compile_sparse.compiler.errors import EnvironmentFailure, UsageError
from compile_sparse.compiler.extension.entry_points import find_entry, incomplete, load_entry
from compile_sparse.compiler.extension.quantizer_contract import Quantizer

__all__ = ["find_quantizer", "what_lacks"]

_GROUP = "compile_sparse.quantizers"


def find_quantizer(name: str) -> Quantizer:
    """An instance of the quantizer called ``name``.

    Raises:
        UsageError: CS1129 when no installed package provides it, with the nearest name.
        EnvironmentFailure: CS5013 when the package that provides it cannot be imported, or its class is no complete quantizer.
    """

    def missing(why: str, hint: str) -> UsageError:
        return UsageError("CS1129", f"There is no quantizer {name!r}.", where="--quantizer", why=why, hint=hint)

    entry = find_entry(_GROUP, name, missing)
    found = load_entry(entry, f"Quantizer {name!r}", "CS5013")
    if problem := what_lacks(name, found):
        raise EnvironmentFailure(
            "CS5013",
            f"What is registered as quantizer {name!r} is not a complete quantizer.",
            where=f"entry point {entry.value}",
            why=problem,
            hint="See examples/gptq_quantizer.py; its author can correct it.",
        )
    made: Quantizer = found()
    return made


def what_lacks(name: str, found: object) -> str:
    """What keeps ``found`` from being the class of quantizer ``name``, a sentence; else empty."""
    return incomplete(name, found, Quantizer, ("needs_statistics",))
