"""Round-to-nearest symmetric quantization of weight rows."""

from __future__ import annotations

import torch

__all__ = ["quantize_channels", "quantize_groups", "scale_shape"]


def scale_shape(channels: int, depth: int, group: int) -> tuple[int, ...]:
    """Shape of the scales of a ``[channels, depth]`` weight."""
    return (channels, -(-depth // group)) if group else (channels,)


def quantize_channels(rows: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``(codes int8 [N, K], scale float32 [N])``; codes use ``[-(2^(bits-1) - 1), 2^(bits-1) - 1]``, so that -q is a code too."""
    top = 2 ** (bits - 1) - 1
    scale = rows.abs().amax(dim=1) / top
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    codes = torch.round(rows / scale[:, None]).clamp_(-top, top)
    return codes.to(torch.int8), scale


def quantize_groups(rows: torch.Tensor, bits: int, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``(codes int8 [N, K], scale float32 [N, ceil(K / group)])``; a short last group is quantized on its own.

    The element of largest magnitude maps to ``-2^(bits-1)``, which uses the whole code range; its scale is then negative when
    that element is positive. With 4 bits this is one level in sixteen more than a range symmetric around zero.
    """
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    channels, depth = rows.shape
    groups = -(-depth // group)
    padded = torch.nn.functional.pad(rows, (0, groups * group - depth)).view(channels, groups, group)
    peak = padded.gather(2, padded.abs().argmax(dim=2, keepdim=True))
    scale = peak / low
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    codes = torch.round(padded / scale).clamp_(low, high)
    return codes.view(channels, -1)[:, :depth].to(torch.int8).contiguous(), scale.squeeze(2)
