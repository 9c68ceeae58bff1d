"""YAML from people, read safely: plain data plus the line every value stands on.

Only the composer of PyYAML is used (no constructors), so no tag in a file can build an object. Limits are checked on the event
stream, before anything is nested in memory: size, depth, number of aliases; and on the expanded tree, because a few aliases
can still multiply ("billion laughs").

Plain scalars follow YAML 1.2: ``2:4`` is text (YAML 1.1 reads it as the number 124, in base 60) and so is ``no`` (a slice
may be Norwegian).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import yaml

from compile_sparse.compiler.errors import UsageError

__all__ = ["Document", "Location", "parse_yaml", "read_yaml"]

MAX_BYTES = 1_000_000
MAX_DEPTH = 20
MAX_ALIASES = 100
MAX_VALUES = 10_000

Location = tuple[str | int, ...]
"""Keys and indices from the root to a value."""

_PREFIX = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    """Safe loader with the plain-scalar rules of YAML 1.2."""

    yaml_implicit_resolvers: ClassVar[dict[str, list[tuple[str, re.Pattern[str]]]]] = {}  # type: ignore[misc]


for _tag, _pattern, _first in (
    ("bool", r"(?:true|True|TRUE|false|False|FALSE)\Z", "tTfF"),
    ("int", r"[-+]?[0-9]+\Z", "-+0123456789"),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?\Z", "-+.0123456789"),
    ("null", r"(?:~|null|Null|NULL|)\Z", ["~", "n", "N", ""]),
):
    _Loader.add_implicit_resolver(_PREFIX + _tag, re.compile(_pattern), list(_first))


@dataclass(frozen=True)
class Document:
    """Parsed YAML.

    Attributes:
        data: dictionaries, lists, text, numbers, booleans, None.
        lines: location of a value -> line, counted from 1. The line of a mapping entry is its key's.
        source: file name for messages.
    """

    data: Any
    lines: dict[Location, int] = field(default_factory=dict)
    source: str = "recipe"

    def where(self, location: Location) -> str:
        """``file:line`` of a location, or of the nearest enclosing value that has one."""
        for length in range(len(location), -1, -1):
            line = self.lines.get(location[:length])
            if line is not None:
                return f"{self.source}:{line}"
        return self.source


def read_yaml(path: Path) -> Document:
    """Read one YAML file.

    Raises:
        UsageError: CS1101 when the file cannot be read; otherwise as ``parse_yaml``.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
        text = raw.decode("utf-8")
    except OSError as error:
        raise UsageError("CS1101", "The recipe cannot be read.", where=str(path), why=str(error.strerror)) from error
    except UnicodeDecodeError as error:
        if len(raw) <= MAX_BYTES:
            raise UsageError("CS1101", "The recipe is not UTF-8 text.", where=str(path), why=str(error)) from error
        text = " " * len(raw)
    return parse_yaml(text, source=str(path))


def parse_yaml(text: str, *, source: str = "recipe") -> Document:
    """Parse one YAML document.

    Raises:
        UsageError: CS1102 malformed, CS1103 a limit is exceeded, CS1104 a key appears twice.
    """
    if len(text.encode("utf-8")) > MAX_BYTES:
        raise _limit(f"It is larger than {MAX_BYTES:,} bytes.", source)
    try:
        _check_events(text, source)
        node = _Loader(text).get_single_node()
        document = Document(None, {}, source)
        if node is None:
            return document
        builder = _Builder(document)
        return Document(builder.build(node, ()), document.lines, source)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UsageError(
            "CS1102", "The recipe is not valid YAML.", where=f"{source}{line}", why=str(error.problem or error)
        ) from error
    except yaml.YAMLError as error:
        raise UsageError("CS1102", "The recipe is not valid YAML.", where=source, why=str(error)) from error


def _check_events(text: str, source: str) -> None:
    depth = aliases = values = 0
    for event in yaml.parse(text, Loader=_Loader):
        values += isinstance(event, yaml.NodeEvent)
        where = f"{source}:{event.start_mark.line + 1}" if event.start_mark else source
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                raise _limit(f"It is nested deeper than {MAX_DEPTH} levels.", where)
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        elif isinstance(event, yaml.AliasEvent):
            aliases += 1
            if aliases > MAX_ALIASES:
                raise _limit(f"It uses more than {MAX_ALIASES} aliases.", where)
        if values > 2 * MAX_VALUES:  # keys are events too; the exact count follows when aliases are expanded
            raise _limit(f"It holds more than {MAX_VALUES:,} values.", where)


def _limit(why: str, where: str) -> UsageError:
    return UsageError("CS1103", "The recipe exceeds a limit.", where=where, why=why)


class _Builder:
    """Turns composed nodes into plain data, noting lines and counting what aliases expand to."""

    def __init__(self, document: Document) -> None:
        self._document = document
        self._values = 0
        self._open: set[int] = set()

    def build(self, node: yaml.Node, location: Location) -> Any:
        line = node.start_mark.line + 1
        where = f"{self._document.source}:{line}"
        self._document.lines.setdefault(location, line)
        self._values += 1
        if self._values > MAX_VALUES:
            raise _limit(f"It expands to more than {MAX_VALUES:,} values.", where)
        if id(node) in self._open:
            raise _limit("An alias contains itself.", where)
        if len(location) > MAX_DEPTH:
            raise _limit(f"It is nested deeper than {MAX_DEPTH} levels.", where)
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, where)
        self._open.add(id(node))
        try:
            if isinstance(node, yaml.SequenceNode) and node.tag == _PREFIX + "seq":
                return [self.build(child, (*location, index)) for index, child in enumerate(node.value)]
            if isinstance(node, yaml.MappingNode) and node.tag == _PREFIX + "map":
                return dict(self._entries(node, location))
        finally:
            self._open.discard(id(node))
        raise UsageError("CS1102", "The recipe is not valid YAML.", where=where, why=f"Tag {node.tag!r} is refused.")

    def _entries(self, node: yaml.MappingNode, location: Location) -> Iterator[tuple[str, Any]]:
        seen: dict[str, int] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            where = f"{self._document.source}:{line}"
            key = self._scalar(key_node, where) if isinstance(key_node, yaml.ScalarNode) else None
            if not isinstance(key, str):
                raise UsageError(
                    "CS1102", "The recipe is not valid YAML.", where=where, why="Keys must be text.", hint="Quote it."
                )
            if key in seen:
                raise UsageError(
                    "CS1104", f"Key {key!r} appears twice.", where=where, why=f"It is first given on line {seen[key]}."
                )
            seen[key] = line
            self._document.lines[(*location, key)] = line
            yield key, self.build(value_node, (*location, key))

    def _scalar(self, node: yaml.ScalarNode, where: str) -> Any:
        kind = node.tag.removeprefix(_PREFIX)
        try:
            if kind == "str":
                return node.value
            if kind == "int":
                return int(node.value)
            if kind == "float":
                return float(node.value)
        except ValueError as error:
            raise UsageError("CS1102", "The recipe is not valid YAML.", where=where, why=str(error)) from error
        if kind == "bool":
            return node.value.lower() == "true"
        if kind == "null":
            return None
        raise UsageError("CS1102", "The recipe is not valid YAML.", where=where, why=f"Tag {node.tag!r} is refused.")
