"""Messages as plain data and back: what fits is the same, what does not is named."""

from __future__ import annotations

import inspect
import json
import math
from dataclasses import dataclass, field
from typing import Annotated, get_args

import pytest

from compile_sparse.compiler.runtimes import messages
from compile_sparse.compiler.runtimes.messages import Round, Rounds
from compile_sparse.compiler.runtimes.wire import Least, MalformedMessage, Request, read, to_line


@dataclass(frozen=True)
class Part:
    name: str
    share: float = 1.0


@dataclass(frozen=True)
class Whole(Request[Part], operation="whole"):
    count: Annotated[int, Least(1)]
    sizes: Annotated[list[Annotated[int, Least(0)]], Least(2)]
    parts: dict[str, list[Part]] = field(default_factory=dict)
    note: str | None = None
    exact: bool = False
    rest: object = None


GIVEN = Whole(3, [0, 5], {"a": [Part("x", 0.5), Part("y", math.inf)]}, None, True, [1, "z"])


def test_there_and_back() -> None:
    assert read(Whole, json.loads(to_line(vars(GIVEN)))) == GIVEN


def test_defaults_fill_in_and_strange_fields_are_left_out() -> None:
    assert read(Whole, {"count": 1, "sizes": [1, 2], "new": True}) == Whole(1, [1, 2])


def test_not_a_number_and_whole_numbers_are_numbers() -> None:
    assert math.isnan(read(Part, json.loads(to_line({"name": "", "share": math.nan}))).share)
    assert isinstance(read(Part, {"name": "", "share": 2}).share, float)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"count": 0}, "field 'count' must be an integer of at least 1, got 0"),
        ({"count": None}, "field 'count' must be an integer, got None"),
        ({"count": True}, "field 'count' must be an integer, got True"),
        ({"count": "3"}, "field 'count' must be an integer, got '3'"),
        ({"count": 3.0}, "field 'count' must be an integer, got 3.0"),
        ({"sizes": [1]}, "field 'sizes' must be a list of at least 2, got [1]"),
        ({"sizes": [1, -1]}, "field 'sizes[1]' must be an integer of at least 0, got -1"),
        ({"sizes": {}}, "field 'sizes' must be a list, got {}"),
        ({"parts": {"a": [{"share": 1.0}]}}, "field \"parts['a'][0].name\" must be a string, got None"),
        ({"parts": []}, "field 'parts' must be an object, got []"),
        ({"note": 5}, "field 'note' must be a string, got 5"),
        ({"exact": 1}, "field 'exact' must be true or false, got 1"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, object], said: str) -> None:
    with pytest.raises(MalformedMessage) as caught:
        read(Whole, {"count": 1, "sizes": [1, 2], **change})
    assert str(caught.value) == said


@pytest.mark.parametrize("value", [None, [], "text", 3])
def test_a_message_that_is_no_object(value: object) -> None:
    with pytest.raises(MalformedMessage, match="an object"):
        Whole(1, [1, 2]).read_reply(value)


def test_a_handler_reads_the_request_and_gives_the_reply() -> None:
    handler = Whole.handled_by(lambda request, report: Part(f"{request.count} of {request.sizes}"))
    assert handler.operation == "whole"
    assert handler.answer({"count": 1, "sizes": [1, 2]}, lambda done, total: None) == Part("1 of [1, 2]")


def test_replies_nest() -> None:
    rounds = Rounds({"a": [Round(1.0, 2.0, [0.5, 1.5])]})
    assert read(Rounds, json.loads(to_line(vars(rounds)))) == rounds


REQUESTS = [kind for _, kind in inspect.getmembers(messages, inspect.isclass) if issubclass(kind, Request)]


def test_every_operation_has_one_request() -> None:
    defined = [kind for kind in REQUESTS if kind is not Request]
    assert len({kind.operation for kind in defined}) == len(defined) >= 11
    assert all(get_args(kind.__orig_bases__[0]) for kind in defined)  # type: ignore[attr-defined]
