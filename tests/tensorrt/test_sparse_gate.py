"""The N:M check on a finished ONNX file: every format, other patterns, and the gate."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from compile_sparse.backends.tensorrt.sparsity import constant_zeros
from compile_sparse.backends.tensorrt.sparsity.constant_zeros import Constant, Groups
from compile_sparse.backends.tensorrt.sparsity.sparse_gate import check_sparsity, require_pattern
from compile_sparse.compiler.errors import Refusal
from tests.tensorrt.sparse_files import (
    K,
    N,
    broken,
    encoded,
    matmul,
    nibbles,
    node,
    pruned,
    raw,
    save,
)


@pytest.mark.parametrize(
    "data_type",
    [
        "FLOAT",
        "DOUBLE",
        "FLOAT16",
        "BFLOAT16",
        "FLOAT8E4M3FN",
        "FLOAT8E5M2",
        "INT8",
        "UINT8",
        "INT4",
        "UINT4",
        "FLOAT4E2M1",
    ],
)
def test_every_format_both_ways(tmp_path, data_type):
    number = TensorProto.DataType.Value(data_type)
    good = pruned()
    for values, state in ((good, "2:4"), (broken(good, (K - 1, N - 1)), "dense"), (broken(good, (2, 0)), "dense")):
        (row,) = check_sparsity(matmul(tmp_path, raw("w", number, values.shape, encoded(data_type, values))))
        assert (row.state, row.dtype, row.k, row.n, row.axis, row.tensor) == (state, data_type, K, N, 0, "w")
        assert bool(row.why) == (state == "dense")
        assert "1 of 256 groups" in row.why or not row.why


def test_the_sign_counts_where_a_format_has_one_zero(tmp_path):
    """0x80 is NaN in the FNUZ formats, and -8 in int8: neither is zero."""
    codes = np.where(pruned() == 0, 0x80, 1).astype(np.uint8)
    for data_type, state in (("FLOAT8E4M3FN", "2:4"), ("FLOAT8E4M3FNUZ", "dense"), ("INT8", "dense")):
        (row,) = check_sparsity(matmul(tmp_path, raw("w", TensorProto.DataType.Value(data_type), (K, N), codes)))
        assert row.state == state, data_type


@pytest.mark.parametrize("data_type", ["FLOAT8E8M0", "FLOAT6E2M3"])
def test_formats_that_are_not_read_are_dense(tmp_path, data_type):
    weight = raw("w", TensorProto.DataType.Value(data_type), (K, N), np.zeros((K, N), np.uint8))
    (row,) = check_sparsity(matmul(tmp_path, weight))
    assert (row.state, row.why) == ("dense", f"Zeros of {data_type} are not read.")


@pytest.mark.parametrize(
    "data_type", ["FLOAT", "DOUBLE", "FLOAT16", "BFLOAT16", "INT8", "INT4", "FLOAT8E4M3FN", "INT64", "UINT64"]
)
def test_values_in_typed_fields(tmp_path, data_type):
    good = pruned() * (-1 if data_type in ("INT8", "INT64", "FLOAT") else 1)
    for values, state in ((good, "2:4"), (broken(good, (3, 3)), "dense")):
        weight = helper.make_tensor(
            "w", TensorProto.DataType.Value(data_type), values.shape, values.reshape(-1).tolist()
        )
        assert not weight.raw_data
        (row,) = check_sparsity(matmul(tmp_path, weight))
        assert row.state == state


def test_low_nibble_is_the_first_element(tmp_path):
    """One bad group on the left half of each byte only: the other order would see two good groups."""
    values = np.zeros((4, 2), np.int64)
    values[:3, 0] = 1  # column 0 has three values, column 1 none; they share bytes
    weight = raw("w", TensorProto.INT4, values.shape, nibbles(values))
    assert Constant(weight, tmp_path).groups(0, 2, 4) == Groups(2, 1)
    along = np.array([[1, 0, 1, 0, 0, 1, 1, 1]])  # bytes: 01 01 10 11
    weight = raw("w", TensorProto.INT4, along.shape, nibbles(along))
    assert Constant(weight, tmp_path).groups(1, 2, 4) == Groups(2, 1)
    order = next(Constant(weight, tmp_path).nonzero(8))
    assert order.tolist() == [bool(v) for v in along[0]]


@pytest.mark.parametrize("data_type", ["FLOAT16", "INT4", "INT2"])
def test_pieces_give_what_the_whole_gives(tmp_path, monkeypatch, data_type):
    """Shapes whose pieces end within a byte would be read wrong."""
    values = np.random.default_rng(1).integers(0, 2, (36, 3))
    packed = {"FLOAT16": values.astype(np.float16), "INT4": nibbles(values)}
    if data_type == "INT2":
        flat = values.reshape(-1, 4).astype(np.uint8)
        packed["INT2"] = flat[:, 0] | flat[:, 1] << 2 | flat[:, 2] << 4 | flat[:, 3] << 6
    weight = raw("w", TensorProto.DataType.Value(data_type), values.shape, packed[data_type])
    for n, m in ((2, 4), (1, 3)):  # groups of three end within a byte
        expected = int(((values.reshape(-1, m, 3) != 0).sum(1) > n).sum())
        assert 0 < expected < 108 // m
        for step in (1, 97, 1 << 20):
            monkeypatch.setattr(constant_zeros, "_CHUNK_ELEMENTS", step)
            assert Constant(weight, tmp_path).groups(0, n, m) == Groups(108 // m, expected)


def test_other_patterns(tmp_path):
    path = matmul(tmp_path, numpy_helper.from_array(pruned(n=1, m=4).astype(np.float32), "w"))
    assert [check_sparsity(path, n=n, m=m)[0].state for n, m in ((1, 4), (2, 4), (2, 8), (1, 8))] == [
        "1:4",
        "2:4",
        "2:8",
        "dense",
    ]
    with pytest.raises(ValueError, match="4:4"):
        check_sparsity(path, n=4, m=4)


def _gate_rows(tmp_path):
    good, bad = pruned().astype(np.float32), np.ones((K, N), np.float32)
    nodes = [
        node("MatMul", ["x", "good"], "a"),
        node("MatMul", ["x", "bad"], "b"),
        node("Reshape", ["good", "x"], "r"),
        node("MatMul", ["x", "r"], "c"),
        node("MatMul", ["x", "good"], "y", name="d"),
    ]
    constants = [numpy_helper.from_array(good, "good"), numpy_helper.from_array(bad, "bad")]
    return check_sparsity(save(tmp_path, nodes, constants))


def test_intended_layers_must_be_in_the_pattern(tmp_path):
    rows = _gate_rows(tmp_path)
    require_pattern(rows, {"a": "good", "d": ""})
    require_pattern(rows, {})
    with pytest.raises(Refusal, match="CS4501") as caught:
        require_pattern(rows, {"a": "good", "b": "bad", "c": "good", "gone": "good", "d": "other"})
    error = caught.value
    assert error.what.startswith("4 of 5 GEMMs that were made 2:4")
    assert error.where == "b"
    for part in (
        "b: dense. 256 of 256 groups",
        "c: no constant. Reshape 'r' stands before it",
        "gone: the file has no such GEMM",
        "d: its weight is 'good', not 'other'",
    ):
        assert part in error.why
    assert "a:" not in error.why


def test_two_products_of_one_name_must_both_hold(tmp_path):
    rows = _gate_rows(tmp_path)
    twin = [row for row in rows if row.node in ("a", "b")]
    renamed = [type(row)(**{**row.__dict__, "node": "same"}) for row in twin]
    for order in (renamed, renamed[::-1]):
        with pytest.raises(Refusal, match="1 of 1"):
            require_pattern(order, {"same": ""})


def test_many_faults_are_counted_not_listed(tmp_path):
    with pytest.raises(Refusal, match="30 of 30") as caught:
        require_pattern([], {f"layer.{i}": "" for i in range(30)})
    assert caught.value.why.count("no such GEMM") == 8
    assert "and 22 more" in caught.value.why
