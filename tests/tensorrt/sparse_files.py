"""Small ONNX files whose weights follow a pattern of zeros, or nearly."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper

from compile_sparse.backends.tensorrt.sparsity.constant_zeros import Constant
from compile_sparse.backends.tensorrt.sparsity.sparse_gate import check_sparsity

K, N = 64, 16
FLOAT = TensorProto.FLOAT


def pruned(shape=(K, N), axis=0, n=2, m=4, seed=0):
    """Integers from 1 to 7, of which the last ``m - n`` of each group along ``axis`` are zero."""
    values = np.random.default_rng(seed).integers(1, 8, shape)
    at = np.arange(shape[axis]) % m >= n
    values[tuple(at if i == axis else slice(None) for i in range(len(shape)))] = 0
    return values


def broken(values, index):
    """One value more than the pattern allows."""
    changed = values.copy()
    changed[index] = 1
    return changed


def raw(name, data_type, shape, codes):
    return TensorProto(name=name, data_type=data_type, dims=shape, raw_data=np.ascontiguousarray(codes).tobytes())


def nibbles(values):
    flat = np.append(values.reshape(-1), [0] * (values.size % 2)).astype(np.uint8) & 0xF
    return flat[0::2] | (flat[1::2] << 4)


def save(folder, nodes, constants, inputs=("x",), name="model.onnx", **options):
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(i, FLOAT, None) for i in inputs],
        [helper.make_tensor_value_info("y", FLOAT, None)],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)])
    onnx.save(model, str(folder / name), **options)
    return folder / name


def matmul(folder, weight):
    return save(folder, [helper.make_node("MatMul", ["x", "w"], ["y"], name="mm")], [weight])


_SIGN = {"FLOAT16": 0x8000, "BFLOAT16": 0x8000, "FLOAT8E4M3FN": 0x80, "FLOAT8E5M2": 0x80, "FLOAT4E2M1": 0x8}


def encoded(data_type, values):
    """Codes of ``values`` with some zeros written as -0 where the format has it; other codes are any that are not zero."""
    kinds = {"FLOAT": np.float32, "FLOAT16": np.float16, "DOUBLE": np.float64, "INT8": np.int8, "UINT8": np.uint8}
    minus = np.arange(values.size).reshape(values.shape) % 3 == 0
    if data_type == "BFLOAT16":
        codes = (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    elif data_type in kinds:
        codes = values.astype(kinds[data_type])
        if data_type in ("FLOAT", "DOUBLE", "FLOAT16"):
            return np.where(minus & (values == 0), -codes, codes)
        return codes
    else:
        codes = values.astype(np.uint8)
    sign = _SIGN.get(data_type, 0)
    codes = np.where(minus & (values == 0), codes | codes.dtype.type(sign), codes)
    return nibbles(codes) if data_type in ("INT4", "UINT4", "FLOAT4E2M1") else codes


def node(op, inputs, output, name="", **attributes):
    return helper.make_node(op, inputs, [output], name=name or output, **attributes)


def states(path):
    return {row.node: row.state for row in check_sparsity(path)}


def constant(folder, data_type, shape, codes):
    return Constant(raw("c", data_type, shape, codes), folder)
