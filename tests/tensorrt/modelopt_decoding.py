"""What the tensors of a ModelOpt checkpoint stand for, written from ModelOpt 0.47's export and from nothing of ours.

Imports torch alone: ``benchmarks/modelopt_layouts.py`` runs it on folders that ModelOpt itself wrote, in ModelOpt's environment,
and records how far the result is from the weights that were quantized.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

__all__ = ["decode"]

_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_GROUP = 16


def decode(stem: str, tensors: Mapping[str, torch.Tensor], algorithm: str | None) -> torch.Tensor:
    """Float32 weight ``[N, K]`` of the linear layer ``stem``.

    Args:
        stem: module name.
        tensors: of the whole checkpoint.
        algorithm: ``quant_algo`` of the checkpoint, or None. Weights of 16-bit and wider floating-point types are what they are.
    """
    weight = tensors[f"{stem}.weight"]
    if algorithm is None or weight.dtype in (torch.float32, torch.float16, torch.bfloat16):
        return weight.float()
    scale = tensors[f"{stem}.weight_scale"]
    if algorithm == "FP8":
        assert scale.shape == ()
        return weight.float() * scale
    if algorithm in ("FP8_PER_CHANNEL_PER_TOKEN", "W8A8_SQ_PER_CHANNEL"):
        return weight.float() * scale[:, None]
    if algorithm == "W4A16_AWQ":
        return _int4(weight) * scale.float().repeat_interleave(weight.shape[1] // scale.shape[1], 1)
    if algorithm == "NVFP4":
        return _fp4(weight) * scale.float().repeat_interleave(_GROUP, 1) * tensors[f"{stem}.weight_scale_2"]
    raise ValueError(f"there is no decoder for {algorithm}")


def _int4(packed: torch.Tensor) -> torch.Tensor:
    """Two output rows per byte, the even one in the low half, in two's complement."""
    rows = torch.stack((packed & 0xF, packed >> 4), 1).flatten(0, 1).to(torch.int16)
    return torch.where(rows > 7, rows - 16, rows).float()


def _fp4(packed: torch.Tensor) -> torch.Tensor:
    """Two inputs per byte, the even one in the low half."""
    codes = torch.stack((packed & 0xF, packed >> 4), 2).flatten(1).long()
    return torch.tensor((*_FP4, *(-value for value in _FP4)))[codes]
