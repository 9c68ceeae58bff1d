"""The legal IR, and the verifier that runs after every pass in tests and with ``--verify-each``.

1. Nodes are placeholders, calls of torch operators (or ``operator`` functions on sizes and tuples) and one output.
2. Every placeholder is bound to a stored tensor or is a declared input, and carries a value of the stored shape and dtype.
3. Outputs match the declared outputs in number.
4. Every tensor-valued call has a fake value, and running the call on its inputs' fake values gives the same shape and dtype
   (of a dequantized weight: the same shape, and any floating-point type).
5. Nothing is dead.
6. Integer codes are dequantized by matching scales; a mask annotation names a stored tensor, and its pattern and axis fit it.
7. Masked tensors hold the zeros of their pattern, and no pass forgets a mask. This one reads weights:
   ``compiler/ir/verify_masks.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from compile_sparse.compiler.ir.edit import fake_mode_of, is_pure, op_name, schema_arguments
from compile_sparse.compiler.ir.fake_propagation import FakeError, fake_result
from compile_sparse.compiler.ir.ops.quantization import NVFP4_GROUP, WEIGHT_DEQUANTIZERS
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.ir.sizes import same_size, shape_of
from compile_sparse.compiler.ir.sparsity_pattern import SparsityPattern

__all__ = ["InvalidProgram", "verify_program"]


class InvalidProgram(RuntimeError):
    """A pass broke the IR. Always a defect of the pass, never of the user's model."""


Broken: TypeAlias = Callable[[int, object, str], InvalidProgram]
"""``broken(rule, where, why)``: the error to raise, with the name of the pass in it."""


def verify_program(program: Program, *, after: str = "capture") -> None:
    """Check rules 1 to 6.

    Raises:
        InvalidProgram: naming the rule, the node and the pass it came ``after``.
    """

    def broken(rule: int, where: object, why: str) -> InvalidProgram:
        return InvalidProgram(f"after {after}: rule {rule} broken at {where}: {why}")

    program.graph.lint()
    _check_placeholders(program, broken)
    results = program.output_nodes
    if len(results) != len(program.outputs):
        raise broken(3, "output", f"{len(results)} values, {len(program.outputs)} declared")
    mode = fake_mode_of(program)
    for node in program.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        if node.op != "call_function" or not _legal_target(node.target):
            raise broken(1, node.name, f"{node.op} of {node.target}")
        if not node.users and is_pure(node):
            raise broken(5, node.name, "nobody uses it")
        _check_call(node, mode, broken)
    for name in program.masks:
        _check_mask(program, name, broken)


def _legal_target(target: Any) -> bool:
    return isinstance(target, torch._ops.OpOverload) or (
        callable(target) and getattr(target, "__module__", "") in ("_operator", "math", "torch", "builtins")
    )


def _check_placeholders(program: Program, broken: Broken) -> None:
    declared = {i.placeholder for i in program.inputs}
    for node in program.graph.nodes:
        if node.op != "placeholder":
            continue
        binding = program.bindings.get(node.name)
        if binding is None:
            if node.name not in declared:
                raise broken(2, node.name, "neither a weight nor an input")
            continue
        if binding.tensor not in program.weights:
            raise broken(2, node.name, f"bound to {binding.tensor!r}, which is not stored")
        source, value = program.weights[binding.tensor], node.meta.get("val")
        if value is None or tuple(value.shape) != source.shape or value.dtype != source.dtype:
            raise broken(2, node.name, f"value is {value}, stored {binding.tensor!r} is {source.shape} {source.dtype}")
    names = [node.name for node in program.graph.nodes if node.op == "placeholder"]
    missing = (declared | set(program.bindings)) - set(names)
    if missing:
        raise broken(2, sorted(missing), "declared but not in the graph")


def _check_call(node: fx.Node, mode: FakeTensorMode, broken: Broken) -> None:
    recorded = node.meta.get("val")
    if recorded is None:
        raise broken(4, node.name, "it has no fake value")
    try:
        computed = fake_result(node, mode, lambda source: source.meta["val"])
    except FakeError as error:
        raise broken(4, node.name, f"it cannot run on its inputs: {error}") from error
    dequantizes = op_name(node) in WEIGHT_DEQUANTIZERS
    if dequantizes:
        _check_scales(node, broken)
    pairs = _tensors(recorded), _tensors(computed)
    if len(pairs[0]) != len(pairs[1]):
        raise broken(4, node.name, f"{len(pairs[0])} tensors recorded, its inputs give {len(pairs[1])}")
    for before, now in zip(*pairs, strict=True):
        # Mixed precision: a runtime dequantizes into the type of the GEMM that reads the weight, whatever its scales have.
        same_type = before.dtype == now.dtype or (dequantizes and before.dtype.is_floating_point)
        if not same_type or not _same_shape(before, now):
            raise broken(
                4,
                node.name,
                f"recorded {tuple(before.shape)} {before.dtype}, its inputs give {tuple(now.shape)} {now.dtype}",
            )


def _check_scales(node: fx.Node, broken: Broken) -> None:
    given = {name: a.meta["val"] if isinstance(a, fx.Node) else a for name, a in schema_arguments(node).items()}
    codes, scale, axis = given["q" if "q" in given else "codes"], given["scale"], given["axis"]
    channels, depth = codes.shape[1 - axis], codes.shape[axis]
    stored: tuple[torch.dtype, ...] = (torch.int8, torch.float8_e4m3fn)
    wanted: tuple[int, ...]
    if "block" in given:
        wanted, stored = (-(-channels // given["block"]), -(-depth // given["block"])), (torch.float8_e4m3fn,)
    elif "group_size" not in given:
        wanted, stored = (channels, -(-depth // NVFP4_GROUP)), (torch.int8,)
    else:
        wanted = (channels, -(-depth // given["group_size"])) if given["group_size"] else (channels,)
    zero = given.get("zero_point")
    if zero is not None and tuple(zero.shape) != wanted:
        raise broken(6, node.name, f"zero points {tuple(zero.shape)}, expected {wanted}")
    if tuple(scale.shape) != wanted or codes.dtype not in stored:
        raise broken(6, node.name, f"scales {tuple(scale.shape)} for {codes.dtype} codes, expected {wanted}")


def _check_mask(program: Program, name: str, broken: Broken) -> None:
    mask = program.masks[name]
    if name not in program.weights:
        raise broken(6, name, "a mask names a tensor that is not stored")
    try:
        pattern = SparsityPattern.parse(mask.pattern)
    except ValueError as error:
        raise broken(6, name, f"its mask has no pattern {mask.pattern!r}: {error}") from error
    shape = program.weights[name].shape
    if pattern.run and not 0 <= mask.axis < len(shape):
        raise broken(6, name, f"its mask runs along dimension {mask.axis} of {list(shape)}")
    if misfit := pattern.misfit(shape, mask.axis):
        raise broken(6, name, f"its mask {mask.pattern} does not fit. {misfit}")
    if not 0 <= mask.fraction <= 1:
        raise broken(6, name, f"its mask promises {mask.fraction} of zeros")


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [v for v in value if isinstance(v, torch.Tensor)] if isinstance(value, (tuple, list)) else []


def _same_shape(left: torch.Tensor, right: torch.Tensor) -> bool:
    a, b = shape_of(left), shape_of(right)
    return len(a) == len(b) and all(map(same_size, a, b))
