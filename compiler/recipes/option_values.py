"""Which values an option of a pass or of a backend accepts, asked of its class."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

__all__ = ["declared_type", "literals", "why_not"]


def why_not(field: FieldInfo, value: Any) -> str:
    """Why the field, with its constraints, does not take ``value``: a clause without subject and a full stop; else empty."""
    try:
        TypeAdapter(declared_type(field)).validate_python(value)
    except ValidationError as error:
        if named := literals(field.annotation):
            return f"accepts: {', '.join(named)}."
        return f"accepts other values. {error.errors()[0]['msg'].removeprefix('Value error, ')}"
    return ""


def declared_type(field: FieldInfo) -> Any:
    """The field's type with its constraints, as an annotation."""
    return Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation


def literals(annotation: Any) -> list[str]:
    """Named values in a type such as ``Literal["a", "b"] | None``; empty for open types."""
    if get_origin(annotation) is Literal:
        return [str(value) for value in get_args(annotation)]
    return [value for part in get_args(annotation) for value in literals(part)]
