"""GPTQ and AWQ: random codes, packed one by one in numpy, come back as they were; values are the formats' own arithmetic."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from compile_sparse.compiler.capture.quantized.awq import read_awq
from compile_sparse.compiler.capture.quantized.gptq import read_gptq
from compile_sparse.compiler.errors import ModelError
from compile_sparse.compiler.ir.quantized_tensor import QuantizedTensor
from compile_sparse.compiler.ir.storage import stored_form
from tests.support.packing import awq_words, words
from tests.unit.capture.quantized.conftest import Read

Array = NDArray[Any]
N, K, GROUP = 24, 64, 16
W = "layer.weight"


def drawn(bits: int, groups: int, *, symmetric: bool, seed: int = 0) -> tuple[Array, Array, Array]:
    """Codes ``[K, N]``, zero points and float16 scales ``[groups, N]``. Every code and zero point that the format holds."""
    draws = np.random.default_rng(seed)
    codes = draws.integers(0, 2**bits, (K, N))
    zeros = np.full((groups, N), 2 ** (bits - 1)) if symmetric else draws.integers(1, 2**bits, (groups, N))
    return codes, zeros, draws.uniform(0.001, 0.1, (groups, N)).astype(np.float16)


def values(codes: Array, zeros: Array, scales: Array, order: Array) -> Array:
    """``[N, K]`` float16, as the kernels of the formats compute: rounded once."""
    return ((codes - zeros[order]).astype(np.float16) * scales[order]).T


def gptq(bits: int, codes: Array, zeros: Array, scales: Array, order: Array | None, less: int = 1) -> dict[str, Array]:
    tensors = {"qweight": words(codes, bits, 0), "qzeros": words(zeros - less, bits, 1), "scales": scales}
    if order is not None:
        tensors["g_idx"] = order.astype(np.int32)
    return {f"layer.{name}": value for name, value in tensors.items()} | {"layer.bias": np.ones(N, np.float32)}


def config(bits: int, **changes: Any) -> dict[str, Any]:
    return {"bits": bits, "group_size": GROUP, "sym": False, "checkpoint_format": "gptq", **changes}


IN_ORDER = np.arange(K) // GROUP


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gptq(read: Read, bits: int, symmetric: bool, version: str) -> None:
    codes, zeros, scales = drawn(bits, K // GROUP, symmetric=symmetric)
    tensors = gptq(bits, codes, zeros, scales, IN_ORDER, less=1 if version == "gptq" else 0)
    reading = read(read_gptq(config(bits, sym=symmetric, checkpoint_format=version), "test"), tensors)
    assert set(reading.sources) == {W, "layer.bias"}
    source = reading.sources[W]
    loaded = source.load().numpy()
    assert np.array_equal(loaded.astype(np.float16), values(codes, zeros, scales, IN_ORDER))
    kept = bits == 4 or (bits == 8 and symmetric)
    assert isinstance(source, QuantizedTensor) is kept
    assert list(reading.floats.values()) == ([] if kept else [[W]])
    if not kept:
        return
    middle = 2 ** (bits - 1) if symmetric else 0
    assert isinstance(source, QuantizedTensor)
    assert np.array_equal(source.parts["codes"].load().numpy(), codes.T - middle)
    assert np.array_equal(stored_form(source.parts["scale"]).load().numpy(), scales.T)
    assert stored_form(source.parts["scale"]).dtype == torch.float16
    if not symmetric:
        assert np.array_equal(source.parts["zero_point"].load().numpy(), zeros.T)


def test_gptq_with_one_group_and_no_order(read: Read) -> None:
    codes, zeros, scales = drawn(4, 1, symmetric=True)
    reading = read(read_gptq(config(4, group_size=-1), "test"), gptq(4, codes, zeros, scales, None))
    source = reading.sources[W]
    assert isinstance(source, QuantizedTensor)
    assert (source.scheme.weights.group, source.parts["scale"].shape) == (0, (N,))
    assert np.array_equal(source.load().numpy().astype(np.float16), values(codes, zeros, scales, np.zeros(K, int)))


def test_gptq_in_activation_order_is_read_as_its_values(read: Read) -> None:
    codes, zeros, scales = drawn(4, K // GROUP, symmetric=False)
    order = np.random.default_rng(3).permutation(IN_ORDER)
    reading = read(read_gptq(config(4, desc_act=True), "test"), gptq(4, codes, zeros, scales, order))
    assert np.array_equal(reading.sources[W].load().numpy(), values(codes, zeros, scales, order).astype(np.float32))
    (diagnostic,) = reading.diagnostics()
    assert (diagnostic.code, diagnostic.where) == ("CS2220", W)
    assert "activation order" in diagnostic.why


@pytest.mark.parametrize("group", [GROUP, -1])
@pytest.mark.parametrize("zero_point", [True, False])
def test_awq(read: Read, zero_point: bool, group: int) -> None:
    groups = K // group if group > 0 else 1
    codes, zeros, scales = drawn(4, groups, symmetric=not zero_point)
    tensors = {"layer.qweight": awq_words(codes), "layer.scales": scales}
    if zero_point:
        tensors["layer.qzeros"] = awq_words(zeros)
    reading = read(
        read_awq({"bits": 4, "group_size": group, "zero_point": zero_point, "version": "gemm"}, "test"), tensors
    )
    source = reading.sources[W]
    assert isinstance(source, QuantizedTensor)
    assert not reading.diagnostics()
    assert np.array_equal(source.parts["codes"].load().numpy(), codes.T - (0 if zero_point else 8))
    order = np.arange(K) // (group if group > 0 else K)
    assert np.array_equal(source.load().numpy().astype(np.float16), values(codes, zeros, scales, order))


def test_older_writers_use_other_words() -> None:
    assert read_awq({"w_bit": 4, "q_group_size": 64, "zero_point": True, "version": "GEMM"}, "test").group == 64
    assert read_gptq({"bits": 4, "group_size": 128}, "test").less_one


def without(name: str) -> Any:
    return lambda tensors: tensors.pop(f"layer.{name}")


def changed(name: str, value: Any) -> Any:
    return lambda tensors: tensors.__setitem__(f"layer.{name}", value)


@pytest.mark.parametrize(
    ("change", "where", "said"),
    [
        (without("scales"), "layer.scales", "missing"),
        (without("qzeros"), "layer.qzeros", "missing"),
        (changed("scales", np.ones((3, N), np.float16)), "layer.scales", "[3, 24]"),
        (changed("qzeros", np.zeros((4, 4), np.int32)), "layer.qzeros", "[4, 4]"),
        (changed("g_idx", np.full(K, 9, np.int32)), "layer.g_idx", "outside"),
        (changed("g_idx", np.full(K, -1, np.int32)), "layer.g_idx", "outside"),
        (changed("g_idx", np.zeros(5, np.int32)), "layer.g_idx", "[5]"),
        (changed("qweight", np.zeros((K // 8, N), np.float32)), "layer.qweight", "float32"),
        (changed("qzeros", np.full((4, 3), -1, np.int32)), "layer.qzeros", "disagree"),
        (changed("qzeros", np.zeros((4, 3), np.int32)), "layer.qzeros", "other version"),
    ],
)
def test_tensors_that_do_not_fit_are_named(read: Read, change: Any, where: str, said: str) -> None:
    codes, zeros, scales = drawn(4, K // GROUP, symmetric=True)
    tensors = gptq(4, codes, zeros, scales, IN_ORDER)
    change(tensors)
    with pytest.raises(ModelError) as caught:
        read(read_gptq(config(4, sym=True), "test"), tensors)
    assert (caught.value.code, caught.value.where) == ("CS2021", where)
    assert said in caught.value.why
