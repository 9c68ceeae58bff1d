"""What a line holds is told by its keys; what is wrong with one, by its number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from compile_sparse.compiler.errors import UsageError
from compile_sparse.compiler.verify.evaluation.lines import read_lines, spread


def written(path: Path, *entries: Any) -> Path:
    file = path / "x.jsonl"
    file.write_text("\n".join(each if isinstance(each, str) else json.dumps(each) for each in entries) + "\n")
    return file


KINDS: dict[str, Any] = {
    "text": {"text": "a", "source": "ignored"},
    "pairs": {"query": "a", "document": "b"},
    "labels": {"text": "a", "text_pair": "b", "label": "yes"},
    "words": {"tokens": ["a", "b"], "labels": [0, 1]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds(kind: str, tmp_path: Path) -> None:
    (line, other) = read_lines(written(tmp_path, KINDS[kind], "", KINDS[kind]))
    assert line.kind == kind
    assert other.where == "x.jsonl, line 3"
    if kind == "labels":
        assert (line.first, line.second, line.label) == ("a", "b", "yes")


@pytest.mark.parametrize(
    "wrong",
    [
        "{",
        [1],
        {"words": "a"},
        {"text": 1},
        {"query": "a"},
        {"query": "a", "document": ["b"]},
        {"text": "a", "label": [1, 2]},
        {"text": "a", "text_pair": 3},
        {"tokens": ["a", "b"], "labels": [1]},
        {"tokens": "a b", "labels": [1]},
        {"input_ids": []},
        {"input_ids": [1.5]},
        {"query": "a", "document": "b"},  # right, and another kind than the first line
    ],
)
def test_a_wrong_line_is_named(wrong: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        read_lines(written(tmp_path, {"text": "right"}, {"text": "right"}, wrong))
    assert (caught.value.code, caught.value.where) == ("CS1031", "x.jsonl, line 3")


def test_an_empty_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="CS1032"):
        read_lines(written(tmp_path, ""))
    with pytest.raises(UsageError, match="CS1031"):
        read_lines(tmp_path / "absent.jsonl")


def test_samples_are_spread() -> None:
    assert spread(list(range(10)), 4) == [0, 2, 5, 7]
    assert spread([1, 2], 4) == [1, 2]
