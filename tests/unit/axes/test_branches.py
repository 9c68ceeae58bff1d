"""Residual branches of every architecture: without one, a model computes what it computes with that branch at zero."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.residual.branches import Branch, find_branches
from compile_sparse.compiler.residual.remove import drop_branches
from compile_sparse.testing.models import MODELS, example_inputs
from compile_sparse.testing.oracles import interpret, relative_error, tolerance

WITHOUT = frozenset[str]()
"""Models whose graph has no residual branch."""


def silenced(program: Program, branch: Branch) -> Program:
    """The dense program with the branch's contribution multiplied by zero: nothing is removed, nothing is renumbered."""
    edited = program.clone()
    output = edited.node(branch.output)
    with edited.graph.inserting_after(output):
        zero = edited.graph.call_function(torch.ops.aten.mul.Scalar, (output, 0.0))
    output.replace_all_uses_with(zero, delete_user_cb=lambda user: user is not zero)
    zero.meta["val"] = output.meta["val"]
    edited.graph_module.recompile()
    return edited


@pytest.mark.parametrize("name", list(MODELS))
def test_a_branch_less_is_a_branch_at_zero(name: str, captured: Callable[[str], Program]) -> None:
    program = captured(name)
    branches = find_branches(program)
    assert bool(branches) == (name not in WITHOUT)
    for kind in dict.fromkeys(branch.kind for branch in branches):
        branch = next(b for b in branches if b.kind == kind)
        dropped = drop_branches(program, [branch]).program
        assert dropped.parameter_count() < program.parameter_count()
        kept = sorted({entry.layer for entry in program.inputs if entry.layer >= 0} - set(branch.caches))
        for batch, length in ((2, 7), (3, 4)):
            inputs = example_inputs(program, batch, length)
            dense = {
                (entry.role, entry.layer, entry.name if entry.layer < 0 else ""): inputs[entry.name]
                for entry in program.inputs
            }
            small = {
                entry.name: dense[
                    entry.role, kept[entry.layer] if entry.layer >= 0 else -1, entry.name if entry.layer < 0 else ""
                ]
                for entry in dropped.inputs
            }
            wanted = interpret(silenced(program, branch), inputs)
            found = interpret(dropped, small)
            for output in (o for o in dropped.outputs if o.layer < 0):
                assert relative_error(found[output.name], wanted[output.name]) <= tolerance(program), (
                    kind,
                    output.name,
                )
