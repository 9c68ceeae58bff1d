"""Text and token files become windows; what cannot be used is refused with the line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from compile_sparse.compiler.errors import UsageError
from compile_sparse.compiler.execution.token_windows import cut_windows, load_tokenizer, read_windows


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """One token per byte; "a" is 66."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(["<s>", *alphabet])}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return made


def read(path: Path, lines: list[Any], **changes: Any) -> list[list[int]]:
    file = path / "data.jsonl"
    file.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    options: dict[str, Any] = {"samples": 100, "length": 8, "vocabulary": 300, "context": 64, "tokenizer": None}
    return read_windows(file, **(options | changes))


def ids(count: int, start: int = 0) -> dict[str, list[int]]:
    return {"input_ids": list(range(start, start + count))}


def test_lines_arecut_windows_and_never_joined(tmp_path: Path) -> None:
    found = read(tmp_path, [ids(19), "", ids(3, 100)])
    assert found == [list(range(8)), list(range(8, 16)), [16, 17, 18], [100, 101, 102]]


def test_a_last_piece_below_a_quarter_is_dropped_but_a_short_line_is_kept(tmp_path: Path) -> None:
    assert [len(window) for window in read(tmp_path, [ids(16 + 3), ids(3)], length=16)] == [16, 3]
    assert [len(window) for window in read(tmp_path, [ids(16 + 4)], length=16)] == [16, 4]


def test_the_beginning_token_starts_every_window_of_text_once(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (a,) = tokenizer.encode("a").ids
    found = read(tmp_path, [{"text": "a" * 10}], tokenizer=tokenizer, beginning=(0,), length=6)
    assert found == [[0] + [a] * 5, [0] + [a] * 5]


def test_token_files_are_taken_as_they_are(tmp_path: Path, tokenizer: Tokenizer) -> None:
    assert read(tmp_path, [ids(3, 5)], beginning=(1,)) == [[5, 6, 7]]
    assert read(tmp_path, [ids(3, 5)], beginning=(1,), tokenizer=tokenizer) == [[5, 6, 7]]


def test_text_becomes_the_tokenizers_ids(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (found,) = read(tmp_path, [{"text": "zażółć"}], tokenizer=tokenizer, length=32)
    assert found == tokenizer.encode("zażółć").ids


def test_samples_are_spread_over_the_file(tmp_path: Path) -> None:
    found = read(tmp_path, [ids(2, 2 * n) for n in range(10)], samples=5)
    assert [window[0] for window in found] == [0, 4, 8, 12, 16]


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("{", "Expecting"),
        ("[" * 200_000, "recursion"),
        ("7", "Expected an object"),
        ({"txt": "a"}, "Expected an object"),
        ({"text": 7}, "Expected an object"),
        ({"input_ids": [1, 2.0]}, "Expected an object"),
        ({"input_ids": [1, True]}, "Expected an object"),
        ({"input_ids": "12"}, "Expected an object"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, tokenizer: Tokenizer, line: Any, part: str) -> None:
    with pytest.raises(UsageError) as caught:
        read(tmp_path, [ids(4), line], tokenizer=tokenizer)
    assert caught.value.code == "CS1031"
    assert caught.value.where == "data.jsonl, line 2"
    assert part in caught.value.why


@pytest.mark.parametrize(("values", "wrong"), [([1, 300], 300), ([-1, 50], -1), ([299, -300, 4], -300)])
def test_an_id_outside_the_vocabulary_is_named(tmp_path: Path, values: list[int], wrong: int) -> None:
    with pytest.raises(UsageError) as caught:
        read(tmp_path, [{"input_ids": values}])
    assert caught.value.code == "CS1031"
    assert caught.value.what.endswith(f": {wrong}.")
    assert "0 to 299" in caught.value.why


@pytest.mark.parametrize("lines", [[], ["", "  "], [{"input_ids": []}], [{"input_ids": [5]}]])
def test_a_file_without_usable_text_is_refused(tmp_path: Path, lines: list[Any]) -> None:
    with pytest.raises(UsageError) as caught:
        read(tmp_path, lines)
    assert caught.value.code == "CS1032"


def test_text_for_a_model_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        read(tmp_path, [{"text": "hello"}])
    assert caught.value.code == "CS1035"
    assert "input_ids" in caught.value.hint


def test_a_length_beyond_the_model_is_refused_and_the_longest_is_not(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        read(tmp_path, [ids(4)], length=65)
    assert caught.value.code == "CS1036"
    assert "64 tokens" in caught.value.why
    assert read(tmp_path, [ids(4)], length=64) == [[0, 1, 2, 3]]


def test_unreadable_files_are_usage_errors(tmp_path: Path) -> None:
    (tmp_path / "latin.jsonl").write_bytes('{"text": "zażółć"}'.encode("iso-8859-2"))
    for name in ("latin.jsonl", "absent.jsonl", "."):
        with pytest.raises(UsageError, match="CS1031"):
            read_windows(tmp_path / name, samples=1, length=8, vocabulary=9, context=8, tokenizer=None)


def test_tokenizers_are_found_absent_or_damaged(tmp_path: Path, tokenizer: Tokenizer) -> None:
    assert load_tokenizer(None) is None
    assert load_tokenizer(tmp_path) is None
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path)
    assert loaded is not None
    assert loaded.encode("ab").ids == tokenizer.encode("ab").ids
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UsageError) as caught:
        load_tokenizer(tmp_path)
    assert caught.value.code == "CS1034"


@given(st.integers(0, 200), st.integers(2, 40), st.booleans())
def test_windows_keep_order_and_bounds(count: int, length: int, with_beginning: bool) -> None:
    tokens = list(range(1000, 1000 + count))
    windows = list(cut_windows(tokens, length, (1,) if with_beginning else ()))
    assert all(2 <= len(window) <= length for window in windows)
    bodies = [window[1:] if with_beginning else window for window in windows]
    kept = [token for body in bodies for token in body]
    assert kept == tokens[: len(kept)]
    # What is dropped is one piece: shorter than a quarter window, or a single token.
    assert len(tokens) - len(kept) < max(2, length // 4 + 1)
    if with_beginning:
        assert all(window[0] == 1 for window in windows)
