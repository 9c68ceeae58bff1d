"""Linear layers in the format their weight is stored in.

=================================== ======================================= ===================================
weight                              activation                              runtime form
=================================== ======================================= ===================================
float ``[N, K]`` or ``[K, N]``      float                                   MatMul, weight stored ``[K, N]``
integers, one scale per group       float                                   MatMulNBits, 4 or 8 bits
integers, one scale per channel     8-bit, one run-time scale per token     MatMulIntegerToFloat
anything else                                                               plain operators, and a CS2310 diagnostic
=================================== ======================================= ===================================
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx

from compile_sparse.backends.onnx.emission import Emission
from compile_sparse.backends.onnx.emitters.gemm import emits_gemms, float_gemm
from compile_sparse.backends.onnxruntime.dialect import DIALECT, MICROSOFT
from compile_sparse.backends.onnxruntime.emit_activations import token_codes
from compile_sparse.backends.onnxruntime.packing import pack_blocks, packed_shape, pad_scales
from compile_sparse.compiler.diagnostics import Diagnostic
from compile_sparse.compiler.ir.edit import schema_arguments
from compile_sparse.compiler.ir.nodes import dimensions, is_op

__all__: list[str] = []

# int8 arithmetic inside the kernel: 2.1 times the decode rate of float arithmetic on the same codes.
_INT8_COMPUTE = 4


@dataclass(frozen=True)
class _Codes:
    """Arguments of a ``dequantize_weight`` node."""

    q: fx.Node
    scale: fx.Node
    axis: int
    group: int
    bits: int

    @property
    def in_features(self) -> int:
        return int(dimensions(self.q)[self.axis])

    @property
    def out_features(self) -> int:
        return int(dimensions(self.q)[1 - self.axis])


def _gemm(emission: Emission, node: fx.Node, x: fx.Node, weight: fx.Node, bias: fx.Node | None, axis: int) -> str:
    if is_op(weight, "compile_sparse::dequantize_weight"):
        packed = _quantized(emission, node, x, weight, bias, axis)
        if packed is not None:
            return packed
    return float_gemm(emission, node, x, weight, bias, axis)


def _quantized(
    emission: Emission, node: fx.Node, x: fx.Node, weight: fx.Node, bias: fx.Node | None, axis: int
) -> str | None:
    given = schema_arguments(weight)
    codes = _Codes(given["q"], given["scale"], given["axis"], given["group_size"], int(given["bits"]))
    dynamic = is_op(x, "compile_sparse::fake_quantize")
    reason = ""
    if codes.axis != axis:
        reason = "the scales do not follow the contraction"
    elif codes.q.op != "placeholder" or codes.scale.op != "placeholder":
        reason = "codes or scales are computed in the graph"
    elif given["zero_point"] is not None or codes.q.meta["val"].dtype != torch.int8:
        reason = "there is no kernel for its codes"
    elif dynamic and not codes.group:
        return _integer_gemm(emission, node, x, codes, bias)
    elif dynamic:
        reason = "there is no kernel for grouped scales with 8-bit activations"
    elif not codes.group:
        reason = "there is no kernel for one scale per channel with float activations"
    elif codes.bits not in (4, 8) or codes.group < 16 or codes.group & (codes.group - 1):
        reason = f"MatMulNBits has no {codes.bits}-bit form with groups of {codes.group}"
    else:
        return _blocked_gemm(emission, node, x, codes, bias)
    why = f"The quantized weight of this layer is multiplied out in float: {reason}."
    emission.diagnostics.append(Diagnostic(node.name, "CS2310", why, "Use a scheme the target lists."))
    return None


def _blocked_gemm(emission: Emission, node: fx.Node, x: fx.Node, codes: _Codes, bias: fx.Node | None) -> str:
    in_features, out_features, bits, group = codes.in_features, codes.out_features, codes.bits, codes.group
    groups = -(-in_features // group)

    def packed(values: torch.Tensor) -> np.ndarray:
        rows = values.numpy() if codes.axis == 1 else values.numpy().T
        return pack_blocks(rows, bits, group)

    def scales(values: torch.Tensor) -> np.ndarray:
        return pad_scales(values.numpy(), out_features, groups)

    suffix = f".packed{bits}"
    inputs = [
        emission.value(x),
        emission.stored(codes.q, suffix, packed_shape(out_features, in_features, bits, group), "uint8", packed),
        emission.stored(codes.scale, "", (out_features, groups), "float32", scales),
    ]
    if bias is not None:
        inputs += ["", "", emission.value(bias)]
    emission.count(f"MatMulNBits {bits}-bit, groups of {group}")
    return emission.graph.call(
        "MatMulNBits",
        inputs,
        hint=node.name,
        domain=MICROSOFT,
        K=in_features,
        N=out_features,
        bits=bits,
        block_size=group,
        accuracy_level=_INT8_COMPUTE,
    )


def _integer_gemm(emission: Emission, node: fx.Node, x: fx.Node, codes: _Codes, bias: fx.Node | None) -> str:
    """The bias comes last, because rows are multiplied with their own scale after the kernel."""
    activation, graph = token_codes(emission, x), emission.graph

    def in_features_first(values: torch.Tensor) -> np.ndarray:
        array: Any = values.numpy()
        return np.ascontiguousarray(array.T if codes.axis == 1 else array)

    stored = emission.stored(
        codes.q, ".inner_first", (codes.in_features, codes.out_features), "int8", in_features_first
    )
    inputs = [activation.codes, stored, activation.half, emission.value(codes.scale), activation.zero_point]
    emission.count("MatMulIntegerToFloat, one scale per token")
    steps = graph.call("MatMulIntegerToFloat", inputs, hint=f"{node.name}_steps", domain=MICROSOFT)
    result = graph.call("Mul", [steps, activation.scale], hint=node.name)
    return result if bias is None else graph.call("Add", [result, emission.value(bias)], hint=node.name)


emits_gemms(DIALECT, _gemm)
