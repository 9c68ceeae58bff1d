"""Quantization schemes as data: how weights and activations are quantized. Passes write them, backends read them.

Names follow the serving world's: ``w8a8`` is 8-bit weights and 8-bit activations, ``w4a16`` 4-bit weights and floating-point
activations, ``-g32`` groups of 32 weights per scale, ``-asym`` a zero point per group, ``-static`` activation ranges fixed by
calibration, ``-tensor`` such ranges and one scale for a whole weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

__all__ = ["SCHEMES", "Scheme", "SchemeName", "WeightFormat"]

SchemeName = Literal[
    "w8a8",
    "w8a8-static",
    "w8a16",
    "w4a16",
    "w4a16-g32",
    "w4a16-channel",
    "w4a16-asym",
    "w4a16-g32-asym",
    "fp8",
    "fp8-static",
    "fp8-tensor",
    "fp8-block",
    "nvfp4",
]

ActivationFormat = Literal["", "int8", "int8-static", "fp8", "fp8-static", "fp8-group", "fp4"]
"""Empty: activations stay in floating point. ``int8`` and ``fp8``: one scale per token (or, where the target says so, per
tensor), found at run time. ``fp8-group``: one per 128 elements of a token. ``fp4``: one per 16, below a static global scale."""


@dataclass(frozen=True)
class WeightFormat:
    """How a weight matrix is quantized.

    Attributes:
        kind: ``int`` (two's complement around zero, or with a zero point), ``fp8`` (e4m3), ``fp4`` (e2m1, NVFP4).
        bits: per weight, as it is stored.
        group: weights per scale along the contraction dimension; 0: one scale per output channel.
        block: side of the square that shares a scale, instead of channels; 0: none.
        symmetric: no zero point.
        per_tensor: the scales of all channels are the same number, for runtimes that take one per weight.
        reduced_range: integers leave one bit unused: of 8 bits, no code is larger than 63 in magnitude.
    """

    kind: Literal["int", "fp8", "fp4"]
    bits: int
    group: int = 0
    block: int = 0
    symmetric: bool = True
    per_tensor: bool = False
    reduced_range: bool = False


@dataclass(frozen=True)
class Scheme:
    """Weights and activations of the linear layers."""

    weights: WeightFormat
    activations: ActivationFormat = ""

    @property
    def static(self) -> bool:
        """Whether an activation range is fixed ahead, which takes calibration text."""
        return self.activations in ("int8-static", "fp8-static", "fp4")


SCHEMES: Mapping[str, Scheme] = {
    "w8a8": Scheme(WeightFormat("int", 8), "int8"),
    "w8a8-static": Scheme(WeightFormat("int", 8), "int8-static"),
    "w8a16": Scheme(WeightFormat("int", 8, group=128)),
    "w4a16": Scheme(WeightFormat("int", 4, group=128)),
    "w4a16-g32": Scheme(WeightFormat("int", 4, group=32)),
    "w4a16-channel": Scheme(WeightFormat("int", 4)),
    "w4a16-asym": Scheme(WeightFormat("int", 4, group=128, symmetric=False)),
    "w4a16-g32-asym": Scheme(WeightFormat("int", 4, group=32, symmetric=False)),
    "fp8": Scheme(WeightFormat("fp8", 8), "fp8"),
    "fp8-static": Scheme(WeightFormat("fp8", 8), "fp8-static"),
    "fp8-tensor": Scheme(WeightFormat("fp8", 8, per_tensor=True), "fp8-static"),
    "fp8-block": Scheme(WeightFormat("fp8", 8, block=128), "fp8-group"),
    "nvfp4": Scheme(WeightFormat("fp4", 4, group=16), "fp4"),
}
