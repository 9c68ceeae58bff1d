"""Which values an option of a pass accepts, asked of its class."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

__all__ = ["why_not"]


def why_not(field: FieldInfo, value: Any) -> str:
    """Why the field, with its constraints, does not take ``value``: a clause without subject and a full stop; else empty."""
    declared: Any = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
    try:
        TypeAdapter(declared).validate_python(value)
    except ValidationError as error:
        if named := _literals(field.annotation):
            return f"accepts: {', '.join(named)}."
        return f"accepts other values. {error.errors()[0]['msg'].removeprefix('Value error, ')}"
    return ""


def _literals(annotation: Any) -> list[str]:
    """Named values in a type such as ``Literal["a", "b"] | None``; empty for open types."""
    if get_origin(annotation) is Literal:
        return [str(value) for value in get_args(annotation)]
    return [value for part in get_args(annotation) for value in _literals(part)]
