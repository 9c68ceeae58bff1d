"""How large a program is: bytes as stored, zeros by its masks."""

from __future__ import annotations

from compile_sparse.compiler.editing import op_name
from compile_sparse.compiler.program import Program

__all__ = ["bytes_by_tensor", "stored_bytes", "zero_share"]


def stored_bytes(program: Program) -> int:
    """Bytes of all weights as an artifact stores them."""
    return sum(bytes_by_tensor(program).values())


def bytes_by_tensor(program: Program) -> dict[str, int]:
    """Bytes of every bound tensor as an artifact stores it: 4-bit codes take half a byte."""
    four_bit = {
        node.args[0].name
        for node in program.graph.nodes
        if op_name(node) == "dequantize_weight" and node.args[4:5] == (4,)
    }
    sizes: dict[str, int] = {}
    for name, binding in program.bindings.items():
        size = program.weights.nbytes(binding.tensor)
        sizes[binding.tensor] = -(-size // 2) if name in four_bit else size
    return sizes


def zero_share(program: Program) -> float:
    """Share of the parameters that masks hold at zero."""
    zeros = sum(mask.fraction * program.weights.elements(name) for name, mask in program.masks.items())
    return zeros / max(1, program.parameter_count())
