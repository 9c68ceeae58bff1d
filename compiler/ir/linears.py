"""Find the linear layers: GEMMs with a stored weight, whatever they are called in the graph."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from compile_sparse.compiler.diagnostics import Diagnostic
from compile_sparse.compiler.ir.edit import op_name
from compile_sparse.compiler.ir.gemms import LAYERS, gemm_of
from compile_sparse.compiler.ir.program import Program

__all__ = ["Linear", "find_linears", "is_lm_head"]

TRANSPARENT = {
    "reshape",
    "transpose",
    "permute",
    "unsqueeze",
    "squeeze",
    "slice",
    "select",
    "mul",
    "div",
    "tanh",
    "to",
    "_to_copy",
}


@dataclass(frozen=True)
class Linear:
    """One GEMM ``x @ W`` or ``x @ W.T`` with a stored weight.

    Attributes:
        node: the call.
        input: node of ``x``.
        weight: placeholder of ``W``.
        tensor: stored name of ``W``.
        axis: contraction dimension of ``W`` (1 for ``[N, K]``, 0 for ``[K, N]``).
        bias: node of what is added to the result; None when nothing is.
    """

    node: fx.Node
    input: fx.Node
    weight: fx.Node
    tensor: str
    axis: int
    bias: fx.Node | None


def find_linears(program: Program) -> tuple[list[Linear], list[Diagnostic]]:
    """Every linear layer in graph order, and the GEMMs that look like one but are left alone."""
    found: list[Linear] = []
    diagnostics: list[Diagnostic] = []
    for node in program.graph.nodes:
        gemm = gemm_of(node)
        if gemm is None or not gemm.is_layer:
            continue
        tensor = program.tensor_of(gemm.weight)
        if tensor is None:
            if LAYERS[gemm.operator].bias:  # the others multiply activations as often as not
                why = "Its weight is computed, not stored."
                diagnostics.append(Diagnostic(node.name, "CS2202", why, "It stays in floating point."))
        elif program.bindings[gemm.weight.name].kind == "parameter" and len(program.weights[tensor].shape) == 2:
            found.append(Linear(node, gemm.input, gemm.weight, tensor, gemm.axis, gemm.bias))
    return found, diagnostics


def is_lm_head(program: Program, node: fx.Node) -> bool:
    """Whether ``node`` is the lm_head: its result becomes the logits without passing through another weight."""
    wanted = {n for n, output in zip(program.output_nodes, program.outputs, strict=True) if output.role == "logits"}
    while node not in wanted:
        users = list(node.users)
        if len(users) != 1 or op_name(users[0]) not in TRANSPARENT:
            return False
        node = users[0]
    return True
