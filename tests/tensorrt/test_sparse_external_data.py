"""Weights in external files: short, missing, elsewhere, and read in pieces."""

from __future__ import annotations

import tracemalloc

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from compile_sparse.backends.tensorrt.sparsity import constant_zeros
from compile_sparse.backends.tensorrt.sparsity.sparse_gate import check_sparsity
from compile_sparse.compiler.errors import Refusal
from tests.tensorrt.sparse_files import (
    K,
    N,
    broken,
    matmul,
    nibbles,
    node,
    pruned,
    raw,
    save,
    states,
)


@pytest.fixture
def external(tmp_path):
    good = raw("w", TensorProto.INT4, (K, N), nibbles(pruned()))
    other = numpy_helper.from_array(broken(pruned(), (3, 3)).astype(np.float16), "v")
    nodes = [node("MatMul", ["x", "w"], "m1"), node("MatMul", ["x", "v"], "y", name="m2")]
    return save(
        tmp_path, nodes, [good, other], save_as_external_data=True, location="model.onnx.data", size_threshold=0
    )


def test_external_data(external, monkeypatch):
    assert states(external) == {"m1": "2:4", "m2": "dense"}
    monkeypatch.setattr(constant_zeros, "_CHUNK_ELEMENTS", 1)  # the smallest pieces: 32 rows of 64
    assert states(external) == {"m1": "2:4", "m2": "dense"}


def test_a_late_piece_of_external_data_is_read(tmp_path, monkeypatch):
    values = numpy_helper.from_array(broken(pruned(), (K - 1, 0)).astype(np.float16), "w")
    nodes = [node("MatMul", ["x", "w"], "y", name="mm")]
    path = save(tmp_path, nodes, [values], save_as_external_data=True, location="d", size_threshold=0)
    monkeypatch.setattr(constant_zeros, "_CHUNK_ELEMENTS", 1)
    assert states(path) == {"mm": "dense"}


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
            check_sparsity(matmul(tmp_path, raw("w", TensorProto.FLOAT16, (K, N), codes)))


def test_memory_does_not_follow_the_tensor(tmp_path):
    """64 MiB of fp16 under 32 MiB of Python memory: 8 pieces of 4M codes, each with a mask and a count."""
    rows = 8192
    weight = np.zeros((rows, 4096), np.float16)
    weight[::4] = 1
    path = save(
        tmp_path,
        [node("MatMul", ["x", "w"], "y", name="mm")],
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
