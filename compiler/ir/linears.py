"""Find the matrix products with a stored weight, whatever they are called in the graph."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from compile_sparse.compiler.diagnostics import Diagnostic
from compile_sparse.compiler.ir.edit import op_name
from compile_sparse.compiler.ir.program import Program

__all__ = ["Linear", "find_linears", "is_lm_head"]

# Operator -> (argument index of the input, of the weight, contraction dimension of the weight).
FORMS = {"linear": (0, 1, 1), "addmm": (1, 2, 0), "mm": (0, 1, 0), "matmul": (0, 1, 0)}
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
    """One matrix product ``x @ W`` or ``x @ W.T`` with a stored weight.

    Attributes:
        node: the call.
        input: node of ``x``.
        weight: placeholder of ``W``.
        tensor: stored name of ``W``.
        axis: contraction dimension of ``W`` (1 for ``[N, K]``, 0 for ``[K, N]``).
    """

    node: fx.Node
    input: fx.Node
    weight: fx.Node
    tensor: str
    axis: int


def find_linears(program: Program) -> tuple[list[Linear], list[Diagnostic]]:
    """Every linear in graph order, and the products that look like one but are left alone."""
    found: list[Linear] = []
    skips: list[Diagnostic] = []
    for node in program.graph.nodes:
        form = FORMS.get(op_name(node)) if node.op == "call_function" else None
        if form is None:
            continue
        source, weight = node.args[form[0]], node.args[form[1]]
        tensor = program.tensor_of(weight) if isinstance(weight, fx.Node) else None
        if tensor is None or not isinstance(source, fx.Node):
            if op_name(node) in ("linear", "addmm"):
                skips.append(
                    Diagnostic(
                        node.name, "CS2202", "Its weight is computed, not stored.", "It stays in floating point."
                    )
                )
        elif program.bindings[weight.name].kind == "parameter" and len(program.weights[tensor].shape) == 2:
            found.append(Linear(node, source, weight, tensor, form[2]))
    return found, skips


def is_lm_head(program: Program, node: fx.Node) -> bool:
    """Whether ``node``'s result becomes the logits without passing through another weight."""
    wanted = {n for n, output in zip(program.output_nodes, program.outputs, strict=True) if output.role == "logits"}
    while node not in wanted:
        users = list(node.users)
        if len(users) != 1 or op_name(users[0]) not in TRANSPARENT:
            return False
        node = users[0]
    return True
