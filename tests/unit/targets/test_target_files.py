"""A target file may extend another: what is merged, what replaces, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from compile_sparse.compiler.errors import EnvironmentFailure
from compile_sparse.compiler.targets import target as targets_module
from compile_sparse.compiler.targets.target import Target, load_targets

BASE = """
schema_version: 1
backend: fake
device: cuda
baseline_precision: fp16
alignment: 64
hardware: {memory_gb: 80, bandwidth_gb_s: 2000, dense_tflops: {fp16: 300, int8: 600}, source: a datasheet}
schemes: {w8a8: fast, w4a16: small}
sparse_patterns:
  - {pattern: "2:4", pays: true, why: kernels, min_in_features: 288}
  - {pattern: unstructured, pays: false, why: none, measured: nothing, instead: prune}
"""


@pytest.fixture
def targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """``targets(folder={file: text})``: what is loaded from these folders, in this order."""

    def load(**folders: dict[str, str]) -> dict[str, Target]:
        class Entry:
            def __init__(self, name: str) -> None:
                self.name = name

            def load(self):
                return lambda: tmp_path / self.name

        for folder, files in folders.items():
            (tmp_path / folder).mkdir()
            for name, text in files.items():
                (tmp_path / folder / f"{name}.yaml").write_text(text)
        monkeypatch.setattr(targets_module, "entry_points", lambda group: [Entry(name) for name in folders])
        return dict(load_targets.__wrapped__())

    return load


def test_what_is_extended_is_merged(targets):
    own = """
extends: _base
name: one
summary: One.
alignment: 8
hardware: {memory_gb: 24, dense_tflops: {int8: 250}}
schemes: {w8a8: null, fp8: new}
sparse_patterns:
  - {pattern: unstructured, instead: quantize}
  - {pattern: block, pays: false, why: none, measured: nothing, instead: prune}
"""
    (one,) = targets(ours={"_base": BASE, "one": own}).values()
    assert (one.backend, one.alignment) == ("fake", 8)
    assert (one.hardware.memory_gb, one.hardware.bandwidth_gb_s) == (24, 2000)
    assert one.hardware.dense_tflops == {"fp16": 300, "int8": 250}
    assert one.schemes == {"w4a16": "small", "fp8": "new"}, "null takes out"
    assert [pattern.pattern for pattern in one.sparse_patterns] == ["2:4", "unstructured", "block"]
    assert one.pattern("2:4").min_in_features == 288
    assert (one.pattern("unstructured").why, one.pattern("unstructured").instead) == ("none", "quantize")


def test_a_chain_and_a_base_of_another_package(targets):
    """A package's own file of a name comes before another's: what is extended does not depend on who else is installed."""
    middle = "extends: _base\nalignment: 16\n"
    two = "extends: _middle\nname: two\nsummary: Two.\n"
    three = "extends: two\nname: three\nsummary: Three.\ndevice: cpu\n"
    found = targets(
        first={"_base": BASE, "_middle": middle, "two": two}, second={"_base": "alignment: 1\n", "three": three}
    )
    assert (found["two"].alignment, found["three"].alignment) == (16, 16)
    assert (found["two"].device, found["three"].device) == ("cuda", "cpu")


@pytest.mark.parametrize(
    ("files", "file", "why"),
    [
        ({"a": "extends: _bse\nname: a\n", "_base": BASE}, "a.yaml", "'_bse', which is none of: _base, a"),
        ({"a": "extends: b\n", "b": "extends: a\n"}, "b.yaml", "a -> b -> a"),
        ({"a": "extends: a\n"}, "a.yaml", "a -> a"),
        ({"a": "- a\n"}, "a.yaml", "mapping"),
        ({"a": "a: [\n"}, "a.yaml", ""),
        ({"a": "extends: [b]\n", "b": BASE}, "a.yaml", "['b'], which is none of"),
        ({"b": f"{BASE}\nname: b\nsummary: B.\n", "a": "extends: b\n"}, "a.yaml", "name"),
    ],
)
def test_what_cannot_be_extended_is_said_with_the_file(targets, files, file, why):
    with pytest.raises(EnvironmentFailure, match="CS5001") as caught:
        targets(ours=files)
    assert file in caught.value.what
    assert why in caught.value.why
    assert "ours" in caught.value.where
