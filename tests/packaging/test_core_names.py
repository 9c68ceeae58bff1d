"""The compiler's core knows no runtime by name: what belongs to one lives in its backend's folder."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

CORE = Path(__file__).parents[2] / "compiler"
WORDS = re.compile(r"engine|twin|rtx|tensorrt|vllm|\btrt", re.IGNORECASE)
ALLOWED = {
    "artifact/report.py": ({"twin"}, "a key of report.json, which others read"),
    "cli/tables.py": ({"twin"}, "reads that key"),
    "ir/ops/table.py": (
        {"tensorrt"},
        "says which operators an ONNX dialect has no emitter for; its test alone reads that",
    ),
    "microbench/suggestion.py": (
        {"twin", "tensorrt"},
        "a key of the table's file; a table says that it is not TensorRT's",
    ),
    "microbench/table.py": ({"twin"}, "the same key, and a column of the table"),
    "microbench/probe.py": ({"twin", "tensorrt"}, "the same key; a note says which kernels were not measured"),
}
"""File -> words that stand in it, and why."""


def _words(path: Path) -> set[str]:
    return {word.lower() for word in WORDS.findall(path.read_text(encoding="utf-8"))}


@pytest.mark.parametrize("room", sorted(path.name for path in CORE.iterdir() if path.name != "__pycache__"))
def test_no_runtime_is_named(room: str) -> None:
    files = [CORE / room] if (CORE / room).is_file() else [p for p in (CORE / room).rglob("*") if p.is_file()]
    for path in files:
        if path.suffix == ".pyc":
            continue
        name = path.relative_to(CORE).as_posix()
        assert _words(path) == ALLOWED.get(name, (set(), ""))[0], name


def test_every_exception_is_of_a_file() -> None:
    assert all((CORE / name).is_file() and why for name, (_, why) in ALLOWED.items())
