"""GEMMs: which operators they are, and the float form.

``linear`` contracts axis 1 of its weight, ``addmm`` / ``mm`` / ``matmul`` axis 0. The weight is stored ``[K, N]``.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import fx

from compile_sparse.backends.onnx.dialect import STANDARD, Dialect
from compile_sparse.backends.onnx.element_types import raw_values
from compile_sparse.backends.onnx.emission import Emission, Unsupported, emits
from compile_sparse.compiler.ir.edit import schema_arguments
from compile_sparse.compiler.ir.nodes import dimensions, is_op

__all__ = ["EmitGemm", "emits_gemms", "float_gemm"]

EmitGemm = Callable[[Emission, fx.Node, fx.Node, fx.Node, "fx.Node | None", int], str]
"""``(emission, node, x, weight, bias, axis) -> name``; ``axis`` is the contracted one of the weight."""


def emits_gemms(dialect: Dialect, emit: EmitGemm) -> None:
    """Register ``emit`` for every operator that multiplies by a matrix."""

    @dialect.emits("aten::linear")
    def _linear(emission: Emission, node: fx.Node) -> str:
        given = schema_arguments(node)
        return emit(emission, node, given["input"], given["weight"], given["bias"], 1)

    @dialect.emits("aten::addmm")
    def _addmm(emission: Emission, node: fx.Node) -> str:
        given = schema_arguments(node)
        if given["beta"] != 1 or given["alpha"] != 1:
            raise Unsupported("addmm with factors")
        return emit(emission, node, given["mat1"], given["mat2"], given["self"], 0)

    @dialect.emits("aten::mm", "aten::bmm", "aten::matmul")
    def _matmul(emission: Emission, node: fx.Node) -> str:
        return emit(emission, node, node.args[0], node.args[1], None, 0)  # type: ignore[arg-type]


@emits("aten::einsum")
def _einsum(emission: Emission, node: fx.Node) -> str:
    given = schema_arguments(node)
    operands = [emission.tensor(tensor, emission.dtype(node)) for tensor in given["tensors"]]
    return emission.graph.call("Einsum", operands, hint=node.name, equation=given["equation"])


def float_gemm(emission: Emission, node: fx.Node, x: fx.Node, weight: fx.Node, bias: fx.Node | None, axis: int) -> str:
    """``MatMul``, and ``Add`` where there is a bias."""
    emission.count("MatMul")
    gemm = emission.graph.call(
        "MatMul", [emission.value(x), _in_features_first(emission, weight, axis)], hint=node.name
    )
    return gemm if bias is None else emission.graph.call("Add", [gemm, emission.value(bias)], hint=node.name)


def _in_features_first(emission: Emission, weight: fx.Node, axis: int) -> str:
    """The float weight as ``[K, N]``."""
    if axis == 0:
        return emission.value(weight)
    shared = any(not is_op(user, "aten::linear") for user in _readers(emission, weight))
    if weight.op != "placeholder" or shared:
        # A tied embedding is stored once; the runtime folds the transposition when it loads.
        return emission.graph.call("Transpose", [emission.value(weight)], perm=[1, 0])
    rows, columns = (int(size) for size in dimensions(weight))

    def transposed(values: torch.Tensor) -> np.ndarray:
        return raw_values(values.t())  # torch transposes 16-bit elements three times as fast as numpy

    return emission.stored(weight, ".transposed", (columns, rows), change=transposed)


def _readers(emission: Emission, weight: fx.Node) -> list[fx.Node]:
    """Readers of the stored tensor, which may be bound to more than one placeholder."""
    tensor = emission.program.tensor_of(weight)
    return [
        user
        for node in emission.program.graph.nodes
        if node is weight or (node.op == "placeholder" and emission.program.tensor_of(node) == tensor)
        for user in node.users
    ]


emits_gemms(STANDARD, float_gemm)
