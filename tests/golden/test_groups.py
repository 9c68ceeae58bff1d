"""The groups of a tiny Llama, as printed. A change here is a change of what may be pruned: review it, then update the file."""

from __future__ import annotations

from pathlib import Path

from compile_sparse.compiler.axes.analysis import analyse
from compile_sparse.compiler.axes.groups import format_groups
from compile_sparse.compiler.ir.program import Program


def test_groups_of_a_tiny_llama(tiny_llama_program: Program) -> None:
    printed = format_groups(analyse(tiny_llama_program).groups)
    assert printed == (Path(__file__).parent / "llama_groups.txt").read_text(encoding="utf-8")
