"""Validation errors in words: which file, which line, which key was probably meant."""

from __future__ import annotations

import difflib
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from compile_sparse.compiler.errors import UsageError
from compile_sparse.compiler.files.yaml_lines import Document, Location

__all__ = ["explained"]


def explained(
    error: ValidationError, model: type[BaseModel], document: Document | None, *, prefix: Location = (), subject: str
) -> UsageError:
    """A ``UsageError`` (CS1105) for the first problem in ``error``.

    Args:
        error: what pydantic found.
        model: the class that was validated; its field names are the candidates for a misspelt key.
        document: gives lines; None when the values came from flags or Python.
        prefix: location of the validated value inside the document.
        subject: what was validated, as the message names it ("recipe", "pass prune-channels").
    """
    problems = error.errors(include_url=False)
    first = problems[0]
    location: Location = tuple(first["loc"])
    named = ".".join(str(part) for part in location) or subject
    hint = ""
    if first["type"] == "extra_forbidden":
        valid = _fields_at(model, location[:-1])
        near = difflib.get_close_matches(str(location[-1]), valid, n=1, cutoff=0.4)
        why = f"{subject} has no key {location[-1]!r}. Valid keys: {', '.join(valid) or 'none'}."
        hint = f"Did you mean {near[0]!r}?" if near else ""
    elif first["type"] == "missing":
        why = f"{named} is required."
    else:
        why = first["msg"].removeprefix("Value error, ").rstrip(".") + f"; found {_shown(first['input'])}."
    if len(problems) > 1:
        why += f" ({len(problems) - 1} more.)"
    where = document.where((*prefix, *location)) if document else ""
    return UsageError(
        "CS1105", f"{named} is not valid in the {subject}.", where=where or f"{subject}: {named}", why=why, hint=hint
    )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _fields_at(model: type[BaseModel], location: Location) -> list[str]:
    """Field names of the model that owns ``location``, following nested models, tuples and optionals."""
    current: type[BaseModel] | None = model
    for part in location:
        if current is None:
            return []
        if isinstance(part, str):
            field = current.model_fields.get(part)
            current = _model_in(field.annotation) if field else None
    return list(current.model_fields) if current else []


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for arg in get_args(annotation) if (found := _model_in(arg))), None)
