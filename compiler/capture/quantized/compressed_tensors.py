"""Checkpoints of compressed-tensors (llm-compressor): packed and plain integers, e4m3, and NVFP4.

Tensors of a module, as compressed-tensors 0.17 writes them (``compressors/``), for a weight ``[N, K]``:

- pack-quantized: ``weight_packed`` int32 ``[N, ceil(K / (32 // bits))]``, unsigned codes, the first in the lowest bits;
  ``weight_scale`` ``[N, groups]``; ``weight_shape``; ``weight_zero_point`` int32 packed along N; ``weight_g_idx`` ``[K]``.
- int-quantized, float-quantized: ``weight`` int8 or e4m3; ``weight_scale`` ``[N, 1]``, ``[N, groups]``, blocks or one number;
  ``weight_zero_point`` int8.
- nvfp4-pack-quantized: ``weight_packed`` uint8 ``[N, K / 2]``; ``weight_scale`` e4m3 ``[N, K / 16]``; ``weight_global_scale`` and
  ``input_global_scale``, divisors.

Which modules have codes is what the file says; the config says how those are meant.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from compile_sparse.compiler.capture.quantized.compressed_tensors_config import Arguments, Config, Group
from compile_sparse.compiler.capture.quantized.modules import modules, require, require_shape
from compile_sparse.compiler.capture.quantized.packed import fp4_codes, unpacked
from compile_sparse.compiler.capture.quantized.reading import Reading, as_stored, misfit, unread
from compile_sparse.compiler.capture.quantized.weights import (
    Activations,
    Integers,
    block_weight,
    channel_weight,
    computed,
    reshaped,
)
from compile_sparse.compiler.capture.safetensors_reader import StoredTensor
from compile_sparse.compiler.ir.ops.quantization import FAKE_QUANTIZE_GROUPS, NVFP4_GROUP
from compile_sparse.compiler.ir.quantization_schemes import Scheme, WeightFormat
from compile_sparse.compiler.ir.quantized_tensor import QuantizedTensor
from compile_sparse.compiler.ir.weights import TensorSource

__all__ = ["CompressedTensors"]

_MARKS = {"weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx", "weight_shape", "weight_global_scale"}
_BESIDE = {"weight", "input_scale", "input_zero_point", "input_global_scale", "output_scale", "output_zero_point"}
_CACHE = {"k_scale", "v_scale", "q_scale", "k_zero_point", "v_zero_point", "q_zero_point"}

Own = Mapping[str, StoredTensor]


@dataclass(frozen=True)
class CompressedTensors:
    """One checkpoint's."""

    config: Config
    name: str = "compressed-tensors"

    def read(self, tensors: Mapping[str, StoredTensor]) -> Reading:
        """See ``Method``."""
        found, rest = modules(tensors, _MARKS, _BESIDE)
        reading = Reading()
        reading.keep(rest, _CACHE)
        for stem, own in found.items():
            group = self.config.group_of(stem)
            if group.weights is None:
                raise misfit(stem, "It has codes, and its group in the config quantizes no weights.")
            stored = {part: as_stored(each) for part, each in own.items()}
            reading.add(f"{stem}.weight", *_weight(stem, stored, group, group.weights))
        return reading


def _weight(stem: str, own: Own, group: Group, weights: Arguments) -> tuple[TensorSource, str]:
    """The weight, and why it is in floating point."""
    activations, unknown = _activations(stem, own, group)
    require(stem, own, ["weight_scale"])
    source: TensorSource
    if "weight_packed" in own and own["weight_packed"].stored_dtype == torch.uint8:
        source, why = _nvfp4(stem, own, activations), ""
    elif weights.type == "int":
        integers = _integers(stem, own, weights)
        source, why = integers.source(activations), integers.why_float
    else:
        source, why = _floats(stem, own, weights, activations)
    if unknown and not why:
        return computed(source.shape, source.load, torch.float32), unknown
    return source, why


def _activations(stem: str, own: Own, group: Group) -> tuple[Activations, str]:
    """How inputs are quantized; and if there is no operator for it, why."""
    given = group.input_activations
    if group.output_activations is not None:
        return Activations(), "There is no operator for its quantized outputs, so its inputs are not quantized either."
    if given is None:
        return Activations(), ""
    kind, how = (given.type, given.num_bits), given.granularity
    if given.symmetric and kind == ("float", 4) and how == "tensor_group" and given.group_size == NVFP4_GROUP:
        require(stem, own, ["input_global_scale"])
        return Activations("fp4", own["input_global_scale"]), ""
    if given.symmetric and kind in (("int", 8), ("float", 8)):
        name = "int8" if given.type == "int" else "fp8"
        if how == "token" and given.dynamic is True:
            return Activations("int8" if name == "int8" else "fp8"), ""
        if how == "group" and given.dynamic is True and name == "fp8" and given.group_size == _FP8_GROUP:
            return Activations("fp8-group"), ""
        if how == "tensor" and given.dynamic is False:
            require(stem, own, ["input_scale"])
            require_shape(stem, "input_scale", own["input_scale"], (), (1,))
            return Activations("int8-static" if name == "int8" else "fp8-static", own["input_scale"]), ""
    found = f"{given.num_bits}-bit {given.type}, {how}, {'run-time' if given.dynamic else 'fixed'} ranges"
    found += "" if given.symmetric else ", zero points"
    return Activations(), f"There is no operator for its quantized inputs ({found}), which stay in floating point."


_FP8_GROUP = FAKE_QUANTIZE_GROUPS["fp8-group"]


def _integers(stem: str, own: Own, weights: Arguments) -> Integers:
    bits, scale = weights.num_bits, own["weight_scale"]
    if bits > 8:
        raise unread(f"{bits}-bit codes are not read by this version.", where=stem, why="It reads 1 to 8 bits.")
    packed = "weight_packed" in own
    rows, columns = shape = _shape(stem, own, bits) if packed else _plain(stem, own, torch.int8)
    group = _group(stem, weights, columns)
    groups = -(-columns // group) if group else 1
    shapes = [(rows, groups)] if group else [(rows, 1), (rows,), (1,), (), (1, 1)]
    require_shape(stem, "weight_scale", scale, *shapes)
    if not scale.stored_dtype.is_floating_point:
        raise misfit(
            f"{stem}.weight_scale", f"It has the type {scale.stored_dtype}; a floating-point type was expected."
        )
    wide = computed((rows, groups), lambda: scale.load().reshape(-1, groups).expand(rows, groups), scale.stored_dtype)
    middle = 2 ** (bits - 1)

    def codes() -> torch.Tensor:
        if packed:
            return unpacked(own["weight_packed"].load(), bits, 1)[:, :columns]
        return (own["weight"].load().to(torch.int16) + middle).to(torch.uint8)

    zeros = None
    if (point := own.get("weight_zero_point")) is not None and point.stored_dtype.is_floating_point:
        raise misfit(f"{stem}.weight_zero_point", f"It has the type {point.stored_dtype}; integers were expected.")
    if weights.symmetric and point is not None and not _all_in_the_middle(point.load(), bits):
        raise misfit(f"{stem}.weight_zero_point", "It is not zero, and its group in the config says symmetric.")
    if not weights.symmetric:
        require(stem, own, ["weight_zero_point"])
        point = own["weight_zero_point"]
        per_word = 32 // bits
        if packed and weights.granularity in ("group", "channel"):
            require_shape(stem, "weight_zero_point", point, (-(-rows // per_word), groups))
        else:
            require_shape(stem, "weight_zero_point", point, scale.shape)

        def zeros() -> torch.Tensor:
            if packed and point.stored_dtype == torch.int32:
                return unpacked(point.load(), bits, 0)[:rows]
            return (point.load().to(torch.int16) + middle).to(torch.uint8).reshape(-1, groups).expand(rows, groups)

    order = _order(stem, own, group, groups) if group else None
    return Integers(shape, bits, group, codes, wide, zeros, order)


def _all_in_the_middle(points: torch.Tensor, bits: int) -> bool:
    """Whether stored zero points, packed or not, move no code."""
    packed = points.dtype == torch.int32 and bool((unpacked(points.reshape(1, -1), bits, 1) == 2 ** (bits - 1)).all())
    return packed or not bool(points.any())


def _shape(stem: str, own: Own, bits: int) -> tuple[int, int]:
    """``(N, K)`` of a packed weight."""
    require(stem, own, ["weight_shape"])
    require_shape(stem, "weight_shape", own["weight_shape"], (2,))
    rows, columns = (int(size) for size in own["weight_shape"].load())
    packed = own["weight_packed"]
    if packed.stored_dtype != torch.int32:
        raise misfit(f"{stem}.weight_packed", f"It has the type {packed.stored_dtype}; int32 was expected.")
    require_shape(stem, "weight_packed", packed, (rows, -(-columns // (32 // bits))))
    return rows, columns


def _plain(stem: str, own: Own, stored: torch.dtype) -> tuple[int, int]:
    """``(N, K)`` of a weight that is one code per element."""
    require(stem, own, ["weight"])
    weight = own["weight"]
    if weight.stored_dtype != stored:
        why = f"It is {weight.stored_dtype}, and its group in the config means {stored}. Weights that are rounded when the model "
        why += "runs (status 'frozen') are not read."
        raise misfit(f"{stem}.weight", why)
    if len(weight.shape) != 2:
        raise misfit(f"{stem}.weight", f"It has the shape {list(weight.shape)}; a matrix was expected.")
    return weight.shape[0], weight.shape[1]


def _group(stem: str, weights: Arguments, columns: int) -> int:
    """Inputs per scale; 0 for all."""
    how, size = weights.granularity, weights.group_size or 0
    if how in ("tensor", "channel"):
        return 0
    if how != "group" or size <= 0:
        raise misfit(stem, f"Its group in the config has the strategy {how!r} with groups of {size}.")
    if columns > size and columns % size:
        raise misfit(stem, f"Its {columns} inputs are no multiple of its groups of {size}.")
    return size


def _order(stem: str, own: Own, group: int, groups: int) -> torch.Tensor | None:
    """Group of each input, where that is not its position's."""
    if "weight_g_idx" not in own:
        return None
    order = own["weight_g_idx"].load().to(torch.int64).reshape(-1)
    if bool((order < 0).any()):  # written, and never filled
        return None
    counts = torch.bincount(order, minlength=groups)
    if len(counts) != groups or bool((counts[:-1] != group).any()):
        raise misfit(f"{stem}.weight_g_idx", f"It does not put {group} inputs into each of {groups} groups.")
    return None if torch.equal(order, torch.arange(len(order)) // group) else order


def _floats(stem: str, own: Own, weights: Arguments, activations: Activations) -> tuple[TensorSource, str]:
    if weights.num_bits != 8:
        raise misfit(stem, f"Its group in the config has {weights.num_bits}-bit floats, and its codes are not NVFP4.")
    rows, columns = _plain(stem, own, torch.float8_e4m3fn)
    codes, scale, how = own["weight"], own["weight_scale"], weights.granularity
    if how in ("tensor", "channel"):
        require_shape(stem, "weight_scale", scale, (rows, 1), (rows,), (1,), (), (1, 1))
        return channel_weight("fp8", codes, scale, activations), ""
    if how == "block" and weights.block_structure:
        tall, wide = weights.block_structure
        require_shape(stem, "weight_scale", scale, (-(-rows // tall), -(-columns // wide)))
        if tall == wide:
            return block_weight(codes, scale, tall, activations), ""
        why = f"There is no operator for blocks of {tall}x{wide}."
    else:
        tall, wide = 1, _group(stem, weights, columns)
        require_shape(stem, "weight_scale", scale, (rows, -(-columns // wide)))
        why = "There is no operator for grouped scales of 8-bit floats."

    def values() -> torch.Tensor:
        steps = scale.load()
        spread = steps.repeat_interleave(tall, 0)[:rows].repeat_interleave(wide, 1)[:, :columns]
        return codes.load().to(steps.dtype) * spread

    return computed((rows, columns), values, torch.float32), why


def _nvfp4(stem: str, own: Own, activations: Activations) -> QuantizedTensor:
    require(stem, own, ["weight_packed", "weight_scale", "weight_global_scale"])
    rows, half = own["weight_packed"].shape
    scale = own["weight_scale"]
    require_shape(stem, "weight_scale", scale, (rows, -(-2 * half // NVFP4_GROUP)))
    if scale.stored_dtype != torch.float8_e4m3fn:
        raise misfit(f"{stem}.weight_scale", f"It has the type {scale.stored_dtype}; e4m3 was expected.")
    packed = own["weight_packed"]
    parts: dict[str, TensorSource] = {
        "codes": computed((rows, 2 * half), lambda: fp4_codes(packed.load()), torch.int8),
        "scale": scale,
        "global_scale": reshaped(own["weight_global_scale"], (1,)),
    }
    scheme = Scheme(WeightFormat("fp4", 4, group=NVFP4_GROUP), activations.form)
    return QuantizedTensor(scheme, parts | activations.parts(), (rows, 2 * half))
