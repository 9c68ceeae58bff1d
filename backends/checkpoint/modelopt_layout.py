"""The checkpoint format of NVIDIA ModelOpt 0.47: which tensors stand for a quantized weight, and the configs that describe them.

TensorRT-LLM's PyTorch backend, vLLM and SGLang read it. ModelOpt has no specification of it; this follows what
``export_hf_checkpoint`` writes (recorded in ``tests/tensorrt/recorded``) and, for NVFP4, its source
(``modelopt/torch/export/quant_utils.py``, ``.../qtensor/nvfp4_tensor.py``) and vLLM 0.32's loader
(``layers/quantization/modelopt.py``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from compile_sparse.compiler.errors import Refusal
from compile_sparse.compiler.ir.quantized_tensor import QuantizedTensor
from compile_sparse.compiler.ir.weights import DerivedTensor, TensorSource

__all__ = ["GROUP_SIZES", "Algorithm", "encoded", "hf_quant_config", "quantization_config"]

Algorithm = Literal["FP8", "FP8_PER_CHANNEL_PER_TOKEN", "NVFP4", "W4A16_AWQ", "W8A8_SQ_PER_CHANNEL"]
"""``quant_algo``: e4m3 with one static scale per tensor for weights and inputs; e4m3 with one per channel and one per token; e2m1
in groups of 16; int4 weights in groups; int8 with a scale per channel and static inputs."""

GROUP_SIZES = {"NVFP4": 16, "W4A16_AWQ": 128}
"""Weights per scale, along the inputs, of the algorithms that group them."""

_WEIGHT = ".weight"
_PRODUCER = {"name": "modelopt", "version": "0.47.0"}
"""Readers recognise the format by it (vLLM's ``_normalize_quantization_config``): it names the layout's definition."""


def encoded(
    name: str, tensor: QuantizedTensor, algorithm: Algorithm, *, dtype: torch.dtype, alone: bool
) -> dict[str, TensorSource]:
    """The tensors that stand for ``name`` (``....weight``, ``[N, K]``) in a checkpoint.

    FP8: ``weight`` float8 ``[N, K]``, ``weight_scale`` and ``input_scale`` float32 ``[]``.
    FP8_PER_CHANNEL_PER_TOKEN: ``weight`` float8 ``[N, K]``, ``weight_scale`` float32 ``[N]``.
    W8A8_SQ_PER_CHANNEL: ``weight`` int8 ``[N, K]``, ``weight_scale`` float32 ``[N]``, ``input_scale`` float32 ``[]``.
    W4A16_AWQ: ``weight`` uint8 ``[N / 2, K]`` (two outputs per byte, the even one in the low half, two's complement),
    ``weight_scale`` float32 ``[N, K / 128]``; where it is alone ``pre_quant_scale`` ``[K]`` in ``dtype``, all one.
    NVFP4: ``weight`` uint8 ``[N, K / 2]`` (two inputs per byte, the even one in the low half), ``weight_scale`` float8
    ``[N, K / 16]``, ``weight_scale_2`` and ``input_scale`` float32 ``[]``: the reciprocals of our divisors.

    Args:
        name: of the weight.
        tensor: it, quantized.
        algorithm: how they are stored.
        dtype: what the model computes in.
        alone: whether no reader joins the layer with others.

    Raises:
        Refusal: while a tensor is loaded: CS4602 when the scales of an FP8 weight differ, CS4604 when a scale of W4A16_AWQ would
            be rounded to ``dtype`` by the reader.
    """
    stem, parts = name.removesuffix(_WEIGHT), tensor.parts
    rows, columns = tensor.shape
    codes, scale = parts["codes"], parts["scale"]
    if algorithm == "FP8":
        found = {name: codes, f"{stem}.weight_scale": DerivedTensor((), torch.float32, lambda: _one(stem, scale))}
    elif algorithm in ("FP8_PER_CHANNEL_PER_TOKEN", "W8A8_SQ_PER_CHANNEL"):
        found = {name: codes, f"{stem}.weight_scale": scale}
    elif algorithm == "W4A16_AWQ":
        found = {
            name: DerivedTensor((rows // 2, columns), torch.uint8, lambda: _rows_packed(codes.load())),
            f"{stem}.weight_scale": DerivedTensor(scale.shape, torch.float32, lambda: _kept(stem, scale, dtype)),
        }
        if alone:  # TensorRT-LLM multiplies the inputs of such layers by it, and does not load them without
            ones = torch.ones(columns, dtype=dtype)
            found[f"{stem}.pre_quant_scale"] = DerivedTensor((columns,), dtype, lambda: ones)
    else:
        divisor = parts["global_scale"]
        found = {
            name: DerivedTensor((rows, columns // 2), torch.uint8, lambda: _columns_packed(codes.load())),
            f"{stem}.weight_scale": scale,
            f"{stem}.weight_scale_2": DerivedTensor((), torch.float32, lambda: 1 / divisor.load().reshape(())),
        }
    if "input_scale" in parts:
        given = parts["input_scale"]
        turned = algorithm == "NVFP4"
        found[f"{stem}.input_scale"] = DerivedTensor(
            (), torch.float32, lambda: (1 / given.load() if turned else given.load()).reshape(()).contiguous()
        )
    return found


def hf_quant_config(algorithm: Algorithm, exclude: Sequence[str]) -> dict[str, Any]:
    """``hf_quant_config.json``: of a model whose linear layers all follow ``algorithm``, except ``exclude`` (module names)."""
    quantization: dict[str, Any] = {"quant_algo": algorithm, "kv_cache_quant_algo": None}
    if algorithm in GROUP_SIZES:
        quantization["group_size"] = GROUP_SIZES[algorithm]
    if algorithm == "W4A16_AWQ":
        quantization |= {"has_zero_point": False, "pre_quant_scale": True}
    return {"producer": dict(_PRODUCER), "quantization": {**quantization, "exclude_modules": sorted(exclude)}}


def quantization_config(algorithm: Algorithm, exclude: Sequence[str]) -> dict[str, Any]:
    """The same as ``quantization_config`` of ``config.json``, in ModelOpt's second spelling."""
    described = {
        "FP8": {"dynamic": False, "num_bits": 8, "type": "float"},
        "NVFP4": {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16},
    }.get(algorithm)
    groups: Mapping[str, Any] = {}
    if described:
        groups = {
            "config_groups": {
                "group_0": {"input_activations": described, "weights": described, "targets": ["Linear"]},
            }
        }
    return {
        **groups,
        "ignore": sorted(exclude),
        "quant_algo": algorithm,
        "producer": dict(_PRODUCER),
        "quant_method": "modelopt",
    }


def _one(stem: str, source: TensorSource) -> torch.Tensor:
    """The scale that all channels share, exactly."""
    values = source.load().to(torch.float32).reshape(-1)
    if bool((values != values[0]).any()):
        raise Refusal(
            "CS4602",
            "ModelOpt's FP8 format has one scale per weight.",
            where=stem,
            why=f"Its {values.numel()} channels have scales from {float(values.min()):.4g} to {float(values.max()):.4g}, and "
            "another scale would need other codes.",
            hint="--quantize fp8-tensor, which has one scale per weight, or fp8, whose inputs are scaled per token.",
        )
    return values[0].clone()


def _kept(stem: str, source: TensorSource, dtype: torch.dtype) -> torch.Tensor:
    """Scales in float32 that ``dtype`` can represent."""
    values = source.load().to(torch.float32)
    if bool((values.to(dtype).to(torch.float32) != values).any()):
        short = str(dtype).removeprefix("torch.")
        raise Refusal(
            "CS4604",
            "A reader of this format would round the scales.",
            where=stem,
            why=f"TensorRT-LLM keeps them in the model's type, {short}, which cannot represent them exactly.",
            hint="Quantize for a target whose precision is the model's.",
        )
    return values.contiguous()


def _rows_packed(codes: torch.Tensor) -> torch.Tensor:
    pairs = codes.to(torch.uint8).bitwise_and(0xF).unflatten(0, (-1, 2))
    return (pairs[:, 0] | (pairs[:, 1] << 4)).contiguous()


def _columns_packed(codes: torch.Tensor) -> torch.Tensor:
    pairs = codes.to(torch.uint8).bitwise_and(0xF).unflatten(1, (-1, 2))
    return (pairs[..., 0] | (pairs[..., 1] << 4)).contiguous()
