"""MXFP4 checkpoints (GPT-OSS): experts as e2m1 values with a power of two per 32 of them.

``NAME_blocks`` uint8 ``[E, N, K / 32, 16]``, two values to a byte, the first in the low half; ``NAME_scales`` uint8
``[E, N, K / 32]``, exponents plus 127. In memory the tensor is ``[E, K, N]``. Open Compute Project, Microscaling Formats 1.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from compile_sparse.compiler.capture.quantized.packed import fp4_codes
from compile_sparse.compiler.capture.quantized.reading import Reading, as_stored, misfit
from compile_sparse.compiler.capture.quantized.weights import computed
from compile_sparse.compiler.capture.safetensors_reader import StoredTensor
from compile_sparse.compiler.ir.ops.quantization import FP4_VALUES
from compile_sparse.compiler.ir.weights import TensorSource

__all__ = ["Mxfp4"]

_BLOCKS, _SCALES = "_blocks", "_scales"
_BLOCK, _BIAS = 32, 127


@dataclass(frozen=True)
class Mxfp4:
    """It has no settings that matter here."""

    name: str = "MXFP4"

    def read(self, tensors: Mapping[str, StoredTensor]) -> Reading:
        """See ``Method``."""
        reading = Reading()
        for name, tensor in tensors.items():
            if name.endswith(_BLOCKS) and name.removesuffix(_BLOCKS) + _SCALES in tensors:
                plain = name.removesuffix(_BLOCKS)
                reading.sources[plain] = _experts(plain, as_stored(tensor), as_stored(tensors[plain + _SCALES]))
                reading.floats.setdefault("There is no operator for MXFP4 experts.", []).append(plain)
            elif not (name.endswith(_SCALES) and name.removesuffix(_SCALES) + _BLOCKS in tensors):
                reading.sources[name] = tensor
        return reading


def _experts(name: str, blocks: StoredTensor, scales: StoredTensor) -> TensorSource:
    fits = len(blocks.shape) == 4 and blocks.shape[-1] == _BLOCK // 2 and scales.shape == blocks.shape[:-1]
    if not fits or {blocks.stored_dtype, scales.stored_dtype} != {torch.uint8}:
        raise misfit(name, f"Its blocks are {list(blocks.shape)} and its scales {list(scales.shape)}.")
    experts, rows, count, _ = blocks.shape

    def values() -> torch.Tensor:
        table = torch.tensor((*FP4_VALUES, *(-value for value in FP4_VALUES)))
        made = torch.empty(experts, count * _BLOCK, rows)
        packed, exponents = blocks.load(), scales.load()
        for place in range(experts):  # codes and values of one expert at a time, beside the result
            steps = exponents[place].to(torch.int32).sub_(_BIAS).unsqueeze(-1)
            made[place] = torch.ldexp(table[fp4_codes(packed[place]).long()], steps).flatten(1).t()
        return made

    return computed((experts, count * _BLOCK, rows), values, torch.float32)
