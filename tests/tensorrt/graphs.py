"""Hand-made ONNX models in the forms that the TensorRT lowering emits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

__all__ = ["DECODER", "decoder", "decoder_profiles", "dynamic", "linear", "save", "tensor"]

K, N = 256, 512
MODULE = "model.layers.0.mlp.up_proj"
_TYPES = {
    np.dtype(np.float32): TensorProto.FLOAT,
    np.dtype(np.float16): TensorProto.FLOAT16,
    np.dtype(np.int64): TensorProto.INT64,
    np.dtype(np.int8): TensorProto.INT8,
    np.dtype(ml_dtypes.float8_e4m3fn): TensorProto.FLOAT8E4M3FN,
}


def tensor(name: str, values: NDArray[Any]) -> onnx.TensorProto:
    """An initializer."""
    values = np.ascontiguousarray(values)
    return helper.make_tensor(name, _TYPES[values.dtype], values.shape, values.tobytes(), raw=True)


def _nibbles(name: str, codes: NDArray[np.uint8], kind: int) -> onnx.TensorProto:
    flat = codes.ravel()
    return helper.make_tensor(name, kind, codes.shape, (flat[0::2] | flat[1::2] << 4).tobytes(), raw=True)


def _model(nodes: list[Any], inputs: list[Any], outputs: list[Any], initializers: list[Any]) -> onnx.ModelProto:
    graph = helper.make_graph(nodes, "graph", inputs, outputs, initializers)
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid("trt", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=12)


def _half(name: str, shape: list[int | str]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT16, shape)


def _fp16(draws: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float16]:
    return (0.05 * draws.standard_normal(shape)).astype(np.float16)


def dynamic(largest: int = 4) -> list[dict[str, Any]]:
    """The profile of ``linear``."""
    return [{"name": "samples", "shapes": {"x": [[1, K], [2, K], [largest, K]]}}]


def linear(form: str, *, operator: str = "MatMul") -> onnx.ModelProto:
    """``y = x W``, ``x: [batch, 256]``, with the weight in ``form``: fp16, int8, int4, fp8 or nvfp4."""
    draws = np.random.default_rng(0)
    name = f"{MODULE}/{operator}_3"
    nodes, weights, x = [], [], "x"

    def dequantized(kind: str, zero: onnx.TensorProto | None, values: onnx.TensorProto, axis: int) -> None:
        nonlocal x
        weights.extend([values, tensor("step", np.float16(0.02)), tensor("steps", np.full(N, 0.01, np.float16))])
        pair, each = ["x", "step"], ["codes", "steps"]
        if zero is not None:
            weights.append(zero)
            pair.append("zero")
        nodes.append(helper.make_node("QuantizeLinear", pair, ["xq"], f"{MODULE}/QuantizeLinear_0"))
        nodes.append(helper.make_node("DequantizeLinear", ["xq", *pair[1:]], ["xd"], f"{MODULE}/DequantizeLinear_1"))
        nodes.append(helper.make_node("DequantizeLinear", each, ["w"], f"{MODULE}/DequantizeLinear_2", axis=axis))
        x = "xd"

    if form == "fp16":
        weights.append(tensor("w", _fp16(draws, (K, N))))
    elif form == "int8":
        codes = tensor("codes", draws.integers(-127, 128, (K, N)).astype(np.int8))
        dequantized(form, tensor("zero", np.int8(0)), codes, 1)
    elif form == "fp8":
        codes = tensor("codes", _fp16(draws, (K, N)).astype(ml_dtypes.float8_e4m3fn))
        dequantized(form, tensor("zero", np.zeros((), ml_dtypes.float8_e4m3fn)), codes, 1)
    elif form == "int4":
        codes4 = draws.integers(0, 16, (K, N)).astype(np.uint8)
        scales = tensor("steps", np.full((K // 128, N), 0.01, np.float16))
        weights += [_nibbles("codes", codes4, TensorProto.INT4), scales]
        dequantize = {"axis": 0, "block_size": 128}
        nodes.append(helper.make_node("DequantizeLinear", ["codes", "steps"], ["w"], f"{MODULE}/DQ_2", **dequantize))
    elif form == "nvfp4":
        return _nvfp4(draws)
    else:
        raise ValueError(form)
    nodes.append(helper.make_node(operator, [x, "w"], ["y"], name))
    return _model(nodes, [_half("x", ["batch", K])], [_half("y", ["batch", N])], weights)


def _nvfp4(draws: np.random.Generator) -> onnx.ModelProto:
    """Both operands in 4-bit floats with an FP8 scale per block of 16 and one float32 scale per tensor."""
    one = np.float32(0.02)
    weights = [
        _nibbles("codes", draws.integers(0, 16, (N, K)).astype(np.uint8), TensorProto.FLOAT4E2M1),
        tensor("block", np.ones((N, K // 16), ml_dtypes.float8_e4m3fn)),
        tensor("scale", one),
        tensor("x_scale", one),
    ]
    dynamic_codes = {"domain": "trt", "axis": -1, "block_size": 16, "scale_type": TensorProto.FLOAT8E4M3FN}
    nodes = [
        helper.make_node("DequantizeLinear", ["block", "scale"], ["scales"], f"{MODULE}/DQ_0"),
        helper.make_node("DequantizeLinear", ["codes", "scales"], ["w32"], f"{MODULE}/DQ_1", axis=1, block_size=16),
        helper.make_node("Cast", ["w32"], ["w"], f"{MODULE}/Cast_2", to=TensorProto.FLOAT16),
        helper.make_node("TRT_FP4DynamicQuantize", ["x", "x_scale"], ["xq", "xb"], f"{MODULE}/Q_3", **dynamic_codes),
        helper.make_node("DequantizeLinear", ["xb", "x_scale"], ["xs"], f"{MODULE}/DQ_4"),
        helper.make_node("DequantizeLinear", ["xq", "xs"], ["x32"], f"{MODULE}/DQ_5", axis=-1, block_size=16),
        helper.make_node("Cast", ["x32"], ["xd"], f"{MODULE}/Cast_6", to=TensorProto.FLOAT16),
        helper.make_node("Gemm", ["xd", "w"], ["y"], f"{MODULE}/Gemm_7", transB=1),
    ]
    return _model(nodes, [_half("x", ["batch", K])], [_half("y", ["batch", N])], weights)


DECODER = {"layers": 2, "vocabulary": 96, "width": 64, "heads": 4, "kv_heads": 2, "head_size": 16, "max_length": 48}


def decoder(*, decomposable: bool = False, precision: str = "float16") -> onnx.ModelProto:
    """A two-layer decoder with the inputs and outputs of the lowering: rotary positions, static cache, grouped heads.

    Args:
        decomposable: mark attention as TensorRT wants it, which ONNX Runtime refuses to load.
        precision: numpy's name of the type of everything but ids.
    """
    width, heads, kv_heads, size = DECODER["width"], DECODER["heads"], DECODER["kv_heads"], DECODER["head_size"]
    longest, vocabulary, dtype = DECODER["max_length"], DECODER["vocabulary"], np.dtype(precision)
    draws = np.random.default_rng(0)
    angles = np.arange(longest)[:, None] / 10000.0 ** (np.arange(size // 2) / (size // 2))
    # Weights of a scale that keeps values near one through both layers, so that rounding stays small beside them.
    # The head is not the embedding's: such a model repeats its last token whatever came before.
    embedding = draws.standard_normal((vocabulary, width))
    constants = {
        "embedding": embedding.astype(dtype),
        "head": (0.3 * draws.standard_normal((width, vocabulary))).astype(dtype),
        "cos": np.cos(angles).astype(dtype),
        "sin": np.sin(angles).astype(dtype),
        "q_shape": np.array([0, 0, heads, size]),
        "kv_shape": np.array([0, 0, kv_heads, size]),
        "flat": np.array([0, 0, heads * size]),
        "columns": np.arange(longest),
        "zero": np.array(0),
        "one": np.array(1),
        "axis1": np.array([1]),
        "axis2": np.array([2]),
        "axes": np.array([1, 2]),
        "ones": np.ones(width, dtype),
    }
    nodes: list[onnx.NodeProto] = []

    def call(op: str, inputs: list[str], output: str, module: str = "", **attributes: Any) -> str:
        nodes.append(helper.make_node(op, inputs, [output], f"{module}/{op}_{len(nodes)}", **attributes))
        return output

    call("Shape", ["input_ids"], "length1", start=1, end=2)
    call("Squeeze", ["length1"], "length")
    call("Range", ["zero", "length", "one"], "offsets")
    call("Unsqueeze", ["write_indices", "axis1"], "starts")
    call("Add", ["starts", "offsets"], "positions")
    call("Unsqueeze", ["positions", "axis1"], "rows3")
    call("Unsqueeze", ["rows3", "axis3"], "rows")
    constants["axis3"] = np.array([3])
    call("LessOrEqual", ["columns", "rows"], "mask")
    x = call("Gather", ["embedding", "input_ids"], "x0", "model.embed_tokens")
    values = [("input_ids", TensorProto.INT64, ["batch", "sequence"]), ("write_indices", TensorProto.INT64, ["batch"])]
    outputs = [("logits", _TYPES[dtype], ["batch", "sequence", vocabulary])]
    for i in range(DECODER["layers"]):
        module = f"model.layers.{i}.self_attn"
        normal = call("RMSNormalization", [x, "ones"], f"n{i}", f"model.layers.{i}.input_layernorm", epsilon=1e-5)
        for role, columns in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            weight = 0.12 * draws.standard_normal((width, columns * size))
            constants[f"w{role}{i}"] = weight.astype(dtype)
            call("MatMul", [normal, f"w{role}{i}"], f"{role}{i}a", f"{module}.{role}_proj")
            shape = "q_shape" if role == "q" else "kv_shape"
            call("Reshape", [f"{role}{i}a", shape], f"{role}{i}b", module)
            call("Transpose", [f"{role}{i}b"], f"{role}{i}c", module, perm=[0, 2, 1, 3])
        for role in "qk":
            call("RotaryEmbedding", [f"{role}{i}c", "cos", "sin", "positions"], f"{role}{i}d", module)
        for role, new in (("key", f"k{i}d"), ("value", f"v{i}c")):
            past, present = f"past_key_values.{i}.{role}", f"present.{i}.{role}"
            call("TensorScatter", [past, new, "write_indices"], present, module, axis=2)
            values.append((past, _TYPES[dtype], ["batch", kv_heads, longest, size]))
            outputs.append((present, _TYPES[dtype], ["batch", kv_heads, longest, size]))
        call("Attention", [f"q{i}d", f"present.{i}.key", f"present.{i}.value", "mask"], f"a{i}", module)
        if decomposable:
            nodes[-1].attribute.append(helper.make_attribute("TRT_decomposable", 1))
        call("Transpose", [f"a{i}"], f"a{i}b", module, perm=[0, 2, 1, 3])
        call("Reshape", [f"a{i}b", "flat"], f"a{i}c", module)
        constants[f"wo{i}"] = (0.12 * draws.standard_normal((heads * size, width))).astype(dtype)
        call("MatMul", [f"a{i}c", f"wo{i}"], f"o{i}", f"{module}.o_proj")
        x = call("Add", [x, f"o{i}"], f"x{i + 1}", f"model.layers.{i}")
    call("RMSNormalization", [x, "ones"], "last", "model.norm", epsilon=1e-5)
    call("MatMul", ["last", "head"], "logits", "lm_head")
    del constants["axis2"], constants["axes"]
    return _model(
        nodes,
        [helper.make_tensor_value_info(*value) for value in values],
        [helper.make_tensor_value_info(*value) for value in outputs],
        [tensor(name, value) for name, value in constants.items()],
    )


def decoder_profiles(batch: int = 2, prompt: int = 16) -> list[dict[str, Any]]:
    """Prefill and decode."""
    cache = [DECODER["kv_heads"], DECODER["max_length"], DECODER["head_size"]]
    names = [f"past_key_values.{i}.{role}" for i in range(DECODER["layers"]) for role in ("key", "value")]

    def shapes(lengths: tuple[int, int, int]) -> dict[str, Any]:
        ids = [[b, length] for b, length in zip((1, batch, batch), lengths, strict=True)]
        past = [[b, *cache] for b in (1, batch, batch)]
        return {"input_ids": ids, "write_indices": [[1], [batch], [batch]], **dict.fromkeys(names, past)}

    return [
        {"name": "prefill", "shapes": shapes((1, prompt, prompt))},
        {"name": "decode", "shapes": shapes((1, 1, 1))},
    ]


def save(model: onnx.ModelProto, folder: Path, *, external: bool = False) -> Path:
    """``folder/model.onnx``, with its weights beside it if wanted; shapes and the like stay inside, as the lowering has it."""
    path = folder / "model.onnx"
    if external:
        options = {"all_tensors_to_one_file": True, "location": "model.onnx.data", "size_threshold": 512}
        onnx.save(model, path, save_as_external_data=True, **options)
    else:
        onnx.save(model, path)
    return path
