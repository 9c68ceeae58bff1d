"""Raise a residual addition that feeds a norm.

    total = add(x, r); rms_norm(total, w, eps)  ->  (normed, total) = residual_rms_norm(x, r, w, eps)

Shapes of ``x`` and ``r`` are equal (no broadcasting). When one sum feeds several norms the first is fused and the others
read the returned sum.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from compile_sparse.compiler.extension.pass_contract import PassResult
from compile_sparse.compiler.ir.edit import schema_arguments
from compile_sparse.compiler.ir.nodes import dimensions, insert_call, is_op, module_of, same_dimension
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.lowering.steps import raised

__all__ = ["RaiseResidualNorm"]


@dataclass(frozen=True)
class RaiseResidualNorm:
    """See the module."""

    name: ClassVar[str] = "raise residual_rms_norm"

    def run(self, program: Program, context: object = None) -> PassResult:
        """Replace every match; norms are those that ``RaiseRmsNorm`` made."""
        edited, count = program.clone(), 0
        for norm in list(edited.graph.nodes):
            if is_op(norm, "compile_sparse::rms_norm") and _is_plain_sum(norm.args[0]):
                _fuse(edited.graph, norm)
                count += 1
        return raised(program, edited, count)


def _fuse(graph: fx.Graph, norm: fx.Node) -> None:
    given = schema_arguments(norm)
    total, weight, eps = given["x"], given["weight"], given["eps"]
    value, normed = total.meta["val"], norm.meta["val"]
    # At the sum, not at the norm: other readers of the sum may come before the norm.
    with graph.inserting_after(total):
        fused = graph.call_function(torch.ops.compile_sparse.residual_rms_norm.default, (*total.args[:2], weight, eps))
    fused.meta.update(module_of(norm), val=(normed, value))
    with graph.inserting_after(fused):
        summed = insert_call(graph, operator.getitem, (fused, 1), value=value)
        first = insert_call(graph, operator.getitem, (fused, 0), value=normed)
    norm.replace_all_uses_with(first)
    graph.erase_node(norm)
    total.replace_all_uses_with(summed)
    graph.erase_node(total)


def _is_plain_sum(node: Any) -> bool:
    if not is_op(node, "aten::add"):
        return False
    given = schema_arguments(node)
    left, right = given["self"], given["other"]
    if given["alpha"] != 1 or not (isinstance(left, fx.Node) and isinstance(right, fx.Node)):
        return False
    a, b = dimensions(left), dimensions(right)
    return len(a) == len(b) >= 2 and all(same_dimension(x, y) for x, y in zip(a, b, strict=True))
