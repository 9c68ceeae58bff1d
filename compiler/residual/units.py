"""What depth pruning removes: blocks, or branches of one kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.residual.branches import Branch, find_blocks

__all__ = ["Unit", "UnitKind", "find_units"]

UnitKind = Literal["block", "attention", "mlp"]


@dataclass(frozen=True)
class Unit:
    """A piece that goes or stays as one.

    Attributes:
        layer: index of its block.
        branches: its residual branches.
        start: node that holds the stream before it.
        end: node that holds the stream after it; None for a single branch, after which the stream is ``start`` plus its output.
    """

    layer: int
    branches: tuple[Branch, ...]
    start: str
    end: str | None = None


def find_units(program: Program, kind: UnitKind) -> list[Unit]:
    """Units of ``kind`` in graph order."""
    blocks = find_blocks(program)
    if kind == "block":
        return [Unit(block.branches[0].layer, block.branches, block.start, block.end) for block in blocks]
    branches = (branch for block in blocks for branch in block.branches)
    return [Unit(branch.layer, (branch,), branch.skip) for branch in branches if branch.kind == kind]
