"""The N:M check on a finished ONNX file: every format, every path to a constant, and what must not pass."""

from __future__ import annotations

import tracemalloc

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from compile_sparse.backends.tensorrt.sparsity import constant_zeros
from compile_sparse.backends.tensorrt.sparsity.constant_zeros import Constant, Groups, is_all_zero
from compile_sparse.backends.tensorrt.sparsity.sparse_gate import check_sparsity, require_pattern
from compile_sparse.compiler.errors import Refusal

K, N = 64, 16
_FLOAT = TensorProto.FLOAT


def _pruned(shape=(K, N), axis=0, n=2, m=4, seed=0):
    """Integers from 1 to 7, of which the last ``m - n`` of each group along ``axis`` are zero."""
    values = np.random.default_rng(seed).integers(1, 8, shape)
    at = np.arange(shape[axis]) % m >= n
    values[tuple(at if i == axis else slice(None) for i in range(len(shape)))] = 0
    return values


def _broken(values, index):
    """One value more than the pattern allows."""
    changed = values.copy()
    changed[index] = 1
    return changed


def _raw(name, data_type, shape, codes):
    return TensorProto(name=name, data_type=data_type, dims=shape, raw_data=np.ascontiguousarray(codes).tobytes())


def _nibbles(values):
    flat = np.append(values.reshape(-1), [0] * (values.size % 2)).astype(np.uint8) & 0xF
    return flat[0::2] | (flat[1::2] << 4)


def _save(folder, nodes, constants, inputs=("x",), name="model.onnx", **options):
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(i, _FLOAT, None) for i in inputs],
        [helper.make_tensor_value_info("y", _FLOAT, None)],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)])
    onnx.save(model, str(folder / name), **options)
    return folder / name


def _matmul(folder, weight):
    return _save(folder, [helper.make_node("MatMul", ["x", "w"], ["y"], name="mm")], [weight])


_SIGN = {"FLOAT16": 0x8000, "BFLOAT16": 0x8000, "FLOAT8E4M3FN": 0x80, "FLOAT8E5M2": 0x80, "FLOAT4E2M1": 0x8}


def _encoded(data_type, values):
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
    return _nibbles(codes) if data_type in ("INT4", "UINT4", "FLOAT4E2M1") else codes


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
    good = _pruned()
    for values, state in ((good, "2:4"), (_broken(good, (K - 1, N - 1)), "dense"), (_broken(good, (2, 0)), "dense")):
        (row,) = check_sparsity(_matmul(tmp_path, _raw("w", number, values.shape, _encoded(data_type, values))))
        assert (row.state, row.dtype, row.k, row.n, row.axis, row.tensor) == (state, data_type, K, N, 0, "w")
        assert bool(row.why) == (state == "dense")
        assert "1 of 256 groups" in row.why or not row.why


def test_the_sign_counts_where_a_format_has_one_zero(tmp_path):
    """0x80 is NaN in the FNUZ formats, and -8 in int8: neither is zero."""
    codes = np.where(_pruned() == 0, 0x80, 1).astype(np.uint8)
    for data_type, state in (("FLOAT8E4M3FN", "2:4"), ("FLOAT8E4M3FNUZ", "dense"), ("INT8", "dense")):
        (row,) = check_sparsity(_matmul(tmp_path, _raw("w", TensorProto.DataType.Value(data_type), (K, N), codes)))
        assert row.state == state, data_type


@pytest.mark.parametrize("data_type", ["FLOAT8E8M0", "FLOAT6E2M3"])
def test_formats_that_are_not_read_are_dense(tmp_path, data_type):
    weight = _raw("w", TensorProto.DataType.Value(data_type), (K, N), np.zeros((K, N), np.uint8))
    (row,) = check_sparsity(_matmul(tmp_path, weight))
    assert (row.state, row.why) == ("dense", f"Zeros of {data_type} are not read.")


@pytest.mark.parametrize(
    "data_type", ["FLOAT", "DOUBLE", "FLOAT16", "BFLOAT16", "INT8", "INT4", "FLOAT8E4M3FN", "INT64", "UINT64"]
)
def test_values_in_typed_fields(tmp_path, data_type):
    good = _pruned() * (-1 if data_type in ("INT8", "INT64", "FLOAT") else 1)
    for values, state in ((good, "2:4"), (_broken(good, (3, 3)), "dense")):
        weight = helper.make_tensor(
            "w", TensorProto.DataType.Value(data_type), values.shape, values.reshape(-1).tolist()
        )
        assert not weight.raw_data
        (row,) = check_sparsity(_matmul(tmp_path, weight))
        assert row.state == state


def test_low_nibble_is_the_first_element(tmp_path):
    """One bad group on the left half of each byte only: the other order would see two good groups."""
    values = np.zeros((4, 2), np.int64)
    values[:3, 0] = 1  # column 0 has three values, column 1 none; they share bytes
    weight = _raw("w", TensorProto.INT4, values.shape, _nibbles(values))
    assert Constant(weight, tmp_path).groups(0, 2, 4) == Groups(2, 1)
    along = np.array([[1, 0, 1, 0, 0, 1, 1, 1]])  # bytes: 01 01 10 11
    weight = _raw("w", TensorProto.INT4, along.shape, _nibbles(along))
    assert Constant(weight, tmp_path).groups(1, 2, 4) == Groups(2, 1)
    order = next(Constant(weight, tmp_path).nonzero(8))
    assert order.tolist() == [bool(v) for v in along[0]]


@pytest.mark.parametrize("data_type", ["FLOAT16", "INT4", "INT2"])
def test_pieces_give_what_the_whole_gives(tmp_path, monkeypatch, data_type):
    """Shapes whose pieces end within a byte would be read wrong."""
    values = np.random.default_rng(1).integers(0, 2, (36, 3))
    packed = {"FLOAT16": values.astype(np.float16), "INT4": _nibbles(values)}
    if data_type == "INT2":
        flat = values.reshape(-1, 4).astype(np.uint8)
        packed["INT2"] = flat[:, 0] | flat[:, 1] << 2 | flat[:, 2] << 4 | flat[:, 3] << 6
    weight = _raw("w", TensorProto.DataType.Value(data_type), values.shape, packed[data_type])
    for n, m in ((2, 4), (1, 3)):  # groups of three end within a byte
        expected = int(((values.reshape(-1, m, 3) != 0).sum(1) > n).sum())
        assert 0 < expected < 108 // m
        for step in (1, 97, 1 << 20):
            monkeypatch.setattr(constant_zeros, "_CHUNK_ELEMENTS", step)
            assert Constant(weight, tmp_path).groups(0, n, m) == Groups(108 // m, expected)


def test_other_patterns(tmp_path):
    path = _matmul(tmp_path, numpy_helper.from_array(_pruned(n=1, m=4).astype(np.float32), "w"))
    assert [check_sparsity(path, n=n, m=m)[0].state for n, m in ((1, 4), (2, 4), (2, 8), (1, 8))] == [
        "1:4",
        "2:4",
        "2:8",
        "dense",
    ]
    with pytest.raises(ValueError, match="4:4"):
        check_sparsity(path, n=4, m=4)


def _node(op, inputs, output, name="", **attributes):
    return helper.make_node(op, inputs, [output], name=name or output, **attributes)


def _states(path):
    return {row.node: row.state for row in check_sparsity(path)}


def test_what_lies_between_weight_and_product(tmp_path):
    w, scale = numpy_helper.from_array(_pruned().astype(np.float16), "w"), numpy_helper.from_array(np.float16(1), "s")
    turned = numpy_helper.from_array(np.ascontiguousarray(_pruned().T).astype(np.float16), "t")
    zero = numpy_helper.from_array(np.int8(0), "zero")
    shape = numpy_helper.from_array(np.array([K, N]), "shape")
    nodes = [
        _node("Cast", ["w"], "cast", to=_FLOAT),
        _node("Identity", ["cast"], "same"),
        _node("MatMul", ["x", "same"], "m1"),
        _node("Transpose", ["t"], "turned"),
        _node("MatMul", ["x", "turned"], "m2"),
        _node("QuantizeLinear", ["w", "s", "zero"], "q"),
        _node("DequantizeLinear", ["q", "s", "zero"], "dq"),
        _node("MatMul", ["x", "dq"], "m3"),
        _node("TRT_FP8QuantizeLinear", ["w", "s"], "q8", domain="trt"),
        _node("TRT_FP8DequantizeLinear", ["q8", "s"], "dq8", domain="trt"),
        _node("MatMul", ["x", "dq8"], "m4"),
        _node("Reshape", ["w", "shape"], "reshaped"),
        _node("MatMul", ["x", "reshaped"], "m5"),
        _node("MatMul", ["x", "x2"], "m6"),
        _node("MatMul", ["t", "x"], "m7"),
        _node("Transpose", ["w"], "wrong"),
        _node("MatMul", ["x", "wrong"], "m8"),
        _node("Mul", ["w", "s"], "scaled"),
        _node("MatMul", ["x", "scaled"], "y", name="m9"),
    ]
    path = _save(tmp_path, nodes, [w, scale, turned, zero, shape], ("x", "x2"))
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
    stored = np.moveaxis(_pruned((3, K, N), axis=1), (0, 1, 2), (1, 2, 0)).astype(np.float32)  # [N, 3, K]
    nodes = [_node("Transpose", ["w"], "t", perm=[1, 2, 0]), _node("MatMul", ["x", "t"], "y", name="mm")]
    (row,) = check_sparsity(_save(tmp_path, nodes, [numpy_helper.from_array(stored, "w")]))
    assert (row.state, row.axis, row.k, row.n, row.shape) == ("2:4", 2, K, N, (N, 3, K))


def test_gemm_and_conv_axes(tmp_path):
    kn = _pruned().astype(np.float32)
    conv = _pruned((N, 8, 3, 3), axis=1).astype(np.float32)
    constants = [
        numpy_helper.from_array(kn, "kn"),
        numpy_helper.from_array(np.ascontiguousarray(kn.T), "nk"),
        numpy_helper.from_array(conv, "conv"),
        numpy_helper.from_array(_pruned((N, 8, 4, 4), axis=3).astype(np.float32), "along_width"),
    ]
    nodes = [
        _node("Gemm", ["x", "kn"], "g1"),
        _node("Gemm", ["x", "nk"], "g2", transB=1),
        _node("Gemm", ["x", "nk"], "g3"),
        _node("Gemm", ["kn", "x"], "g4", transA=1),
        _node("Conv", ["x", "conv"], "c1"),
        _node("Conv", ["x", "along_width"], "y", name="c2"),
    ]
    rows = {row.node: row for row in check_sparsity(_save(tmp_path, nodes, constants))}
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
    nodes = [_node("MatMul", ["x", "odd"], "m1"), _node("MatMul", ["x", "small"], "y", name="m2")]
    constants = [
        numpy_helper.from_array(np.zeros((6, 16), np.float32), "odd"),
        numpy_helper.from_array(np.zeros((36, 12), np.float32), "small"),
    ]
    odd, small = check_sparsity(_save(tmp_path, nodes, constants))
    assert (odd.state, odd.why) == ("K % 4", "K = 6 is not a multiple of 4.")
    assert small.state == "2:4"
    assert small.remarks == ("K = 36 is not a multiple of 32.", "N = 12 is not a multiple of 8.")


@pytest.mark.parametrize(
    ("zero_point", "state"), [(0, "2:4"), (3, "dense"), (None, "2:4"), ("cast", "2:4"), ("input", "dense")]
)
def test_a_zero_point_moves_the_zeros(tmp_path, zero_point, state):
    codes = numpy_helper.from_array(_pruned().astype(np.int8), "w")
    scale = numpy_helper.from_array(np.ones(N, np.float32), "s")
    constants, nodes, inputs = [codes, scale], [], ["x"]
    operands = ["w", "s"]
    if zero_point == "input":
        operands.append("x")
    elif zero_point is not None:
        values = np.zeros(N, np.int8)
        values[-1] = 0 if zero_point == "cast" else zero_point  # one column is enough
        constants.append(numpy_helper.from_array(values, "z"))
        nodes = [_node("Cast", ["z"], "zc", to=TensorProto.INT8)] if zero_point == "cast" else []
        operands.append("zc" if zero_point == "cast" else "z")
    nodes += [_node("DequantizeLinear", operands, "d", axis=1), _node("MatMul", ["x", "d"], "y", name="mm")]
    (row,) = check_sparsity(_save(tmp_path, nodes, constants, inputs))
    assert row.state == state
    assert bool(row.why) == (state == "dense")


def test_zero_points_of_small_formats(tmp_path):
    assert is_all_zero(_constant(tmp_path, TensorProto.INT4, (3,), np.array([0, 0], np.uint8)))
    assert not is_all_zero(_constant(tmp_path, TensorProto.INT4, (3,), np.array([0, 1], np.uint8)))
    assert is_all_zero(_constant(tmp_path, TensorProto.INT4, (3,), np.array([0, 0x10], np.uint8)))  # padding
    assert is_all_zero(_constant(tmp_path, TensorProto.FLOAT8E4M3FN, (1,), np.array([0x80], np.uint8)))
    assert not is_all_zero(_constant(tmp_path, TensorProto.FLOAT8E8M0, (1,), np.array([0], np.uint8)))


def _constant(folder, data_type, shape, codes):
    return Constant(_raw("c", data_type, shape, codes), folder)


def test_constants_that_are_nodes_and_graphs_within(tmp_path):
    weight = numpy_helper.from_array(_pruned().astype(np.float32), "")
    outer = numpy_helper.from_array(_broken(_pruned(), (3, 3)).astype(np.float32), "outer")
    inner = [
        helper.make_node("Constant", [], ["c"], value=weight),
        _node("MatMul", ["x", "c"], "i1"),
        _node("MatMul", ["x", "outer"], "i2"),
    ]
    graph = helper.make_graph(inner, "then", [], [helper.make_tensor_value_info("i1", _FLOAT, None)])
    nodes = [helper.make_node("If", ["x"], ["y"], name="if", then_branch=graph, else_branch=graph)]
    rows = check_sparsity(_save(tmp_path, nodes, [outer]))
    assert [(row.node, row.state) for row in rows] == [("i1", "2:4"), ("i2", "dense")] * 2


@pytest.fixture
def external(tmp_path):
    good = _raw("w", TensorProto.INT4, (K, N), _nibbles(_pruned()))
    other = numpy_helper.from_array(_broken(_pruned(), (3, 3)).astype(np.float16), "v")
    nodes = [_node("MatMul", ["x", "w"], "m1"), _node("MatMul", ["x", "v"], "y", name="m2")]
    return _save(
        tmp_path, nodes, [good, other], save_as_external_data=True, location="model.onnx.data", size_threshold=0
    )


def test_external_data(external, monkeypatch):
    assert _states(external) == {"m1": "2:4", "m2": "dense"}
    monkeypatch.setattr(constant_zeros, "_CHUNK_ELEMENTS", 1)  # the smallest pieces: 32 rows of 64
    assert _states(external) == {"m1": "2:4", "m2": "dense"}


def test_a_late_piece_of_external_data_is_read(tmp_path, monkeypatch):
    values = numpy_helper.from_array(_broken(_pruned(), (K - 1, 0)).astype(np.float16), "w")
    nodes = [_node("MatMul", ["x", "w"], "y", name="mm")]
    path = _save(tmp_path, nodes, [values], save_as_external_data=True, location="d", size_threshold=0)
    monkeypatch.setattr(constant_zeros, "_CHUNK_ELEMENTS", 1)
    assert _states(path) == {"mm": "dense"}


def test_external_data_that_is_short_missing_or_elsewhere(external):
    data = external.with_name("model.onnx.data")
    whole = data.read_bytes()
    data.write_bytes(whole[:-8])
    with pytest.raises(Refusal, match="CS4502") as caught:
        check_sparsity(external)
    assert "'v'" in caught.value.what
    data.unlink()
    with pytest.raises(Refusal, match="there is no file"):
        check_sparsity(external)
    data.write_bytes(whole)
    model = onnx.load(str(external), load_external_data=False)
    entry = next(e for e in model.graph.initializer[0].external_data if e.key == "location")
    entry.value = "../elsewhere.data"
    external.with_name("moved.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(Refusal, match="outside the model's folder"):
        check_sparsity(external.with_name("moved.onnx"))
    entry.value = "model.onnx.data"
    length = next(e for e in model.graph.initializer[0].external_data if e.key == "length")
    for wrong, part in ((str(int(length.value) + 1), "which says"), ("many", "not a number")):
        length.value = wrong
        external.with_name("moved.onnx").write_bytes(model.SerializeToString())
        with pytest.raises(Refusal, match=part):
            check_sparsity(external.with_name("moved.onnx"))


def test_data_of_the_wrong_size(tmp_path):
    for codes in (np.zeros(K * N - 1, np.float16), np.zeros(2 * K * N + 1, np.uint8), np.zeros(0, np.uint8)):
        with pytest.raises(Refusal, match="CS4502"):
            check_sparsity(_matmul(tmp_path, _raw("w", TensorProto.FLOAT16, (K, N), codes)))


def test_memory_does_not_follow_the_tensor(tmp_path):
    """64 MiB of fp16 under 32 MiB of Python memory: 8 pieces of 4M codes, each with a mask and a count."""
    rows = 8192
    weight = np.zeros((rows, 4096), np.float16)
    weight[::4] = 1
    path = _save(
        tmp_path,
        [_node("MatMul", ["x", "w"], "y", name="mm")],
        [numpy_helper.from_array(weight, "w")],
        save_as_external_data=True,
        location="d",
    )
    del weight
    tracemalloc.start()
    (row,) = check_sparsity(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert row.state == "2:4"
    assert peak < 32 << 20


def _gate_rows(tmp_path):
    good, bad = _pruned().astype(np.float32), np.ones((K, N), np.float32)
    nodes = [
        _node("MatMul", ["x", "good"], "a"),
        _node("MatMul", ["x", "bad"], "b"),
        _node("Reshape", ["good", "x"], "r"),
        _node("MatMul", ["x", "r"], "c"),
        _node("MatMul", ["x", "good"], "y", name="d"),
    ]
    constants = [numpy_helper.from_array(good, "good"), numpy_helper.from_array(bad, "bad")]
    return check_sparsity(_save(tmp_path, nodes, constants))


def test_intended_layers_must_be_in_the_pattern(tmp_path):
    rows = _gate_rows(tmp_path)
    require_pattern(rows, {"a": "good", "d": ""})
    require_pattern(rows, {})
    with pytest.raises(Refusal, match="CS4501") as caught:
        require_pattern(rows, {"a": "good", "b": "bad", "c": "good", "gone": "good", "d": "other"})
    error = caught.value
    assert error.what.startswith("4 of 5 products that were made 2:4")
    assert error.where == "b"
    for part in (
        "b: dense. 256 of 256 groups",
        "c: no constant. Reshape 'r' stands before it",
        "gone: the file has no such product",
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
    assert caught.value.why.count("no such product") == 8
    assert "and 22 more" in caught.value.why
