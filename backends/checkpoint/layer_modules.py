"""Which module of a checkpoint's class computes which GEMM of the program: found by the weight both read."""

from __future__ import annotations

from collections import Counter

from compile_sparse.backends.checkpoint.checkpoint import stored_names
from compile_sparse.compiler.ir.gemms import gemm_of
from compile_sparse.compiler.ir.nodes import traced_module
from compile_sparse.compiler.ir.program import Program

__all__ = ["layer_modules"]

_WEIGHT = ".weight"


def layer_modules(program: Program) -> dict[str, str]:
    """GEMM or convolution of an unquantized program -> path of its module in the written checkpoint.

    Left out: weights that several GEMMs or no module's ``weight`` hold, such as experts in one tensor.

    Raises:
        Refusal: CS42xx, the program has no checkpoint.
    """
    names, found = stored_names(program), {}
    for node in program.graph.nodes:
        gemm = gemm_of(node)
        if gemm is None:
            continue
        name = names.get(program.tensor_of(gemm.weight) or "", "")
        if len(gemm.weight.users) > 1:  # tied: the name is that of the embedding, and the module another
            found[node.name] = traced_module(node)
        elif name.endswith(_WEIGHT):
            found[node.name] = name.removesuffix(_WEIGHT)
    uses = Counter(found.values())
    return {node: module for node, module in found.items() if module and uses[module] == 1}
