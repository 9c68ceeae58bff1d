"""Protocol buffers in text, as Triton reads ``config.pbtxt``. Only writing, only what a model configuration needs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Word", "as_text"]

_ESCAPED = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t"}


@dataclass(frozen=True)
class Word:
    """A value of an enumeration, which is written without quotes."""

    name: str


def as_text(message: Mapping[str, Any]) -> str:
    """One field per line, in the order given.

    Args:
        message: field name -> text, number, truth value, ``Word``, message, or a sequence of them for a repeated field.

    Raises:
        TypeError: a value of another type.
    """
    return "".join(f"{line}\n" for line in _lines(message, ""))


def _lines(message: Mapping[str, Any], indent: str) -> Iterator[str]:
    for name, value in message.items():
        if isinstance(value, Mapping):
            yield from _block(name, value, indent)
        elif isinstance(value, Sequence) and not isinstance(value, str):
            if value and all(isinstance(item, Mapping) for item in value):
                for item in value:
                    yield from _block(name, item, indent)
            else:
                yield f"{indent}{name}: [{', '.join(map(_scalar, value))}]"
        else:
            yield f"{indent}{name}: {_scalar(value)}"


def _block(name: str, message: Mapping[str, Any], indent: str) -> Iterator[str]:
    yield f"{indent}{name} {{"
    yield from _lines(message, indent + "  ")
    yield f"{indent}}}"


def _scalar(value: Any) -> str:
    if isinstance(value, Word):
        return value.name
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, str):
        return '"' + "".join(_ESCAPED.get(character, character) for character in value) + '"'
    raise TypeError(f"{type(value).__name__} is no value of a protocol buffer")
