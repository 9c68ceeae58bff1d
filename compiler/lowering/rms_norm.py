"""Raise root-mean-square norms.

    mul(w, mul(x, rsqrt(add(mean(pow(x, 2), -1), eps))))  ->  rms_norm(x, w, eps)

``x: [..., H]`` float32, ``w: [H]`` a weight. Half precision is left alone: there the written form rounds to half before the
weight is applied, and the raised operator does not. Zero-centred weights (``1 + w``) match after capture folded the addition.
Source: arXiv:1910.07467.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from compile_sparse.compiler.diagnostics import Diagnostic
from compile_sparse.compiler.extension.pass_contract import PassResult
from compile_sparse.compiler.ir.edit import schema_arguments
from compile_sparse.compiler.ir.nodes import dimensions, insert_call, is_op, module_of, operand_pairs
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.lowering.steps import raised

__all__ = ["RaiseRmsNorm"]


@dataclass(frozen=True)
class RaiseRmsNorm:
    """See the module."""

    name: ClassVar[str] = "raise rms_norm"

    def run(self, program: Program, context: object = None) -> PassResult:
        """Replace every match; a reciprocal root that is no norm of this form gives CS2301."""
        edited, count = program.clone(), 0
        graph = edited.graph
        roots: set[fx.Node] = set()
        for node in list(graph.nodes):
            found = _match(node) if is_op(node, "aten::mul") else _match_whole(node)
            if found is None:
                continue
            x, weight, eps, root = found
            if root is not None:
                roots.add(root)
            with graph.inserting_before(node):
                norm = insert_call(
                    graph, torch.ops.compile_sparse.rms_norm.default, (x, weight, eps), value=node.meta["val"]
                )
            norm.meta.update(module_of(node))
            node.replace_all_uses_with(norm)
            count += 1
        why = "A reciprocal square root is not part of a recognised RMS norm; it runs as single operators."
        others = [node for node in graph.nodes if is_op(node, "aten::rsqrt") and node not in roots]
        return raised(program, edited, count, [Diagnostic(node.name, "CS2301", why) for node in others])


def _match(node: fx.Node) -> tuple[fx.Node, fx.Node, float, fx.Node | None] | None:
    for weight, scaled in operand_pairs(node):
        if not (_is_vector(weight) and is_op(scaled, "aten::mul")):
            continue
        for x, root in operand_pairs(scaled):
            eps = _epsilon(x, root)
            if eps is not None and dimensions(x)[-1] == dimensions(weight)[0]:
                return x, weight, eps, root
    return None


def _match_whole(node: fx.Node) -> tuple[fx.Node, fx.Node, float, fx.Node | None] | None:
    """``torch.nn.RMSNorm`` keeps one ATen operator."""
    if not is_op(node, "aten::rms_norm"):
        return None
    given = schema_arguments(node)
    if len(given["normalized_shape"]) != 1 or given["weight"] is None or given["eps"] is None:
        return None
    return given["input"], given["weight"], float(given["eps"]), None


def _is_vector(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "placeholder" and len(dimensions(node)) == 1


def _epsilon(x: Any, root: Any) -> float | None:
    """eps when ``root`` is the reciprocal root of x's mean square, else None."""
    if not (isinstance(x, fx.Node) and is_op(root, "aten::rsqrt") and is_op(root.args[0], "aten::add")):
        return None
    if x.meta["val"].dtype != torch.float32:
        return None
    mean, eps = root.args[0].args[:2]
    if not (is_op(mean, "aten::mean") and isinstance(eps, float)):
        return None
    given = schema_arguments(mean)
    last = len(dimensions(x)) - 1
    if list(given["dim"] or ()) not in ([-1], [last]) or not given["keepdim"]:
        return None
    square = given["self"]
    if is_op(square, "aten::pow") and square.args[0] is x and square.args[1] == 2:
        return eps
    return eps if is_op(square, "aten::mul") and square.args[0] is x and square.args[1] is x else None
