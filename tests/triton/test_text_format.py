"""What is written is what protobuf reads."""

from __future__ import annotations

import pytest
from google.protobuf import text_format
from hypothesis import given
from hypothesis import strategies as st

from compile_sparse.backends.triton.text_format import Word, as_text
from tests.triton.protobuf import parsed


@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=20), st.integers(0, 2**31 - 1))
def test_strings_and_numbers_survive(name: str, batch: int) -> None:
    found = parsed(as_text({"name": name, "max_batch_size": batch}))
    assert (found.name, found.max_batch_size) == (name, batch)


@pytest.mark.parametrize("name", ['a"b', "a\\b", "a\nb", "a\tb", "a: 1\nbackend: 'x'"])
def test_nothing_breaks_out_of_a_string(name: str) -> None:
    found = parsed(as_text({"name": name}))
    assert found.name == name and not found.backend


def test_nested_and_repeated_messages() -> None:
    message = {
        "input": [
            {"name": "a", "data_type": Word("TYPE_BOOL"), "dims": [1, -1], "optional": True},
            {"name": "b", "dims": [1], "reshape": {"shape": []}},
        ],
        "dynamic_batching": {},
        "model_transaction_policy": {"decoupled": True},
    }
    found = parsed(as_text(message))
    assert [list(entry.dims) for entry in found.input] == [[1, -1], [1]]
    assert found.input[1].HasField("reshape") and not found.input[0].HasField("reshape")
    assert found.HasField("dynamic_batching") and found.model_transaction_policy.decoupled


@pytest.mark.parametrize(
    "message", [{"no_such_field": 1}, {"max_batch_size": "many"}, {"input": [{"data_type": Word("TYPE_X")}]}]
)
def test_protobuf_refuses_what_is_no_configuration(message: dict[str, object]) -> None:
    """The other tests can fail: unknown fields, wrong types and unknown words do not parse."""
    with pytest.raises(text_format.ParseError):
        parsed(as_text(message))


def test_other_values_are_refused() -> None:
    with pytest.raises(TypeError, match="set"):
        as_text({"name": {1}})
