"""Each step's change to a tiny decoder, line by line (``goldens.py`` writes the files)."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from compile_sparse.compiler.ir.program import Program
from tests.unit.lowering.goldens import CASES, FOLDER, change


@pytest.mark.parametrize("case", CASES)
def test_change(captured: Callable[[str], Program], case: str) -> None:
    model, step = CASES[case]
    assert change(captured(model), step) == (FOLDER / f"{case}.diff").read_text(encoding="utf-8")
