"""Typed messages between the compiler and a process of its own: one JSON object per line.

    request   {"id": n, "op": "...", ...}
    progress  {"event": "progress", "id": n, "done": k, "total": m}
    reply     {"id": n, "ok": true, "result": {...}}
    failure   {"id": n, "ok": false, "error": {"type": "...", "message": "..."}}

A request is a dataclass derived from ``Request[Reply]``; both sides use that one class, so that neither can send what the other
does not read. Standard library only: a runtime's own interpreter imports this file too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Generic, Self, TypeVar, Union, get_args, get_origin, get_type_hints

__all__ = ["Handler", "Least", "MalformedMessage", "Report", "Request", "read", "to_line"]

Report = Callable[[int, int], None]
"""Told how much is done, and of how much."""
Reply = TypeVar("Reply")
T = TypeVar("T")

_NAMES = {int: "an integer", float: "a number", str: "a string", bool: "true or false", list: "a list"}


class MalformedMessage(ValueError):
    """A message is not of the form its type says; the text names the field."""


@dataclass(frozen=True)
class Least:
    """``Annotated[int, Least(1)]``: the smallest number, or the shortest list, that a field may hold."""

    value: int


@dataclass(frozen=True)
class Handler:
    """What answers one operation: from a request's plain fields to a reply, a dataclass."""

    operation: str
    answer: Callable[[Mapping[str, object], Report], object]


class Request(Generic[Reply]):
    """Base of requests: ``@dataclass(frozen=True) class Load(Request[Loaded], operation="load")``.

    A message's fields are numbers, strings, booleans, lists, string-keyed dicts and dataclasses of such, or one of them or None.
    """

    operation: ClassVar[str]
    _reply: ClassVar[type[Any]]

    def __init_subclass__(cls, operation: str) -> None:
        cls.operation = operation
        (cls._reply,) = get_args(cls.__orig_bases__[0])  # type: ignore[attr-defined]  # PEP 560 sets it

    def read_reply(self, result: object) -> Reply:
        """The reply to this request out of plain data.

        Raises:
            MalformedMessage: it has another form.
        """
        reply: Reply = read(self._reply, result)
        return reply

    @classmethod
    def handled_by(cls, handle: Callable[[Self, Report], Reply]) -> Handler:
        """Answer requests of this class with ``handle``."""
        return Handler(cls.operation, lambda given, report: handle(read(cls, given), report))


def to_line(message: Mapping[str, object]) -> str:
    """JSON of a message, dataclasses within it as objects. Not-a-number and infinities are written as Python reads them."""
    return json.dumps(message, default=vars)


def read(kind: type[T], value: object) -> T:
    """A message of type ``kind`` out of plain data; fields it does not know are left out.

    Raises:
        MalformedMessage: a field is missing or something else.
    """
    found: T = _read(kind, value, "")
    return found


def _read(kind: Any, value: object, where: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        found, (least,) = _read(arguments[0], value, where), arguments[1:]
        if (len(found) if isinstance(found, list) else found) < least.value:
            raise _wrong(kind, value, where)
        return found
    if origin in (Union, UnionType):
        (some,) = (option for option in arguments if option is not NoneType)
        return None if value is None else _read(some, value, where)
    if kind is object:
        return value
    if origin is list and isinstance(value, list):
        return [_read(arguments[0], item, f"{where}[{place}]") for place, item in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {name: _read(arguments[1], item, f"{where}[{name!r}]") for name, item in value.items()}
    if is_dataclass(kind) and isinstance(value, Mapping):
        return _read_fields(kind, value, where)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)  # JSON writes 1.0 as 1 in other languages than ours
    if isinstance(kind, type) and isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    raise _wrong(kind, value, where)


def _read_fields(kind: Any, value: Mapping[str, object], where: str) -> Any:
    given = {}
    for name, hint, needed in _fields(kind):
        if needed or name in value:
            given[name] = _read(hint, value.get(name), f"{where}.{name}" if where else name)
    return kind(**given)


@cache
def _fields(kind: Any) -> tuple[tuple[str, Any, bool], ...]:
    """Name, type and whether it is needed, of each field."""
    hints = get_type_hints(kind, include_extras=True)
    return tuple((f.name, hints[f.name], f.default is MISSING and f.default_factory is MISSING) for f in fields(kind))


def _wrong(kind: Any, value: object, where: str) -> MalformedMessage:
    wanted, least = kind, ""
    if get_origin(kind) is Annotated:
        wanted, bound = get_args(kind)
        least = f" of at least {bound.value}"
    name = _NAMES.get(get_origin(wanted) or wanted, "an object")
    return MalformedMessage(f"field {where!r} must be {name}{least}, got {value!r}" if where else f"it must be {name}")
