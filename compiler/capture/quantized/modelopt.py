"""Unified checkpoints of NVIDIA ModelOpt (0.47), described by ``hf_quant_config.json`` or ``quantization_config``.

Tensors of a module, for a weight ``[N, K]``; scales are factors:

- W8A8_SQ_PER_CHANNEL, W8A16: ``weight`` int8, ``weight_scale`` ``[N]``. FP8: ``weight`` e4m3, ``weight_scale`` one number.
  FP8_PER_CHANNEL_PER_TOKEN: ``weight_scale`` ``[N]``. FP8_PB_WO: ``weight_scale`` ``[N / 128, 1, K / 128, 1]``.
- W4A16_AWQ: ``weight`` uint8 ``[N / 2, K]``, the even output in the low half, two's complement; ``weight_scale`` ``[N, K / g]``.
- NVFP4: ``weight`` uint8 ``[N, K / 2]``, the even input in the low half; ``weight_scale`` e4m3 ``[N, K / 16]``;
  ``weight_scale_2``, one number.
- ``input_scale``: of fixed ranges. ``pre_quant_scale`` ``[K]``: what inputs are multiplied with first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field

from compile_sparse.compiler.capture.quantized.modules import modules, require, require_shape
from compile_sparse.compiler.capture.quantized.packed import fp4_codes, signed_nibbles
from compile_sparse.compiler.capture.quantized.reading import Reading, as_stored, misfit, parsed, unread
from compile_sparse.compiler.capture.quantized.weights import Activations, block_weight, channel_weight, computed
from compile_sparse.compiler.capture.safetensors_reader import StoredTensor
from compile_sparse.compiler.ir.ops.quantization import FP4_VALUES, NVFP4_GROUP
from compile_sparse.compiler.ir.quantization_schemes import Scheme, WeightFormat
from compile_sparse.compiler.ir.quantized_tensor import QuantizedTensor
from compile_sparse.compiler.ir.weights import ResidentTensor, TensorSource

__all__ = ["ModelOpt", "read_modelopt"]

_MARKS = {"weight_scale", "weight_scale_2", "pre_quant_scale"}
_BESIDE = {"weight", "input_scale"}
_CACHE = {"k_scale", "v_scale"}
_BLOCK = 128
_NVFP4 = {"NVFP4", "NVFP4_AWQ", "W4A16_NVFP4"}
_READ = {
    *("W8A8_SQ_PER_CHANNEL", "W8A16", "FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "W4A16_AWQ"),
    *_NVFP4,
}
_STORED = {"FP8": torch.float8_e4m3fn, "W8A": torch.int8, "W4A": torch.uint8, "NVF": torch.uint8}
"""Start of an algorithm's name -> type of its codes."""

Own = Mapping[str, StoredTensor]


class _Layer(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    quant_algo: str | None = None
    group_size: int | None = Field(default=None, ge=1)
    has_zero_point: bool | None = None


class _Config(_Layer):
    quantized_layers: dict[str, _Layer] = Field(default_factory=dict)


@dataclass(frozen=True)
class ModelOpt:
    """One checkpoint's.

    Attributes:
        whole: algorithm of all layers, in capitals.
        layers: of single layers, by module, where they differ.
    """

    whole: str
    layers: Mapping[str, str] = field(default_factory=dict)
    name: str = "ModelOpt"

    def read(self, tensors: Mapping[str, StoredTensor]) -> Reading:
        """See ``Method``."""
        found, rest = modules(tensors, _MARKS, _BESIDE)
        reading = Reading()
        reading.keep(rest, _CACHE)
        for stem, own in found.items():
            algorithm = self.layers.get(stem, self.whole)
            if algorithm not in _READ:
                raise _refused(algorithm, stem)
            stored = {part: as_stored(each) for part, each in own.items()}
            reading.add(f"{stem}.weight", *_weight(stem, stored, algorithm))
        return reading


def _weight(stem: str, own: Own, algorithm: str) -> tuple[TensorSource, str]:
    """The weight, and why it is in floating point."""
    require(stem, own, ["weight", "weight_scale"])
    wanted = _STORED[algorithm[:3]]
    if own["weight"].stored_dtype != wanted or len(own["weight"].shape) != 2:
        found = f"It is {own['weight'].stored_dtype} of shape {list(own['weight'].shape)}"
        raise misfit(f"{stem}.weight", f"{found}; {algorithm} is a matrix of {wanted}.")
    source, why = _coded(stem, own, algorithm)
    factors = own.get("pre_quant_scale")
    if factors is None:
        return source, why
    require_shape(stem, "pre_quant_scale", factors, (source.shape[1],))
    if bool((factors.load() == 1).all()):
        return source, why

    def folded() -> torch.Tensor:
        return source.load() * factors.load().to(torch.float32)

    return computed(source.shape, folded, torch.float32), "Its inputs are multiplied first (pre_quant_scale)."


def _coded(stem: str, own: Own, algorithm: str) -> tuple[TensorSource, str]:
    codes, scale = own["weight"], own["weight_scale"]
    rows, columns = codes.shape
    if algorithm in _NVFP4:
        return _nvfp4(stem, own, weights_only=algorithm.startswith("W4A16"))
    if algorithm == "W4A16_AWQ":
        rows *= 2
        groups = scale.shape[-1] if scale.shape else 0
        require_shape(stem, "weight_scale", scale, (rows, groups))
        if not groups or columns % groups:
            raise misfit(f"{stem}.weight_scale", f"{groups} groups do not divide {columns} inputs.")
        plain = computed((rows, columns), lambda: signed_nibbles(codes.load()), torch.int8)
        return channel_weight("int", plain, scale, Activations(), bits=4, group=columns // groups), ""
    if algorithm == "FP8_PB_WO":
        tall, wide = -(-rows // _BLOCK), -(-columns // _BLOCK)
        require_shape(stem, "weight_scale", scale, (tall, 1, wide, 1), (tall, wide))
        return block_weight(codes, scale, _BLOCK, Activations()), ""
    kind = "fp8" if algorithm.startswith("FP8") else "int"
    require_shape(stem, "weight_scale", scale, *([(), (1,)] if algorithm == "FP8" else [(rows,), (rows, 1)]))
    activations = Activations()
    if algorithm == "FP8_PER_CHANNEL_PER_TOKEN":
        activations = Activations("fp8")
    elif algorithm in ("FP8", "W8A8_SQ_PER_CHANNEL"):
        require(stem, own, ["input_scale"])
        require_shape(stem, "input_scale", own["input_scale"], (), (1,))
        activations = Activations("fp8-static" if kind == "fp8" else "int8-static", own["input_scale"])
    return channel_weight(kind, codes, scale, activations), ""


def _nvfp4(stem: str, own: Own, *, weights_only: bool) -> tuple[TensorSource, str]:
    require(stem, own, ["weight_scale_2", *([] if weights_only else ["input_scale"])])
    packed, scale = own["weight"], own["weight_scale"]
    rows, columns = packed.shape[0], 2 * packed.shape[1]
    require_shape(stem, "weight_scale", scale, (rows, -(-columns // NVFP4_GROUP)))
    require_shape(stem, "weight_scale_2", own["weight_scale_2"], (), (1,))
    factor = own["weight_scale_2"].load().to(torch.float32).reshape(1)
    if scale.stored_dtype != torch.float8_e4m3fn or not bool(torch.isfinite(factor)) or float(factor) <= 0:
        raise misfit(f"{stem}.weight_scale_2", f"It is {float(factor)}, above scales of type {scale.stored_dtype}.")
    divisor = _divisor(factor)
    if divisor is None:
        table = torch.tensor((*FP4_VALUES, *(-value for value in FP4_VALUES)))

        def values() -> torch.Tensor:
            steps = (scale.load().to(torch.float32) * factor).repeat_interleave(NVFP4_GROUP, 1)[:, :columns]
            return table[fp4_codes(packed.load()).long()] * steps

        why = "Its scale for the whole weight is a factor whose reciprocal, a divisor, would round some values differently."
        return computed((rows, columns), values, torch.float32), why
    parts: dict[str, TensorSource] = {
        "codes": computed((rows, columns), lambda: fp4_codes(packed.load()), torch.int8),
        "scale": scale,
        "global_scale": ResidentTensor(divisor),
    }
    if not weights_only:
        given = own["input_scale"]
        parts["input_scale"] = computed((1,), lambda: 1 / given.load().to(torch.float32).reshape(1), torch.float32)
    form = WeightFormat("fp4", 4, group=NVFP4_GROUP)
    return QuantizedTensor(Scheme(form, "" if weights_only else "fp4"), parts, (rows, columns)), ""


def _divisor(factor: torch.Tensor) -> torch.Tensor | None:
    """A number by which every e4m3 scale can be divided with the same result as times ``factor``, if there is one."""
    scales = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.float32)
    about = 1 / factor
    for candidate in (about, torch.nextafter(about, about * 0), torch.nextafter(about, about * 2)):
        if torch.equal(scales / candidate, scales * factor):
            return candidate
    return None


def read_modelopt(raw: Any, where: str) -> ModelOpt:
    """The method of a ModelOpt config: the value of ``quantization`` or ``quantization_config``.

    Raises:
        ModelError: CS2020, CS2021.
    """
    config = parsed(_Config, raw, where)
    whole = (config.quant_algo or "").upper()
    layers = {name: (layer.quant_algo or "").upper() for name, layer in config.quantized_layers.items()}
    for algorithm in (whole, *layers.values()):
        if algorithm not in _READ and not (algorithm == "MIXED_PRECISION" and layers) and algorithm:
            raise _refused(algorithm, where)
    if config.has_zero_point or any(layer.has_zero_point for layer in config.quantized_layers.values()):
        why = "ModelOpt has no published layout of them."
        raise unread("ModelOpt weights with zero points are not read by this version.", where=where, why=why)
    return ModelOpt(whole, layers)


def _refused(algorithm: str, where: str) -> Exception:
    why = f"It reads {', '.join(sorted(_READ))}."
    return unread(f"ModelOpt's {algorithm or 'unnamed algorithm'} is not read by this version.", where=where, why=why)
