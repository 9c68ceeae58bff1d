"""A quantized weight in a graph: its stored tensors, and the operator that makes the float weight of them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from compile_sparse.compiler.ir.graph_edits import Edits
from compile_sparse.compiler.ir.program import CODES
from compile_sparse.compiler.ir.quantization_schemes import WeightFormat
from compile_sparse.compiler.ir.weights import TensorSource

__all__ = ["add_dequantized"]

ours = torch.ops.compile_sparse


def add_dequantized(
    edits: Edits,
    place: fx.Node,
    weight: fx.Node,
    tensor: str,
    fmt: WeightFormat,
    axis: int,
    made: Mapping[str, TensorSource],
) -> fx.Node:
    """Store the parts of a weight, and dequantize them in front of ``place``.

    Args:
        edits: of the graph.
        place: the first node that will read the weight.
        weight: placeholder of the float weight, whose name the new ones begin with.
        tensor: stored name of the float weight.
        fmt: its format.
        axis: its contraction dimension.
        made: ``codes``, ``scale`` and, where the format has them, ``zero_point`` or ``global_scale``.

    Returns:
        The dequantize node.
    """

    def buffer(part: str) -> fx.Node:
        return edits.placeholder(f"{weight.name}_{part}", f"{tensor}.{part}", made[part])

    codes = edits.placeholder(f"{weight.name}_codes", tensor + CODES, made["codes"], "parameter")
    scale = buffer("scale")
    transposed = () if axis == 1 else (axis,)
    if fmt.kind == "fp4":
        whole = buffer("global_scale")
        return edits.before(place, ours.dequantize_nvfp4.default, codes, scale, whole, *transposed)
    if fmt.block:
        return edits.before(place, ours.dequantize_block.default, codes, scale, fmt.block, *transposed)
    zero = () if fmt.symmetric else (buffer("zero_point"),)
    return edits.before(place, ours.dequantize_weight.default, codes, scale, axis, fmt.group, fmt.bits, *zero)
