"""A quantized program with its activations left in floating point."""

from __future__ import annotations

from torch import fx

from compile_sparse.compiler.ir.edit import eliminate_dead_code, op_name
from compile_sparse.compiler.ir.program import Program

__all__ = ["with_float_activations"]


def with_float_activations(program: Program) -> Program:
    """The program without its ``fake_quantize`` nodes; itself when it has none. Weights stay quantized."""
    if not any(op_name(node) == "fake_quantize" for node in program.graph.nodes):
        return program
    edited = program.clone()
    for node in edited.graph.nodes:
        if op_name(node) == "fake_quantize" and isinstance(value := node.args[0], fx.Node):
            node.replace_all_uses_with(value)
    return eliminate_dead_code(edited)
