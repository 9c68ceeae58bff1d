"""Which values an option of a pass accepts, asked of its class."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

__all__ = ["accepts", "literals"]


def accepts(field: FieldInfo, value: Any) -> bool:
    """Whether the field, with its constraints, takes ``value``."""
    declared: Any = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
    try:
        TypeAdapter(declared).validate_python(value)
    except ValidationError:
        return False
    return True


def literals(annotation: Any) -> list[str]:
    """Named values in a type such as ``Literal["a", "b"] | None``; empty for open types."""
    if get_origin(annotation) is Literal:
        return [str(value) for value in get_args(annotation)]
    return [value for part in get_args(annotation) for value in literals(part)]
