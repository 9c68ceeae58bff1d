"""e4m3 checkpoints of the method "fp8": DeepSeek and Qwen3 in blocks, AutoFP8 with one scale per weight.

Tensors, for a weight ``[N, K]`` (or several, ``[E, N, K]``): the weight in e4m3; ``weight_scale_inv``
``[ceil(N / b), ceil(K / b)]``, which values are multiplied with in spite of its name (float32, or a power of two as e8m0); or
``weight_scale``, one number, and ``input_scale`` where ranges are fixed. A tensor that is not called ``weight`` has its own name
before ``_scale_inv``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict

from compile_sparse.compiler.capture.quantized.modules import require_shape
from compile_sparse.compiler.capture.quantized.reading import Reading, as_stored, misfit, parsed, unread
from compile_sparse.compiler.capture.quantized.weights import Activations, block_weight, channel_weight, computed
from compile_sparse.compiler.capture.safetensors_reader import StoredTensor
from compile_sparse.compiler.ir.ops.quantization import FAKE_QUANTIZE_GROUPS
from compile_sparse.compiler.ir.weights import TensorSource

__all__ = ["Fp8", "read_fp8"]

_SCALES = ("_scale_inv", "_scale")
_INPUTS = ("input_scale", "activation_scale")
_CACHE = ("k_scale", "v_scale")
_E8M0_BIAS = 127


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    activation_scheme: Literal["dynamic", "static"] = "dynamic"
    weight_block_size: tuple[int, int] | None = None


@dataclass(frozen=True)
class Fp8:
    """One checkpoint's.

    Attributes:
        block: sides of the blocks that share a scale; None for one scale per weight.
        static: whether ranges of activations are fixed.
    """

    block: tuple[int, int] | None
    static: bool
    name: str = "FP8"

    def read(self, tensors: Mapping[str, StoredTensor]) -> Reading:
        """See ``Method``."""
        reading, scales = Reading(), set[str]()
        for name, tensor in tensors.items():
            if tensor.stored_dtype in (torch.float8_e4m3fn, torch.int8, torch.uint8):
                scale = next((name + end for end in _SCALES if name + end in tensors), None)
                if scale is None:
                    continue
                scales.add(scale)
                self._weight(name, as_stored(tensor), as_stored(tensors[scale]), tensors, reading)
        done = reading.sources.keys() | scales
        rest = {
            name: each for name, each in tensors.items() if name not in done and name.rpartition(".")[2] not in _INPUTS
        }
        reading.keep(rest, _CACHE)
        return reading

    def _weight(
        self, name: str, codes: StoredTensor, scale: StoredTensor, tensors: Mapping[str, StoredTensor], reading: Reading
    ) -> None:
        if codes.stored_dtype != torch.float8_e4m3fn:
            why = f"{name} is {str(codes.stored_dtype).removeprefix('torch.')}, which holds two values to a byte."
            raise unread("4-bit weights of the method fp8 are not read by this version.", where=name, why=why)
        stem, _, last = name.rpartition(".")
        steps = _powers(scale) if scale.stored_dtype == torch.uint8 else scale
        plain = last == "weight" and len(codes.shape) == 2
        if scale.shape in ((), (1,)):
            if plain:
                reading.sources[name] = channel_weight("fp8", codes, steps, self._activations(stem, tensors))
                return
            tall, wide = codes.shape[-2:]
        elif self.block is None:
            raise misfit(name, f"It has scales {list(scale.shape)}, and the config names no weight_block_size.")
        else:
            tall, wide = self.block
        rows, columns = codes.shape[-2:]
        if scale.shape not in ((), (1,)):
            wanted = (*codes.shape[:-2], -(-rows // tall), -(-columns // wide))
            require_shape(stem, scale.name.rpartition(".")[2], scale, wanted)
        if plain and tall == wide:
            reading.sources[name] = block_weight(codes, steps, tall, self._activations(stem, tensors))
            return
        why = f"There is no operator for blocks of {tall}x{wide}." if plain else "It is no plain linear layer."
        reading.floats.setdefault(why, []).append(name)

        def values() -> torch.Tensor:
            wide_steps = steps.load().to(torch.float32)
            if wide_steps.numel() == 1:
                return codes.load().to(torch.float32) * wide_steps
            spread = wide_steps.repeat_interleave(tall, -2).repeat_interleave(wide, -1)
            return codes.load().to(torch.float32) * spread[..., :rows, :columns]

        reading.sources[name] = computed(codes.shape, values, torch.float32)

    def _activations(self, stem: str, tensors: Mapping[str, StoredTensor]) -> Activations:
        if self.static:
            found = next((f"{stem}.{part}" for part in _INPUTS if f"{stem}.{part}" in tensors), None)
            if found is None:
                raise misfit(f"{stem}.input_scale", "It is missing, and the config says that ranges are fixed.")
            require_shape(stem, found.rpartition(".")[2], tensors[found], (), (1,))
            return Activations("fp8-static", as_stored(tensors[found]))
        if self.block is None:
            return Activations("fp8")
        # Runtimes round inputs in runs as long as a block is wide.
        return Activations("fp8-group" if self.block[1] == FAKE_QUANTIZE_GROUPS["fp8-group"] else "")


def _powers(scale: StoredTensor) -> TensorSource:
    """e8m0 scales whose bytes are stored as integers."""
    return computed(scale.shape, lambda: (scale.load().to(torch.float32) - _E8M0_BIAS).exp2(), torch.float32)


def read_fp8(raw: Any, where: str) -> Fp8:
    """The method of a config of the method fp8.

    Raises:
        ModelError: CS2021.
    """
    config = parsed(_Config, raw, where)
    if config.weight_block_size and min(config.weight_block_size) < 1:
        raise misfit(where, f"weight_block_size is {list(config.weight_block_size)}.")
    return Fp8(config.weight_block_size, config.activation_scheme == "static")
