"""Raise the written-out tanh form of GELU.

    0.5 * x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x^3)))  ->  gelu(x, approximate="tanh")

Source: arXiv:1606.08415.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from compile_sparse.compiler.extension.pass_contract import PassResult
from compile_sparse.compiler.ir.nodes import is_op, operand_pairs
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.lowering.steps import raised

__all__ = ["RaiseGelu"]


@dataclass(frozen=True)
class RaiseGelu:
    """See the module."""

    name: ClassVar[str] = "raise gelu"

    def run(self, program: Program, context: object = None) -> PassResult:
        """Replace every match."""
        edited, count = program.clone(), 0
        graph = edited.graph
        for node in list(graph.nodes):
            x = _match(node)
            if x is None:
                continue
            with graph.inserting_before(node):
                gelu = graph.call_function(torch.ops.aten.gelu.default, (x,), {"approximate": "tanh"})
            gelu.meta["val"] = node.meta["val"]
            node.replace_all_uses_with(gelu)
            count += 1
        return raised(program, edited, count)


def _match(node: fx.Node) -> fx.Node | None:
    if not is_op(node, "aten::mul"):
        return None
    for half, gate in operand_pairs(node):
        x = _scaled(half, "aten::mul", 0.5)
        tanh = _scaled(gate, "aten::add", 1.0)
        if x is None or tanh is None or not is_op(tanh, "aten::tanh"):
            continue
        argument = _scaled(tanh.args[0], "aten::mul", math.sqrt(2.0 / math.pi))
        if (
            argument is not None
            and is_op(argument, "aten::add")
            and any(a is x and _is_cubic(b, x) for a, b in operand_pairs(argument))
        ):
            return x
    return None


def _scaled(node: Any, name: str, constant: float) -> fx.Node | None:
    """The other operand when one operand of ``node`` is ``constant``."""
    if not is_op(node, name):
        return None
    for value, number in operand_pairs(node):
        if isinstance(value, fx.Node) and isinstance(number, float) and math.isclose(number, constant, rel_tol=1e-7):
            return value
    return None


def _is_cubic(node: Any, x: fx.Node) -> bool:
    cube = _scaled(node, "aten::mul", 0.044715)
    return cube is not None and is_op(cube, "aten::pow") and cube.args == (x, 3)
