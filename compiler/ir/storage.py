"""How large a program is: bytes as stored, zeros by its masks. And the type it is stored in."""

from __future__ import annotations

from dataclasses import replace

import torch

from compile_sparse.compiler.ir.edit import op_name
from compile_sparse.compiler.ir.nodes import node_argument
from compile_sparse.compiler.ir.program import CODES, Program
from compile_sparse.compiler.ir.weights import DowncastTensor, TensorSource

__all__ = ["bytes_by_tensor", "cast_weights", "stored_bytes", "stored_form", "torch_dtype", "zero_share"]

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def torch_dtype(precision: str) -> torch.dtype:
    """Torch's type for a target's precision."""
    return _DTYPES[precision]


def cast_weights(program: Program, dtype: torch.dtype) -> Program:
    """The program with every trained floating-point tensor rounded to ``dtype``, in which it will be stored.

    It still computes in float32: what a runtime's own arithmetic in a shorter type adds is then visible as the difference to it.
    """
    if dtype == torch.float32:
        return program
    changes = {
        binding.tensor: DowncastTensor(source, dtype)
        for binding in program.bindings.values()
        if binding.kind == "parameter" and (source := program.weights[binding.tensor]).dtype == torch.float32
    }
    return replace(program, weights=program.weights.updated(changes))


def stored_form(source: TensorSource) -> TensorSource:
    """A tensor as it is written."""
    return source.stored() if isinstance(source, DowncastTensor) else source


def stored_bytes(program: Program) -> int:
    """Bytes of all weights as an artifact stores them."""
    return sum(bytes_by_tensor(program).values())


def bytes_by_tensor(program: Program) -> dict[str, int]:
    """Bytes of every bound tensor as an artifact stores it: 4-bit codes take half a byte."""
    four_bit = {
        node_argument(node).name
        for node in program.graph.nodes
        if (op_name(node) == "dequantize_weight" and node.args[4:5] == (4,)) or op_name(node) == "dequantize_nvfp4"
    }
    sizes: dict[str, int] = {}
    for name, binding in program.bindings.items():
        size = program.weights.elements(binding.tensor) * stored_form(program.weights[binding.tensor]).dtype.itemsize
        sizes[binding.tensor] = -(-size // 2) if name in four_bit else size
    return sizes


def zero_share(program: Program) -> float:
    """Share of the parameters that masks hold at zero. A tensor of which a float copy and codes are stored counts once."""
    zeros = {
        name.removesuffix(CODES): mask.fraction * program.weights.elements(name) for name, mask in program.masks.items()
    }
    return sum(zeros.values()) / max(1, program.parameter_count())
