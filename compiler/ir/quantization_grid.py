"""Which values the codes of a quantized weight stand for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch

from compile_sparse.compiler.ir.ops.quantization import FP4_VALUES, to_fp4_codes, to_fp8
from compile_sparse.compiler.ir.quantization_schemes import WeightFormat

__all__ = ["QuantizationGrid", "as_stored"]


def as_stored(scale: torch.Tensor, stored: torch.dtype = torch.float32) -> torch.Tensor:
    """Scales as float32 values that ``stored`` can hold; 1 where that is zero."""
    rounded = scale.to(stored).to(torch.float32)
    return torch.where(rounded == 0, torch.ones_like(rounded), rounded)


@dataclass(frozen=True, eq=False)
class QuantizationGrid:
    """The scales of one weight ``[N, K]``: every element has a step of its own, and codes count steps.

    Attributes:
        format: of the weight.
        shape: ``(N, K)``.
        scale: ``[N]`` float32; ``[N, ceil(K / group)]`` with groups, float8_e4m3fn where the format is ``fp4``;
            ``[ceil(N / block), ceil(K / block)]`` with blocks.
        zero_point: int8 of the scale's shape where the format is not symmetric.
        global_scale: ``fp4``: what scales are divided by, float32 ``[1]``.
        stored: the type that scales will be stored in, whose values they are; ``fp4`` has its own.
    """

    format: WeightFormat
    shape: tuple[int, int]
    scale: torch.Tensor
    zero_point: torch.Tensor | None = None
    global_scale: torch.Tensor | None = None
    stored: torch.dtype = torch.float32

    @cached_property
    def step(self) -> torch.Tensor:
        """What one code is worth, ``[N, K]`` float32; negative where a group's largest element is positive."""
        scale = self.scale.to(torch.float32)
        return self._spread(scale if self.global_scale is None else scale / self.global_scale)

    def scaled(self, factors: torch.Tensor | float) -> QuantizationGrid:
        """The grid whose scales are these times ``factors`` (one, or one per scale), as they can be stored. Not for fp4."""
        return replace(self, scale=as_stored(self.scale * factors, self.stored))

    def of_channels(self, channels: slice) -> QuantizationGrid:
        """The part for these output channels. Not for blocks, which several channels share."""
        zero = None if self.zero_point is None else self.zero_point[channels]
        part = self.scale[channels]
        return replace(self, shape=(len(part), self.shape[1]), scale=part, zero_point=zero)

    def codes(self, rows: torch.Tensor, columns: slice = slice(None)) -> torch.Tensor:
        """The nearest codes, int8 or float8_e4m3fn; what is out of range saturates, and zero has an exact code.

        Args:
            rows: ``[N, K]`` float32, or some columns of it.
            columns: which.
        """
        step = self.step[:, columns]
        if self.format.kind == "fp8":
            return to_fp8(rows / step)
        if self.format.kind == "fp4":
            return to_fp4_codes(rows / torch.where(step == 0, torch.ones_like(step), step))
        low, high = self._range
        codes = torch.round(rows / step)
        if self.zero_point is not None:
            codes.add_(self._zero[:, columns])
        return codes.clamp_(low, high).to(torch.int8)

    def values(self, codes: torch.Tensor, columns: slice = slice(None)) -> torch.Tensor:
        """What ``codes`` (of these ``columns``) stand for, float32."""
        if self.format.kind == "fp4":
            numbers = torch.tensor((*FP4_VALUES, *(-value for value in FP4_VALUES)))[codes.long()]
        else:
            numbers = codes.to(torch.float32)
        if self.zero_point is not None:
            numbers = numbers - self._zero[:, columns]
        return numbers * self.step[:, columns]

    @property
    def _range(self) -> tuple[int, int]:
        """Lowest and highest integer code. Without groups it is symmetric, so that -q is a code too."""
        bits = self.format.bits - self.format.reduced_range
        if not self.format.symmetric:
            return 0, 2**bits - 1
        top = 2 ** (bits - 1) - 1
        return (-top - 1 if self.format.group else -top), top

    @cached_property
    def _zero(self) -> torch.Tensor:
        assert self.zero_point is not None
        return self._spread(self.zero_point.to(torch.float32))

    def _spread(self, value: torch.Tensor) -> torch.Tensor:
        """A number per element ``[N, K]``, of one per channel, group or block."""
        rows, columns = self.shape
        if block := self.format.block:
            value = value.repeat_interleave(block, 0)[:rows]
        if length := self.format.group or self.format.block:
            return value.repeat_interleave(length, 1)[:, :columns]
        return value[:, None].expand(rows, columns)
