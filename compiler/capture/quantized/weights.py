"""A quantized weight of a checkpoint, from its parts: as codes in the form our operators have, or as the values of the codes.

Codes are kept as they are and never computed from values. Our operators multiply in float32, where a code times a scale is
exact; what other libraries give is that product in the type of their scales. Where there is no operator for the form, values are
computed in that type, in the order of operations of the source, so that every bit is the source's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from compile_sparse.compiler.ir.quantization_schemes import ActivationFormat, Scheme, WeightFormat
from compile_sparse.compiler.ir.quantized_tensor import QuantizedTensor
from compile_sparse.compiler.ir.weights import DerivedTensor, DowncastTensor, TensorSource

__all__ = ["Activations", "Integers", "block_weight", "channel_weight", "computed", "reshaped"]

_SHORT = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Activations:
    """How the input of the layers is quantized.

    Attributes:
        form: of the scheme.
        scale: what a fixed form needs, one number in any shape.
    """

    form: ActivationFormat = ""
    scale: TensorSource | None = None

    def parts(self) -> dict[str, TensorSource]:
        """What a ``QuantizedTensor`` holds of it."""
        return {} if self.scale is None else {"input_scale": reshaped(self.scale, (1,))}


def computed(shape: tuple[int, ...], compute: Callable[[], torch.Tensor], dtype: torch.dtype) -> TensorSource:
    """A tensor of that type, which is cast to it after ``compute``."""
    return DerivedTensor(shape, dtype, lambda: compute().to(dtype).contiguous())


def reshaped(source: TensorSource, shape: tuple[int, ...]) -> TensorSource:
    """Scales as float32 of another shape (one number becomes many), and as what they are stored: shorter where they came so."""
    wide = DerivedTensor(shape, torch.float32, lambda: _spread(source.load().to(torch.float32), shape))
    return DowncastTensor(wide, source.dtype) if source.dtype in _SHORT else wide


def _spread(value: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    return (value.reshape(shape) if value.numel() != 1 else value.reshape(()).expand(shape)).contiguous()


@dataclass(frozen=True)
class Integers:
    """An integer weight ``(code - zero point) * scale``, one scale and zero point per run of ``group`` inputs of an output.

    Attributes:
        shape: ``(N, K)``.
        bits: per code.
        group: inputs per scale; 0 for all.
        codes: gives uint8 ``[N, K]``, of ``bits`` bits.
        scale: ``[N, groups]`` in the type of the file.
        zeros: gives uint8 ``[N, groups]``; None where the zero point is the middle of the range.
        order: group of each input, int64 ``[K]``; None where that is ``k // group``.
    """

    shape: tuple[int, int]
    bits: int
    group: int
    codes: Callable[[], torch.Tensor]
    scale: TensorSource
    zeros: Callable[[], torch.Tensor] | None = None
    order: torch.Tensor | None = None

    @property
    def why_float(self) -> str:
        """Why our operators do not have this form; empty where they do."""
        if self.order is not None:
            return "Its groups are not of inputs that lie side by side (activation order)."
        if self.bits not in (4, 8):
            return f"There is no operator for {self.bits}-bit codes."
        if self.zeros is not None and self.bits == 8:
            return "There is no operator for 8-bit codes with zero points."
        return ""

    def source(self, activations: Activations) -> TensorSource:
        """The weight, as codes where ``why_float`` is empty."""
        if self.why_float:
            return computed(self.shape, self._values, torch.float32)
        whole = (self.shape[0], self._groups) if self.group else (self.shape[0],)
        symmetric, middle = self.zeros is None, 2 ** (self.bits - 1)
        parts: dict[str, TensorSource] = {
            "codes": computed(
                self.shape, lambda: self.codes().to(torch.int16) - (middle if symmetric else 0), torch.int8
            ),
            "scale": reshaped(self.scale, whole),
        }
        if (zeros := self.zeros) is not None:
            parts["zero_point"] = computed(whole, lambda: zeros().reshape(whole), torch.int8)
        form = WeightFormat("int", self.bits, self.group, symmetric=symmetric)
        return QuantizedTensor(Scheme(form, activations.form), parts | activations.parts(), self.shape)

    @property
    def _groups(self) -> int:
        return -(-self.shape[1] // self.group) if self.group else 1

    def _values(self) -> torch.Tensor:
        scale = self.scale.load()
        scale = scale.expand(self.shape[0], self._groups)
        zeros = self.zeros().to(scale.dtype) if self.zeros is not None else torch.full_like(scale, 2 ** (self.bits - 1))
        length = self.group or self.shape[1]
        order = torch.arange(self.shape[1]) // length if self.order is None else self.order
        return (self.codes().to(scale.dtype) - zeros[:, order]) * scale[:, order]


def channel_weight(
    kind: str, codes: TensorSource, scale: TensorSource, activations: Activations, *, bits: int = 8, group: int = 0
) -> QuantizedTensor:
    """Codes as our operators have them (int8 around zero, or e4m3), one scale per output, per group, or for all.

    Args:
        kind: ``int`` or ``fp8``.
        codes: ``[N, K]``.
        scale: ``[N]``, ``[N, groups]`` or one number, in any shape.
        activations: of the layers.
        bits: of integers.
        group: inputs per scale; 0 for all.
    """
    rows, columns = codes.shape
    single = not group and scale.shape in ((), (1,), (1, 1))
    whole = (rows, -(-columns // group)) if group else (rows,)
    per_tensor = kind == "fp8" and single and rows > 1
    form = WeightFormat("fp8" if kind == "fp8" else "int", bits, group, per_tensor=per_tensor)
    parts = {"codes": codes, "scale": reshaped(scale, whole), **activations.parts()}
    return QuantizedTensor(Scheme(form, activations.form), parts, (rows, columns))


def block_weight(codes: TensorSource, scale: TensorSource, block: int, activations: Activations) -> QuantizedTensor:
    """e4m3 codes ``[N, K]`` with a scale per square of side ``block``."""
    rows, columns = codes.shape
    whole = (-(-rows // block), -(-columns // block))
    form = WeightFormat("fp8", 8, block=block)
    parts = {"codes": codes, "scale": reshaped(scale, whole), **activations.parts()}
    return QuantizedTensor(Scheme(form, activations.form), parts, (rows, columns))
