"""FP8, MXFP4 and ModelOpt: values are those that transformers' own code, or numpy from the description, computes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import _convert_moe_packed_tensors

from compile_sparse.compiler.capture.quantized.fp8 import read_fp8
from compile_sparse.compiler.capture.quantized.modelopt import read_modelopt
from compile_sparse.compiler.capture.quantized.mxfp4 import Mxfp4
from compile_sparse.compiler.errors import ModelError
from compile_sparse.compiler.ir.quantized_tensor import QuantizedTensor
from tests.support.packing import nibble_pairs
from tests.unit.capture.quantized.conftest import Read

W = "layer.weight"
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def e4m3(*shape: int) -> torch.Tensor:
    return (100 * torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(torch.float8_e4m3fn)


def positive(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 0.01 + 1e-4


def test_fp8_in_blocks(read: Read) -> None:
    codes, scale = e4m3(256, 384), positive(2, 3)
    reading = read(read_fp8({"weight_block_size": [128, 128]}, "test"), {W: codes, f"{W}_scale_inv": scale})
    source = reading.sources[W]
    assert set(reading.sources) == {W}
    assert isinstance(source, QuantizedTensor)
    assert (source.scheme.weights.block, source.scheme.activations) == (128, "fp8-group")
    wanted = Fp8Dequantize(None)._dequantize_one(codes, scale)
    assert torch.equal(source.load(), wanted)
    assert torch.equal(source.parts["codes"].load().view(torch.uint8), codes.view(torch.uint8))


def test_fp8_blocks_at_the_edge_are_cut(read: Read) -> None:
    """576 rows, as in DeepSeek's latent projections, are five blocks: transformers cannot read that, DeepSeek's own code does."""
    codes, scale = e4m3(576, 200), positive(5, 2)
    reading = read(read_fp8({"weight_block_size": [128, 128]}, "test"), {W: codes, f"{W}_scale_inv": scale})
    spread = np.repeat(np.repeat(scale.numpy(), 128, 0), 128, 1)[:576, :200]
    assert np.array_equal(reading.sources[W].load().numpy(), codes.float().numpy() * spread)


@pytest.mark.parametrize("stored", ["e8m0", "bytes"])
def test_fp8_scales_may_be_powers_of_two(read: Read, stored: str) -> None:
    exponents = torch.tensor([[120, 127], [130, 110]], dtype=torch.uint8)
    scale = exponents.view(torch.float8_e8m0fnu) if stored == "e8m0" else exponents
    codes = e4m3(256, 256)
    source = read(read_fp8({"weight_block_size": [128, 128]}, "test"), {W: codes, f"{W}_scale_inv": scale}).sources[W]
    assert isinstance(source, QuantizedTensor)
    assert torch.equal(source.load(), Fp8Dequantize(None)._dequantize_one(codes, exponents, torch.float32))


@pytest.mark.parametrize("static", [True, False])
def test_fp8_with_one_scale(read: Read, static: bool) -> None:
    codes, scale = e4m3(8, 16), positive(1)
    tensors = {W: codes, f"{W}_scale": scale, "layer.input_scale": torch.tensor(0.25)}
    scheme = {"activation_scheme": "static" if static else "dynamic"}
    source = read(read_fp8(scheme, "test"), tensors).sources[W]
    assert isinstance(source, QuantizedTensor)
    assert source.scheme.activations == ("fp8-static" if static else "fp8")
    assert source.scheme.weights.per_tensor
    assert torch.equal(source.load(), codes.float() * scale)
    if static:
        assert source.parts["input_scale"].load().tolist() == [0.25]


def test_fp8_experts_are_read_as_values(read: Read) -> None:
    codes, scale = e4m3(3, 256, 128), positive(3, 2, 1)
    name = "experts.gate_up_proj"
    reading = read(read_fp8({"weight_block_size": [128, 128]}, "test"), {name: codes, f"{name}_scale_inv": scale})
    wanted = torch.stack([Fp8Dequantize(None)._dequantize_one(c, s) for c, s in zip(codes, scale, strict=True)])
    assert torch.equal(reading.sources[name].load(), wanted)
    assert list(reading.floats.values()) == [[name]]


@pytest.mark.parametrize(
    ("tensors", "described", "code"),
    [
        ({W: e4m3(256, 256), f"{W}_scale_inv": positive(2, 3)}, {"weight_block_size": [128, 128]}, "CS2021"),
        ({W: e4m3(256, 256), f"{W}_scale_inv": positive(2, 2)}, {}, "CS2021"),
        ({W: e4m3(8, 8), f"{W}_scale": positive(1)}, {"activation_scheme": "static"}, "CS2021"),
        ({W: e4m3(8, 8).view(torch.int8), f"{W}_scale_inv": positive(1)}, {"weight_block_size": [128, 128]}, "CS2020"),
    ],
)
def test_fp8_that_does_not_fit_is_refused(
    read: Read, tensors: dict[str, Any], described: dict[str, Any], code: str
) -> None:
    with pytest.raises(ModelError) as caught:
        read(read_fp8(described, "test"), tensors)
    assert caught.value.code == code


def test_mxfp4_experts(read: Read) -> None:
    draws = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 10, 4, 16), dtype=torch.uint8, generator=draws)
    scales = torch.randint(110, 140, (3, 10, 4), dtype=torch.uint8, generator=draws)
    name = "experts.down_proj"
    tensors = {f"{name}_blocks": blocks, f"{name}_scales": scales, f"{name}_bias": torch.ones(3, 10)}
    reading = read(Mxfp4(), tensors)
    assert set(reading.sources) == {name, f"{name}_bias"}
    assert torch.equal(reading.sources[name].load(), _convert_moe_packed_tensors(blocks, scales, dtype=torch.float32))
    assert reading.diagnostics()[0].code == "CS2220"


def test_mxfp4_that_does_not_fit_is_refused(read: Read) -> None:
    tensors = {
        "a_blocks": torch.zeros(3, 10, 4, 16, dtype=torch.uint8),
        "a_scales": torch.zeros(3, 10, 5, dtype=torch.uint8),
    }
    with pytest.raises(ModelError) as caught:
        read(Mxfp4(), tensors)
    assert caught.value.code == "CS2021"


def modelopt(algorithm: str) -> tuple[dict[str, Any], torch.Tensor, str]:
    """Tensors of a layer, its values in numpy, and the format of its inputs."""
    draws = np.random.default_rng(0)
    if algorithm in ("W8A8_SQ_PER_CHANNEL", "W8A16"):
        codes, scale = torch.from_numpy(draws.integers(-128, 128, (8, 32), np.int8)), positive(8)
        return {"weight": codes, "weight_scale": scale}, codes.float() * scale[:, None], "int8-static"
    if algorithm == "FP8":
        codes, scale = e4m3(8, 32), positive(1)[0]
        return {"weight": codes, "weight_scale": scale}, codes.float() * scale, "fp8-static"
    if algorithm == "FP8_PER_CHANNEL_PER_TOKEN":
        codes, scale = e4m3(8, 32), positive(8)
        return {"weight": codes, "weight_scale": scale}, codes.float() * scale[:, None], "fp8"
    if algorithm == "fp8_pb_wo":
        codes, scale = e4m3(256, 128), positive(2, 1, 1, 1)
        return {"weight": codes, "weight_scale": scale}, codes.float() * scale[:, :, 0, 0].repeat_interleave(128, 0), ""
    if algorithm == "W4A16_AWQ":
        plain, scale = draws.integers(-8, 8, (8, 256)), positive(8, 2)
        wanted = torch.from_numpy(plain).float() * scale.repeat_interleave(128, 1)
        return {"weight": nibble_pairs(plain.astype(np.int8).view(np.uint8), 0), "weight_scale": scale}, wanted, ""
    plain, scale = draws.integers(0, 16, (8, 32)), (positive(8, 2) * 1000).to(torch.float8_e4m3fn)
    whole = torch.tensor(2.0**-9)
    wanted = torch.from_numpy(E2M1[plain]) * (scale.float() * whole).repeat_interleave(16, 1)
    return {"weight": nibble_pairs(plain), "weight_scale": scale, "weight_scale_2": whole}, wanted, "fp4"


ALGORITHMS = ("W8A8_SQ_PER_CHANNEL", "W8A16", "FP8", "FP8_PER_CHANNEL_PER_TOKEN", "fp8_pb_wo", "W4A16_AWQ", "NVFP4")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_modelopt(read: Read, algorithm: str) -> None:
    own, wanted, inputs = modelopt(algorithm)
    inputs = "" if algorithm == "W8A16" else inputs
    tensors = {f"layer.{name}": value for name, value in {**own, "input_scale": torch.tensor(0.5)}.items()}
    reading = read(read_modelopt({"quant_algo": algorithm}, "test"), tensors)
    source = reading.sources[W]
    assert set(reading.sources) == {W}
    assert isinstance(source, QuantizedTensor)
    assert source.scheme.activations == inputs
    assert torch.equal(source.load(), wanted)
    if inputs.endswith("static"):
        assert source.parts["input_scale"].load().tolist() == [0.5]
    if inputs == "fp4":
        assert source.parts["input_scale"].load().tolist() == [2.0]


def test_a_factor_that_no_divisor_stands_for_is_multiplied_with(read: Read) -> None:
    own, _, _ = modelopt("NVFP4")
    own["weight_scale_2"] = torch.tensor(0.013102272)
    tensors = {f"layer.{name}": value for name, value in {**own, "input_scale": torch.tensor(0.5)}.items()}
    reading = read(read_modelopt({"quant_algo": "NVFP4"}, "test"), tensors)
    plain = np.stack([own["weight"] & 15, own["weight"] >> 4], -1).reshape(8, 32)
    steps = (own["weight_scale"].float() * own["weight_scale_2"]).repeat_interleave(16, 1)
    assert torch.equal(reading.sources[W].load(), torch.from_numpy(E2M1[plain]) * steps)
    assert list(reading.floats.values()) == [[W]]


@pytest.mark.parametrize("ones", [True, False])
def test_inputs_that_are_multiplied_first(read: Read, ones: bool) -> None:
    own, wanted, _ = modelopt("W4A16_AWQ")
    factors = torch.ones(256) if ones else positive(256)
    tensors = {f"layer.{name}": value for name, value in {**own, "pre_quant_scale": factors}.items()}
    reading = read(read_modelopt({"quant_algo": "W4A16_AWQ", "group_size": 128}, "test"), tensors)
    assert isinstance(reading.sources[W], QuantizedTensor) is ones
    assert torch.equal(reading.sources[W].load(), wanted * factors)


def test_layers_may_differ_and_a_quantized_cache_is_left_out(read: Read) -> None:
    first, wanted, _ = modelopt("FP8")
    second, also, _ = modelopt("W8A16")
    tensors = {f"a.{name}": value for name, value in first.items()} | {
        f"b.{name}": value for name, value in second.items()
    }
    tensors |= {"a.input_scale": torch.tensor(0.5), "attn.k_scale": torch.tensor(1.0), "norm.weight": torch.ones(3)}
    layers = {"a": {"quant_algo": "FP8"}, "b": {"quant_algo": "W8A16"}}
    reading = read(read_modelopt({"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}, "test"), tensors)
    assert set(reading.sources) == {"a.weight", "b.weight", "norm.weight"}
    assert torch.equal(reading.sources["a.weight"].load(), wanted)
    assert torch.equal(reading.sources["b.weight"].load(), also)
    assert [(each.code, each.where) for each in reading.diagnostics()] == [("CS2221", "attn.k_scale")]
