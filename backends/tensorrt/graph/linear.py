"""Linear layers in the forms TensorRT has kernels for: a GEMM whose operands come out of Q/DQ pairs.

====================================== ======================= ===========================================================
weight                                 activation              emitted
====================================== ======================= ===========================================================
float                                  float                   MatMul(x, W)
int8, one scale per channel            int8, one fixed scale   Q, DQ on x; DequantizeLinear(W, axis 1)
e4m3, one scale per channel            e4m3, one fixed scale   the same in FP8
int4, one scale per group of channels  float                   DequantizeLinear(W, axis 0, block_size)
e2m1, scales of scales (NVFP4)         e2m1, scales at run     TRT_FP4DynamicQuantize, DQ, DQ on x; DQ(DQ(scale)) on W
                                       time
====================================== ======================= ===========================================================

Weights are stored ``[K, N]`` and reach the GEMM through exactly one DequantizeLinear, which is where TensorRT looks for 2:4
zeros. Zero points are absent: TensorRT's quantization is symmetric.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import fx

from compile_sparse.backends.onnx.element_types import element_type, kind_of, raw_values
from compile_sparse.backends.onnx.emission import Emission, Unsupported
from compile_sparse.backends.onnx.emitters.gemm import emits_gemms, float_gemm
from compile_sparse.backends.onnx.packed_nibbles import pack_nibbles
from compile_sparse.backends.tensorrt.graph.dialect import DIALECT, NVIDIA, emits
from compile_sparse.compiler.ir.edit import schema_arguments
from compile_sparse.compiler.ir.nodes import dimensions, is_op
from compile_sparse.compiler.ir.ops.quantization import NVFP4_GROUP

__all__: list[str] = []

INT4_GROUPS = (32, 64, 128)
"""Block sizes that were built; NVIDIA documents 64 and 128."""
_DEQUANTIZE = (
    "compile_sparse::dequantize_weight",
    "compile_sparse::dequantize_nvfp4",
    "compile_sparse::dequantize_block",
)


def _gemm(emission: Emission, node: fx.Node, x: fx.Node, weight: fx.Node, bias: fx.Node | None, axis: int) -> str:
    if not is_op(weight, *_DEQUANTIZE):
        return float_gemm(emission, node, x, weight, bias, axis)
    values = _weight(emission, node, weight, axis)
    gemm = emission.graph.call("MatMul", [emission.value(x), values], hint=node.name)
    return gemm if bias is None else emission.graph.call("Add", [gemm, emission.value(bias)], hint=node.name)


emits_gemms(DIALECT, _gemm)


def _weight(emission: Emission, node: fx.Node, weight: fx.Node, axis: int) -> str:
    """Name of the dequantized ``[K, N]`` matrix."""
    given = schema_arguments(weight)
    if is_op(weight, "compile_sparse::dequantize_block"):
        raise Unsupported("TensorRT has no GEMMs with square blocks of FP8 weights")
    if given.get("axis", 1) != axis:
        raise Unsupported("its scales do not follow the contraction")
    codes = given["codes" if "codes" in given else "q"]
    if codes.op != "placeholder" or given["scale"].op != "placeholder":
        raise Unsupported("its codes or scales are computed in the graph")
    if is_op(weight, "compile_sparse::dequantize_nvfp4"):
        return _fp4(emission, node, given, axis)
    if given["zero_point"] is not None:
        raise Unsupported("its codes have zero points, and TensorRT's quantization is symmetric")
    depth, group, bits = int(dimensions(codes)[axis]), given["group_size"], int(given["bits"])
    if not group:
        return _per_channel(emission, node, codes, given["scale"], axis)
    if bits != 4:
        raise Unsupported(f"TensorRT has no {bits}-bit integers in groups, only 4-bit ones")
    if group not in INT4_GROUPS or depth % group:
        raise Unsupported(
            f"groups of {group} along a contraction of {depth}: TensorRT needs groups of 32, 64 or 128 that divide it"
        )
    return _grouped(emission, node, codes, given["scale"], axis, group)


def _in_features_first(axis: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda values: values.t().contiguous() if axis == 1 else values


def _shape(codes: fx.Node, axis: int) -> tuple[int, int]:
    """``(K, N)``."""
    size = dimensions(codes)
    return int(size[axis]), int(size[1 - axis])


def _per_channel(emission: Emission, node: fx.Node, codes: fx.Node, scale: fx.Node, axis: int) -> str:
    kind, turned = kind_of(codes.meta["val"].dtype), _in_features_first(axis)
    stored = emission.stored(
        codes, ".inner_first", _shape(codes, axis), kind, lambda values: raw_values(turned(values))
    )
    emission.count("int8 weights, one scale per channel" if kind == "int8" else "FP8 weights")
    scales = _scales(emission, scale, emission.dtype(node), tuple(dimensions(scale)))
    return emission.graph.call("DequantizeLinear", [stored, scales], hint=f"{node.name}_weight", axis=1)


def _grouped(emission: Emission, node: fx.Node, codes: fx.Node, scale: fx.Node, axis: int, group: int) -> str:
    turned = _in_features_first(axis)

    def packed(values: torch.Tensor) -> np.ndarray[Any, Any]:
        return pack_nibbles(turned(values).numpy())

    depth, channels = _shape(codes, axis)
    stored = emission.stored(codes, ".inner_first", (depth, channels), "int4", packed)
    scales = _scales(emission, scale, emission.dtype(node), (depth // group, channels), turn=True)
    emission.count(f"int4 weights, groups of {group}")
    return emission.graph.call(
        "DequantizeLinear", [stored, scales], hint=f"{node.name}_weight", axis=0, block_size=group
    )


def _scales(
    emission: Emission, scale: fx.Node, dtype: torch.dtype, shape: tuple[Any, ...], *, turn: bool = False
) -> str:
    """Scales in the type of the GEMMs. Ones that it cannot hold are refused, because they would become 0."""

    def make(values: torch.Tensor) -> np.ndarray[Any, Any]:
        wanted = values.t().contiguous() if turn else values
        cast = wanted.to(dtype)
        if bool((~torch.isfinite(cast) | ((cast == 0) & (wanted != 0))).any()):
            raise Unsupported("a scale is out of the range of the artifact's precision")
        return raw_values(cast)

    return emission.stored(scale, "", [int(size) for size in shape], kind_of(dtype), make)


def _fp4(emission: Emission, node: fx.Node, given: dict[str, Any], axis: int) -> str:
    """``DQ(DQ(scale, 1 / divisor))``: float32 in between, as the format defines it."""
    codes, scale = given["codes"], given["scale"]
    depth, channels = _shape(codes, axis)
    if depth % NVFP4_GROUP:
        raise Unsupported(f"groups of {NVFP4_GROUP} do not divide a contraction of {depth}")

    def packed(values: torch.Tensor) -> np.ndarray[Any, Any]:
        return pack_nibbles(_in_features_first(axis)(values).numpy())

    def turned(values: torch.Tensor) -> np.ndarray[Any, Any]:
        return raw_values(values.t())

    graph, name = emission.graph, f"{node.name}_weight"
    stored = emission.stored(codes, ".inner_first", (depth, channels), "float4_e2m1", packed)
    blocks = emission.stored(scale, ".inner_first", (depth // NVFP4_GROUP, channels), "float8_e4m3fn", turned)
    whole = _reciprocal(emission, given["global_scale"])
    scales = graph.call("DequantizeLinear", [blocks, whole], hint=f"{name}_scale")
    wide = graph.call("DequantizeLinear", [stored, scales], hint=name, axis=0, block_size=NVFP4_GROUP)
    emission.count("NVFP4 weights")
    return graph.call("Cast", [wide], hint=name, to=element_type(emission.dtype(node)))


def _reciprocal(emission: Emission, divisor: fx.Node) -> str:
    """A global scale as ONNX multiplies with it; float32 scalar."""

    def make(values: torch.Tensor) -> np.ndarray[Any, Any]:
        return np.asarray((1.0 / values.double()).float().reshape(()).numpy())

    return emission.stored(divisor, ".reciprocal", (), "float32", make)


@emits("compile_sparse::fake_quantize")
def _fake_quantize(emission: Emission, node: fx.Node) -> str:
    """Quantize-dequantize (QDQ): QuantizeLinear and DequantizeLinear."""
    given = schema_arguments(node)
    form, source = given["format"], given["x"]
    if form == "fp4":
        return _fp4_activation(emission, node, source, given["scale"])
    if not form.endswith("-static"):
        raise Unsupported(f"TensorRT fixes the range of activations ahead; {form} finds it at run time")
    kind = "int8" if form == "int8-static" else "float8_e4m3fn"
    dtype = emission.dtype(node)

    def scalar(values: torch.Tensor) -> np.ndarray[Any, Any]:
        cast = values.reshape(()).to(dtype)
        if not 0 < float(cast) < float("inf"):
            raise Unsupported("the scale of an activation is out of the range of the artifact's precision")
        return raw_values(cast)

    scale = emission.stored(given["scale"], "", (), kind_of(dtype), scalar)
    zero = emission.graph.weight(f"compile_sparse.zero.{kind}", (), kind, lambda: np.zeros((), _ZERO[kind]))
    quantized = emission.graph.call("QuantizeLinear", [emission.value(source), scale, zero], hint=f"{node.name}_codes")
    emission.count("int8 activations" if kind == "int8" else "FP8 activations")
    return emission.graph.call("DequantizeLinear", [quantized, scale, zero], hint=node.name)


_ZERO = {"int8": np.int8, "float8_e4m3fn": np.uint8}


def _fp4_activation(emission: Emission, node: fx.Node, source: fx.Node, divisor: fx.Node) -> str:
    """Scales per 16 elements are found at run time by TensorRT's own operator, below the fixed global scale."""
    graph, whole = emission.graph, _reciprocal(emission, divisor)
    codes, blocks = graph.call_many(
        "TRT_FP4DynamicQuantize",
        [emission.value(source), whole],
        2,
        hint=f"{node.name}_codes",
        domain=NVIDIA,
        axis=-1,
        block_size=NVFP4_GROUP,
        scale_type=element_type("float8_e4m3fn"),
    )
    scales = graph.call("DequantizeLinear", [blocks, whole], hint=f"{node.name}_scale")
    wide = graph.call("DequantizeLinear", [codes, scales], hint=node.name, axis=-1, block_size=NVFP4_GROUP)
    emission.count("NVFP4 activations")
    return graph.call("Cast", [wide], hint=node.name, to=element_type(emission.dtype(node)))


@emits(*_DEQUANTIZE, lazy=True)
def _other_reader(emission: Emission, node: fx.Node) -> str:
    """Weights are dequantized where their GEMM is written; nothing else reads them."""
    raise Unsupported("a quantized weight is read by something that is no GEMM")
