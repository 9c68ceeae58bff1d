"""Activations in 8 bits, one scale per token.

The kernel multiplies codes of a whole batch with one scale, so it is given a constant and each row of its result is multiplied
with the row's own. Codes are unsigned with the zero point 128: signed ones run at a fourth of float32's speed, and not at all
where ``session.x64quantprecision`` is set.

Scales are kept doubled and steps halved, which changes no bit of a result: ``x * (1 / s)`` written with the constant 1 would be
fused into ``x / s``, which rounds otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from compile_sparse.backends.onnx.emission import Emission, Unsupported
from compile_sparse.backends.onnxruntime.dialect import emits
from compile_sparse.compiler.ir.edit import schema_arguments
from compile_sparse.compiler.ir.ops.quantization import LEAST_PEAK

__all__ = ["TokenCodes", "token_codes"]

ZERO_POINT = 128


@dataclass(frozen=True)
class TokenCodes:
    """``x = (codes - zero_point) * half * scale``, as ONNX names.

    Attributes:
        codes: uint8 ``[..., K]``.
        scale: twice the size of a step, float32 ``[..., 1]``.
        half: the constant 0.5.
        zero_point: the constant 128, uint8.
    """

    codes: str
    scale: str
    half: str
    zero_point: str


def token_codes(emission: Emission, node: fx.Node) -> TokenCodes:
    """The codes of ``fake_quantize(x, "int8")``, computed once however many layers read them."""
    names = emission.names(node)
    return TokenCodes(names[1], names[2], *_constants(emission))


@emits("compile_sparse::fake_quantize")
def _fake_quantize(emission: Emission, node: fx.Node) -> list[str]:
    """``[value, codes, scale]`` by the operations of ``fake_quantize``, in its order. GEMMs read the last two; where nobody else
    reads the value, its nodes are dropped.
    """
    given, graph = schema_arguments(node), emission.graph
    if given["format"] != "int8":
        raise Unsupported(f"the runtime has no GEMMs for activations in format {given['format']}")
    x, (half, zero_point) = emission.value(given["x"]), _constants(emission)
    magnitude = graph.call("Abs", [x], hint=f"{node.name}_magnitude")
    peak = graph.call("ReduceMax", [magnitude, graph.constant([-1])], hint=f"{node.name}_peak", keepdims=1)
    peak = graph.call("Max", [peak, graph.constant(LEAST_PEAK, "float32")], hint=f"{node.name}_peak")
    scale = graph.call("Div", [peak, graph.constant(63.5, "float32")], hint=f"{node.name}_scale")
    # A division, because Reciprocal may be an approximation.
    factor = graph.call("Div", [graph.constant(2.0, "float32"), scale], hint=f"{node.name}_factor")
    steps = graph.call("Mul", [x, factor], hint=f"{node.name}_steps")
    codes = graph.call("QuantizeLinear", [steps, graph.constant(1.0, "float32"), zero_point], hint=f"{node.name}_codes")
    whole = graph.call("DequantizeLinear", [codes, half, zero_point], hint=f"{node.name}_rounded")
    return [graph.call("Mul", [whole, scale], hint=node.name), codes, scale]


def _constants(emission: Emission) -> tuple[str, str]:
    return emission.graph.constant(0.5, "float32"), emission.graph.constant(ZERO_POINT, "uint8")
