"""Recipes from strangers: bombs, tags and tricks of YAML."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compile_sparse.compiler.errors import UsageError
from compile_sparse.compiler.files.yaml_lines import MAX_BYTES, parse_yaml
from compile_sparse.compiler.recipes.recipe import load_recipe, recipe_from_yaml


def _laughs(levels, width):
    lines = ["a0: &a0 [x]"]
    for level in range(1, levels):
        lines.append(f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * width)}]")
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (_laughs(9, 9), "expands"),  # 72 aliases, 9^8 values
        (_laughs(12, 10), "aliases"),
        ("[" * 50_000, "nested"),
        ("{a: " * 21 + "1" + "}" * 21, "nested"),
        ("\n".join("  " * depth + "a:" for depth in range(30)), "nested"),
        ("a: &a [*a]", "contains itself"),
        ("a: &a {b: *a}", "contains itself"),
        ("x: 1\n" + "#" * MAX_BYTES, "larger"),
        ("[" + ",".join(["1"] * 300_000) + "]", "holds"),
    ],
)
def test_bombs_are_refused_at_once(text, part):
    start = time.perf_counter()
    with pytest.raises(UsageError, match="CS1103") as caught:
        parse_yaml(text)
    assert part in caught.value.why
    assert time.perf_counter() - start < 5.0  # the million characters of two of them, on a busy machine


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system ['touch canary']",
        "passes: !!python/name:os.system",
        "seed: !!binary aGVsbG8=",
        "passes: !custom [a]",
        "a: 1\n<<: {b: 2}",
        "? [a, b]\n: c",
        "1: x",
        "a: 1\n---\nb: 2",
        "a: \x00",
        "&a *a",
        "seed: " + "9" * 10_000,
    ],
)
def test_tags_and_oddities_are_usage_errors(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError):
        recipe_from_yaml(text)
    assert not list(tmp_path.iterdir())


def test_duplicate_keys_name_both_lines():
    with pytest.raises(UsageError, match="CS1104") as caught:
        parse_yaml("a: 1\nb:\n  c: 1\n  c: 2", source="r.yaml")
    assert caught.value.where == "r.yaml:4"
    assert "line 3" in caught.value.why


def test_files_that_are_not_text(tmp_path):
    (tmp_path / "r.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="CS1101"):
        load_recipe(tmp_path / "r.yaml")
    (tmp_path / "big.yaml").write_bytes(b"\xff" * (MAX_BYTES + 1))
    with pytest.raises(UsageError, match="CS1103"):
        load_recipe(tmp_path / "big.yaml")
    with pytest.raises(UsageError, match="CS1101"):
        load_recipe(tmp_path / "missing.yaml")
    with pytest.raises(UsageError, match="CS1101"):
        load_recipe(f"{tmp_path}/.")


@given(st.text(alphabet=st.sampled_from(list("ab:-[]{}&*!|>#\"'\n ,0.~?%@")), max_size=60))
def test_any_text_is_a_document_or_a_usage_error(text):
    try:
        parse_yaml(text)
    except UsageError as error:
        assert error.code in ("CS1102", "CS1103", "CS1104")
