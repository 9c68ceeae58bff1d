"""Targets are data: every built-in file is valid, and unknown names list the nearest."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from compile_sparse.backends.targets import folder
from compile_sparse.compiler.errors import EnvironmentFailure, UsageError
from compile_sparse.compiler.targets import target as targets_module
from compile_sparse.compiler.targets.target import Target, find_target, load_targets

BUILT_IN = [path.stem for path in sorted(folder().glob("*.yaml")) if not path.stem.startswith("_")]


def test_every_built_in_file_is_registered_under_its_name():
    assert set(BUILT_IN) <= set(load_targets())
    assert not [name for name in load_targets() if name.startswith("_")], "they are there to be extended"


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_target_that_gains_nothing_says_why_and_what_instead(name):
    for pattern in find_target(name).sparse_patterns:
        assert pattern.why
        assert pattern.pays or (pattern.measured and pattern.instead)


def test_unknown_names_list_the_nearest():
    with pytest.raises(UsageError, match="CS1001") as caught:
        find_target("ort-cpux")
    assert "Did you mean ort-cpu" in caught.value.hint


def test_the_most_specific_pattern_wins():
    null = find_target("null")
    assert null.pattern("2:4").pays
    assert not null.pattern("unstructured").pays
    assert null.pattern("1:4") is None
    assert find_target("ort-cpu").pattern("2:4").pattern == "N:M"


def test_unknown_keys_are_errors(tmp_path, monkeypatch):
    data = find_target("null").model_dump()
    with pytest.raises(ValidationError, match="sparce"):
        Target.model_validate(data | {"sparce_patterns": []})
    (tmp_path / "bad.yaml").write_text("name: bad\n")

    class Entry:
        name = "third-party"

        def load(self):
            return lambda: tmp_path

    monkeypatch.setattr(targets_module, "entry_points", lambda group: [Entry()])
    with pytest.raises(EnvironmentFailure, match="third-party"):
        load_targets.__wrapped__()
