"""How large a program is: bytes as stored, zeros by its masks. And the type it is stored in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from types import MappingProxyType

import torch

from compile_sparse.compiler.ir.edit import op_name
from compile_sparse.compiler.ir.nodes import node_argument
from compile_sparse.compiler.ir.program import CODES, Program
from compile_sparse.compiler.ir.weights import DowncastTensor, TensorSource
from compile_sparse.compiler.targets.target import Precision

__all__ = [
    "bytes_by_tensor",
    "cast_weights",
    "commonest_type",
    "precision_of",
    "stored_bytes",
    "stored_form",
    "stored_types",
    "torch_dtype",
    "zero_share",
]

_NOTHING: Mapping[str, torch.dtype] = MappingProxyType({})
_DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def torch_dtype(precision: Precision) -> torch.dtype:
    """Torch's type for a target's precision."""
    return _DTYPES[precision]


def precision_of(dtype: torch.dtype | None) -> Precision | None:
    """A target's precision for torch's type; None where there is none."""
    return next((name for name, each in _DTYPES.items() if each == dtype), None)


def cast_weights(program: Program, dtype: torch.dtype, kept: Mapping[str, torch.dtype] = _NOTHING) -> Program:
    """The program with every trained floating-point tensor rounded to ``dtype``, in which it will be stored.

    It still computes in float32: what a runtime's own arithmetic in a shorter type adds is then visible as the difference to it.

    Args:
        program: computes in float32.
        dtype: of trained tensors.
        kept: tensors, trained or not, that are stored in a type of their own; names that the program does not have are ignored.
    """
    types = {b.tensor: dtype for b in program.bindings.values() if b.kind == "parameter"}
    types |= {b.tensor: kept[b.tensor] for b in program.bindings.values() if b.tensor in kept}
    changes = {
        name: DowncastTensor(source, storage)
        for name, storage in types.items()
        if storage != torch.float32 and (source := program.weights[name]).dtype == torch.float32
    }
    return replace(program, weights=program.weights.updated(changes))


def stored_types(program: Program) -> dict[str, torch.dtype]:
    """The types that the source's weight files have, for what was read from them; none for programs from elsewhere."""
    found = {name: getattr(program.weights[name], "stored_dtype", None) for name in program.weights}
    return {name: dtype for name, dtype in found.items() if dtype is not None and dtype in _DTYPES.values()}


def commonest_type(sizes: Iterable[tuple[torch.dtype, int]]) -> torch.dtype | None:
    """The floating-point type that most elements have, of ``(type, elements)``; None without any."""
    total: dict[torch.dtype, int] = {}
    for dtype, elements in sizes:
        if dtype.is_floating_point:
            total[dtype] = total.get(dtype, 0) + elements
    return max(total, key=lambda dtype: total[dtype], default=None)


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
