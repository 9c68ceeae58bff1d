"""Every path from a stored constant to the GEMM that reads it, and what must not pass."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from compile_sparse.backends.tensorrt.sparsity.constant_zeros import is_all_zero
from compile_sparse.backends.tensorrt.sparsity.sparse_gate import check_sparsity
from tests.tensorrt.sparse_files import (
    FLOAT,
    K,
    N,
    broken,
    constant,
    node,
    pruned,
    save,
)


def test_what_lies_between_weight_and_product(tmp_path):
    w, scale = numpy_helper.from_array(pruned().astype(np.float16), "w"), numpy_helper.from_array(np.float16(1), "s")
    turned = numpy_helper.from_array(np.ascontiguousarray(pruned().T).astype(np.float16), "t")
    zero = numpy_helper.from_array(np.int8(0), "zero")
    shape = numpy_helper.from_array(np.array([K, N]), "shape")
    nodes = [
        node("Cast", ["w"], "cast", to=FLOAT),
        node("Identity", ["cast"], "same"),
        node("MatMul", ["x", "same"], "m1"),
        node("Transpose", ["t"], "turned"),
        node("MatMul", ["x", "turned"], "m2"),
        node("QuantizeLinear", ["w", "s", "zero"], "q"),
        node("DequantizeLinear", ["q", "s", "zero"], "dq"),
        node("MatMul", ["x", "dq"], "m3"),
        node("TRT_FP8QuantizeLinear", ["w", "s"], "q8", domain="trt"),
        node("TRT_FP8DequantizeLinear", ["q8", "s"], "dq8", domain="trt"),
        node("MatMul", ["x", "dq8"], "m4"),
        node("Reshape", ["w", "shape"], "reshaped"),
        node("MatMul", ["x", "reshaped"], "m5"),
        node("MatMul", ["x", "x2"], "m6"),
        node("MatMul", ["t", "x"], "m7"),
        node("Transpose", ["w"], "wrong"),
        node("MatMul", ["x", "wrong"], "m8"),
        node("Mul", ["w", "s"], "scaled"),
        node("MatMul", ["x", "scaled"], "y", name="m9"),
    ]
    path = save(tmp_path, nodes, [w, scale, turned, zero, shape], ("x", "x2"))
    rows = {row.node: row for row in check_sparsity(path)}
    assert {name: row.state for name, row in rows.items()} == {
        "m1": "2:4",
        "m2": "2:4",
        "m3": "2:4",
        "m4": "2:4",
        "m5": "no constant",
        "m6": "no constant",
        "m7": "2:4",  # a constant on the left: its last axis is contracted
        "m8": "dense",  # 2:4 along N is not 2:4 along K
        "m9": "no constant",
    }
    assert rows["m1"].path == ("Cast", "Identity")
    assert rows["m2"].path == ("Transpose",) and (rows["m2"].axis, rows["m2"].k, rows["m2"].n) == (1, K, N)
    assert any("Transpose" in remark for remark in rows["m2"].remarks) and not rows["m1"].remarks
    assert rows["m3"].path == ("QuantizeLinear", "DequantizeLinear")
    assert rows["m5"].why == "Reshape 'reshaped' stands before it."
    assert "input of the graph" in rows["m6"].why
    assert (rows["m7"].axis, rows["m7"].k, rows["m7"].n) == (1, K, N)


def test_permuted_and_batched_weights(tmp_path):
    stored = np.moveaxis(pruned((3, K, N), axis=1), (0, 1, 2), (1, 2, 0)).astype(np.float32)  # [N, 3, K]
    nodes = [node("Transpose", ["w"], "t", perm=[1, 2, 0]), node("MatMul", ["x", "t"], "y", name="mm")]
    (row,) = check_sparsity(save(tmp_path, nodes, [numpy_helper.from_array(stored, "w")]))
    assert (row.state, row.axis, row.k, row.n, row.shape) == ("2:4", 2, K, N, (N, 3, K))


def test_gemm_and_conv_axes(tmp_path):
    kn = pruned().astype(np.float32)
    conv = pruned((N, 8, 3, 3), axis=1).astype(np.float32)
    constants = [
        numpy_helper.from_array(kn, "kn"),
        numpy_helper.from_array(np.ascontiguousarray(kn.T), "nk"),
        numpy_helper.from_array(conv, "conv"),
        numpy_helper.from_array(pruned((N, 8, 4, 4), axis=3).astype(np.float32), "along_width"),
    ]
    nodes = [
        node("Gemm", ["x", "kn"], "g1"),
        node("Gemm", ["x", "nk"], "g2", transB=1),
        node("Gemm", ["x", "nk"], "g3"),
        node("Gemm", ["kn", "x"], "g4", transA=1),
        node("Conv", ["x", "conv"], "c1"),
        node("Conv", ["x", "along_width"], "y", name="c2"),
    ]
    rows = {row.node: row for row in check_sparsity(save(tmp_path, nodes, constants))}
    assert {name: row.state for name, row in rows.items()} == {
        "g1": "2:4",
        "g2": "2:4",
        "g3": "dense",
        "g4": "2:4",
        "c1": "2:4",
        "c2": "dense",
    }
    assert [(rows[name].axis, rows[name].k, rows[name].n) for name in ("g1", "g2", "c1")] == [
        (0, K, N),
        (1, K, N),
        (1, 8, N),
    ]


def test_k_that_no_group_divides_and_alignment(tmp_path):
    nodes = [node("MatMul", ["x", "odd"], "m1"), node("MatMul", ["x", "small"], "y", name="m2")]
    constants = [
        numpy_helper.from_array(np.zeros((6, 16), np.float32), "odd"),
        numpy_helper.from_array(np.zeros((36, 12), np.float32), "small"),
    ]
    odd, small = check_sparsity(save(tmp_path, nodes, constants))
    assert (odd.state, odd.why) == ("K % 4", "K = 6 is not a multiple of 4.")
    assert small.state == "2:4"
    assert small.remarks == ("K = 36 is not a multiple of 32.", "N = 12 is not a multiple of 8.")


@pytest.mark.parametrize(
    ("zero_point", "state"), [(0, "2:4"), (3, "dense"), (None, "2:4"), ("cast", "2:4"), ("input", "dense")]
)
def test_a_zero_point_moves_the_zeros(tmp_path, zero_point, state):
    codes = numpy_helper.from_array(pruned().astype(np.int8), "w")
    scale = numpy_helper.from_array(np.ones(N, np.float32), "s")
    constants, nodes, inputs = [codes, scale], [], ["x"]
    operands = ["w", "s"]
    if zero_point == "input":
        operands.append("x")
    elif zero_point is not None:
        values = np.zeros(N, np.int8)
        values[-1] = 0 if zero_point == "cast" else zero_point  # one column is enough
        constants.append(numpy_helper.from_array(values, "z"))
        nodes = [node("Cast", ["z"], "zc", to=TensorProto.INT8)] if zero_point == "cast" else []
        operands.append("zc" if zero_point == "cast" else "z")
    nodes += [node("DequantizeLinear", operands, "d", axis=1), node("MatMul", ["x", "d"], "y", name="mm")]
    (row,) = check_sparsity(save(tmp_path, nodes, constants, inputs))
    assert row.state == state
    assert bool(row.why) == (state == "dense")


def test_zero_points_of_small_formats(tmp_path):
    assert is_all_zero(constant(tmp_path, TensorProto.INT4, (3,), np.array([0, 0], np.uint8)))
    assert not is_all_zero(constant(tmp_path, TensorProto.INT4, (3,), np.array([0, 1], np.uint8)))
    assert is_all_zero(constant(tmp_path, TensorProto.INT4, (3,), np.array([0, 0x10], np.uint8)))  # padding
    assert is_all_zero(constant(tmp_path, TensorProto.FLOAT8E4M3FN, (1,), np.array([0x80], np.uint8)))
    assert not is_all_zero(constant(tmp_path, TensorProto.FLOAT8E8M0, (1,), np.array([0], np.uint8)))


def test_constants_that_are_nodes_and_graphs_within(tmp_path):
    weight = numpy_helper.from_array(pruned().astype(np.float32), "")
    outer = numpy_helper.from_array(broken(pruned(), (3, 3)).astype(np.float32), "outer")
    inner = [
        helper.make_node("Constant", [], ["c"], value=weight),
        node("MatMul", ["x", "c"], "i1"),
        node("MatMul", ["x", "outer"], "i2"),
    ]
    graph = helper.make_graph(inner, "then", [], [helper.make_tensor_value_info("i1", FLOAT, None)])
    nodes = [helper.make_node("If", ["x"], ["y"], name="if", then_branch=graph, else_branch=graph)]
    rows = check_sparsity(save(tmp_path, nodes, [outer]))
    assert [(row.node, row.state) for row in rows] == [("i1", "2:4"), ("i2", "dense")] * 2
