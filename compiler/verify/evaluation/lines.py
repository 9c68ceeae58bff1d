"""Evaluation files of text, line by line: what each holds is told by its keys, and all lines hold the same.

========  ==================================================================================
kind      a line
========  ==================================================================================
text      ``{"text": ...}``, with ``"text_pair"`` for models that read two; or ``{"input_ids": [...]}``
pairs     ``{"query": ..., "document": ...}``
labels    ``{"text": ..., "label": ...}``, with or without ``"text_pair"``; a name, a class number or a number
words     ``{"tokens": [...], "labels": [...]}``: words and one label for each
========  ==================================================================================
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from compile_sparse.compiler.errors import UsageError

__all__ = ["Kind", "Line", "read_lines", "spread"]

T = TypeVar("T")
Kind = Literal["text", "pairs", "labels", "words"]
_FORMS: Mapping[Kind, str] = {
    "text": '{"text": "..."} or {"input_ids": [...]}',
    "pairs": '{"query": "...", "document": "..."}',
    "labels": '{"text": "...", "label": ...}, with "text_pair" where two texts are read',
    "words": '{"tokens": ["...", ...], "labels": [...]}',
}


@dataclass(frozen=True)
class Line:
    """One line.

    Attributes:
        where: file and line number.
        kind: what it holds.
        first: the text, query, words or token ids.
        second: the other text or document.
        label: as written.
    """

    where: str
    kind: Kind
    first: str | tuple[str, ...] | tuple[int, ...]
    second: str | None = None
    label: Any = None


def read_lines(path: Path) -> list[Line]:
    """All lines that are not blank.

    Raises:
        UsageError: CS1031 unreadable, not JSON, of no known form, or of another form than the first line; CS1032 nothing in it.
    """
    lines = list(_lines(path))
    if not lines:
        forms = "; ".join(_FORMS.values())
        raise UsageError("CS1032", "The evaluation file is empty.", where=path.name, why="It has no line.", hint=forms)
    for line in lines:
        if line.kind != lines[0].kind:
            raise UsageError(
                "CS1031",
                "An evaluation file holds lines of different kinds.",
                where=line.where,
                why=f"It has {line.kind}, the first line has {lines[0].kind}.",
                hint=f"Make them all like {_FORMS[lines[0].kind]}, or two files of it.",
            )
    return lines


def spread(items: list[T], samples: int) -> list[T]:
    """At most ``samples`` of them, evenly spaced: the same ones on every machine, and not only the first."""
    return items if len(items) <= samples else [items[i * len(items) // samples] for i in range(samples)]


def _lines(path: Path) -> Iterator[Line]:
    try:
        with path.open(encoding="utf-8") as stream:
            for number, text in enumerate(stream, 1):
                if text.strip():
                    yield _line(text, f"{path.name}, line {number}")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            "CS1031", "The file cannot be read.", where=path.name, why=str(error), hint="Check the path; use UTF-8."
        ) from error


def _line(text: str, where: str) -> Line:
    try:
        entry: Any = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise _malformed(where, f"It is not JSON: {error}.") from error
    if not isinstance(entry, dict):
        raise _malformed(where, "It is no JSON object.")
    if "query" in entry or "document" in entry:
        query, document = entry.get("query"), entry.get("document")
        if not (isinstance(query, str) and isinstance(document, str)):
            raise _malformed(where, 'A pair has "query" and "document", both text.')
        return Line(where, "pairs", query, document)
    if "tokens" in entry:
        return _words(entry, where)
    return _text(entry, where)


def _words(entry: Mapping[str, Any], where: str) -> Line:
    words, labels = entry["tokens"], entry.get("labels", entry.get("label"))
    if not (isinstance(words, list) and words and all(isinstance(word, str) and word for word in words)):
        raise _malformed(where, '"tokens" is a list of words.')
    if not (isinstance(labels, list) and len(labels) == len(words)):
        raise _malformed(where, f'"labels" is a list with one label for each of the {len(words)} words.')
    return Line(where, "words", tuple(words), label=labels)


def _text(entry: Mapping[str, Any], where: str) -> Line:
    ids = entry.get("input_ids")
    if isinstance(ids, list) and ids and all(type(each) is int for each in ids):
        return Line(where, "labels" if "label" in entry else "text", tuple(ids), label=entry.get("label"))
    first, second = entry.get("text"), entry.get("text_pair")
    if not isinstance(first, str) or not (second is None or isinstance(second, str)):
        raise _malformed(where, "It holds no text, no token ids and no pair.")
    if "label" not in entry:
        return Line(where, "text", first, second)
    if not isinstance(entry["label"], (str, int, float)):
        raise _malformed(where, "A label is one name or number; several labels per text are not supported.")
    return Line(where, "labels", first, second, entry["label"])


def _malformed(where: str, why: str) -> UsageError:
    return UsageError(
        "CS1031", "A line is of no known form.", where=where, why=why, hint=f"Lines are {'; '.join(_FORMS.values())}."
    )
