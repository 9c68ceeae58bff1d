"""The order in which work is handed out."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.support.distribution import LONGEST, longest_first, unit_of

ROOT = Path(__file__).parents[2]


def test_what_is_handed_out_first_exists() -> None:
    assert [unit for unit in LONGEST if not (ROOT / unit).exists()] == []


def test_the_longest_come_first_then_files_with_many_tests_and_folders_stay_together() -> None:
    folder = next(unit for unit in LONGEST if not unit.endswith(".py"))
    ids = ["tests/a.py::x", "tests/b.py::x", "tests/b.py::y", f"{folder}/test_one.py::x", f"{LONGEST[0]}::z"]
    ids += [f"{folder}/test_two.py::a", f"{LONGEST[0]}::y"]
    items: list[Any] = [SimpleNamespace(nodeid=name) for name in ids]
    longest_first(items)
    assert [item.nodeid for item in items] == [ids[4], ids[6], ids[3], ids[5], ids[1], ids[2], ids[0]]
    assert unit_of(ids[3]) == unit_of(ids[5])
