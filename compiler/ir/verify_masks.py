"""Whether masked tensors still hold the zeros that their annotations promise. Reads weights, one tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from compile_sparse.compiler.ir.edit import op_name, schema_arguments
from compile_sparse.compiler.ir.nodes import operator_of
from compile_sparse.compiler.ir.ops.quantization import WEIGHT_DEQUANTIZERS
from compile_sparse.compiler.ir.program import CODES, Program, SparsityMask
from compile_sparse.compiler.ir.sparsity_pattern import SparsityPattern
from compile_sparse.compiler.ir.verifier import InvalidProgram
from compile_sparse.compiler.ir.weights import WeightStore

__all__ = ["verify_masks"]


def verify_masks(program: Program, *, after: str = "capture", before: Program | None = None) -> None:
    """Check rule 7 of ``compiler/ir/verifier.py``: every masked tensor keeps its zeros, and its annotation.

    Codes are zero where they stand for zero: 0, either zero of floating-point codes, the zero point where there is one.
    Tensors without values (a plan) are not read. The program must be valid otherwise (``verify_program``).

    Args:
        program: what to check.
        after: name of the pass that made it.
        before: the program that pass was given; its masks must be there still, on the tensor or on its codes, unless the
            tensor is gone.

    Raises:
        InvalidProgram: naming the tensor, what is violated and the pass.
    """
    for tensor, mask in before.masks.items() if before is not None else ():
        lost = _lost(program, tensor, mask)
        if lost:
            raise InvalidProgram(f"after {after}: rule 7 broken at {tensor}: {lost}")
    for tensor, mask in program.masks.items():
        source = program.weights[tensor]
        if not WeightStore({tensor: source}).has_values:
            continue
        pattern = SparsityPattern.parse(mask.pattern)
        for zero in _zeros(program, tensor):
            broken = pattern.violation(zero, mask.axis, mask.fraction)
            if broken:
                raise InvalidProgram(f"after {after}: rule 7 broken at {tensor}: {mask.pattern}, but {broken}")


def _lost(program: Program, tensor: str, mask: SparsityMask) -> str:
    for name in (tensor, tensor + CODES):
        now = program.masks.get(name)
        if name in program.weights and now is None:
            return f"the mask {mask.pattern} of {name} is no longer annotated"
        if now is not None and (now.pattern, now.axis) != (mask.pattern, mask.axis):
            return f"the mask {mask.pattern} along {mask.axis} has become {now.pattern} along {now.axis}"
    return ""


def _zeros(program: Program, tensor: str) -> Iterator[torch.Tensor]:
    """Where the tensor is zero, once per way of reading it."""
    value = program.weights.load(tensor)
    nodes = [n for n in program.graph.nodes if n.op == "placeholder" and program.tensor_of(n) == tensor]
    readers = [user for node in nodes for user in node.users]
    dequantizers = [reader for reader in readers if op_name(reader) in WEIGHT_DEQUANTIZERS]
    for reader in dequantizers:
        yield _dequantized_with_unit_scales(program, reader, value) == 0
    if len(dequantizers) < len(readers) or not readers:
        yield value == 0


def _dequantized_with_unit_scales(program: Program, reader: fx.Node, codes: torch.Tensor) -> torch.Tensor:
    """What a dequantize node gives when every scale is one: zero exactly where the codes stand for zero."""
    given = schema_arguments(reader)
    for name in ("scale", "global_scale"):
        if name in given:
            fake = given[name].meta["val"]
            given[name] = torch.ones(fake.shape).to(fake.dtype)
    if isinstance(zero := given.get("zero_point"), fx.Node):
        given["zero_point"] = program.weights.load(program.bindings[zero.name].tensor)
    given["q" if "q" in given else "codes"] = codes
    value = operator_of(reader)(**given)
    assert isinstance(value, torch.Tensor)
    return value
