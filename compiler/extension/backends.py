"""Installed backends: entry-point group ``compile_sparse.backends``, and the options each of them declares."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import EntryPoint
from typing import TYPE_CHECKING, Any, cast

from pydantic import ValidationError

from compile_sparse.compiler.errors import EnvironmentFailure, UsageError
from compile_sparse.compiler.extension.backend_options import BackendOptions
from compile_sparse.compiler.extension.entry_points import find_entry, installed, load_entry
from compile_sparse.compiler.files.validation_errors import explained

if TYPE_CHECKING:
    from compile_sparse.compiler.extension.backend_contract import Backend
    from compile_sparse.compiler.targets.target import Target

__all__ = ["declared_options", "find_backend", "flag_of", "options_for"]

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

    return cast("Backend", _loaded(find_entry(_GROUP, target.backend, missing))())


def declared_options(*, verify: bool = False) -> dict[str, type[BackendOptions]]:
    """Options by backend, sorted; backends without options are left out.

    Args:
        verify: those of ``compile-sparse verify`` instead of those of a compilation.

    Raises:
        EnvironmentFailure: CS5006 when a backend cannot be imported.
    """
    attribute = "verify_options" if verify else "options"
    found = {name: getattr(_loaded(entry), attribute, BackendOptions) for name, entry in installed(_GROUP).items()}
    return {name: model for name, model in found.items() if model.model_fields}


def options_for(target: Target, given: Mapping[str, Any], *, verify: bool = False) -> BackendOptions:
    """``given`` as options of the target's backend. None asks for nothing, and so does another backend's flag that is off.

    Raises:
        UsageError: CS1046 one of them is another backend's, CS1105 none has it, or a wrong value.
    """
    declared = declared_options(verify=verify)
    model = declared.get(target.backend, BackendOptions)
    asked = {name: value for name, value in given.items() if value is not None}
    for name in [name for name in asked if name not in model.model_fields]:
        owner = next((other for other in declared.values() if name in other.model_fields), None)
        if owner is not None and asked[name] is False:
            del asked[name]
        elif owner is not None:
            why, hint = owner.elsewhere
            raise UsageError(
                "CS1046", f"{flag_of(name)} means nothing on {target.name}.", where=flag_of(name), why=why, hint=hint
            )
    try:
        return model.model_validate(asked)
    except ValidationError as error:
        raise explained(error, model, None, subject=f"options of {target.name}") from error


def flag_of(name: str) -> str:
    """The command line's flag for the option ``name``."""
    return "--" + name.replace("_", "-")


def _loaded(entry: EntryPoint) -> Any:
    return load_entry(entry, f"Backend {entry.name!r}", "CS5006")
