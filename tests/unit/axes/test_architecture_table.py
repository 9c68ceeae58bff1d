"""The committed table of architectures is what the analysis finds today."""

from __future__ import annotations

from collections.abc import Callable

from compile_sparse.compiler.ir.program import Program
from tests.unit.axes.architecture_table import TABLE, architecture_table


def test_the_committed_table_is_current(captured: Callable[[str], Program]) -> None:
    assert architecture_table(captured) == TABLE.read_text(encoding="utf-8"), "run 'make architectures' and review it"
