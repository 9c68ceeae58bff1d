"""Where the zeros of an ONNX constant are, read from its stored codes in pieces.

Nothing is converted to a number type: a value is zero exactly when the bits of its code that hold magnitude are. That is exact
for every format, with two zeros (+0 and -0) where the format has them, and needs no package that knows small floats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from compile_sparse.compiler.errors import Refusal

if TYPE_CHECKING:
    from onnx import TensorProto

__all__ = ["Constant", "Groups", "is_all_zero"]

# Element type -> bits of a code, and the mask of those that are all zero in a zero. The sign is not one of them in a float;
# in the FNUZ formats, which have one zero only, the code 0x80 is NaN and the sign bit counts. FLOAT8E8M0 has no zero at all.
_CODES: dict[str, tuple[int, int]] = {
    "FLOAT": (32, 0x7FFFFFFF),
    "DOUBLE": (64, 0x7FFFFFFFFFFFFFFF),
    "FLOAT16": (16, 0x7FFF),
    "BFLOAT16": (16, 0x7FFF),
    "FLOAT8E4M3FN": (8, 0x7F),
    "FLOAT8E5M2": (8, 0x7F),
    "FLOAT8E4M3FNUZ": (8, 0xFF),
    "FLOAT8E5M2FNUZ": (8, 0xFF),
    "FLOAT4E2M1": (4, 0x7),
    "INT2": (2, 0x3),
    "UINT2": (2, 0x3),
    "INT4": (4, 0xF),
    "UINT4": (4, 0xF),
    "INT8": (8, 0xFF),
    "UINT8": (8, 0xFF),
    "INT16": (16, 0xFFFF),
    "UINT16": (16, 0xFFFF),
    "INT32": (32, 0xFFFFFFFF),
    "UINT32": (32, 0xFFFFFFFF),
    "INT64": (64, 0xFFFFFFFFFFFFFFFF),
    "UINT64": (64, 0xFFFFFFFFFFFFFFFF),
}
_TYPED_FIELDS = ("float_data", "double_data", "int32_data", "int64_data", "uint64_data")
_FIELD_TYPES = {
    "float_data": "<f4",
    "double_data": "<f8",
    "int32_data": "<i4",
    "int64_data": "<i8",
    "uint64_data": "<u8",
}
# Elements looked at together: 4M codes of 16 bits and what they are compared with are some 30 MB.
_CHUNK_ELEMENTS = 4 << 20


@dataclass(frozen=True)
class Groups:
    """How many groups of M values along an axis there are, and how many hold more than N that are not zero."""

    total: int
    broken: int


class Constant:
    """A stored tensor of an ONNX file.

    Args:
        proto: the tensor; its data may be in ``folder``.
        folder: where the ONNX file is; data outside it is refused.
    """

    def __init__(self, proto: TensorProto, folder: Path) -> None:
        from onnx import TensorProto

        self.name: str = proto.name
        self.dtype: str = TensorProto.DataType.Name(proto.data_type)
        self.shape: tuple[int, ...] = tuple(proto.dims)
        self._proto, self._folder = proto, folder
        self._groups: dict[tuple[int, int, int], Groups] = {}

    @property
    def readable(self) -> bool:
        """Whether the places of its zeros can be read: six-bit formats and strings cannot."""
        return self.dtype in _CODES

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    def groups(self, axis: int, n: int, m: int) -> Groups:
        """Count groups of ``m`` consecutive values along ``axis``, and those with more than ``n`` that are not zero.

        Args:
            axis: of size K, a multiple of ``m``; not negative.
            n: values of a group that may be other than zero.
            m: values in a group, at most 255.

        Returns:
            Both counts; they are remembered. Memory follows ``_CHUNK_ELEMENTS`` or ``8 m`` rows of what lies behind ``axis``,
            whichever is more.

        Raises:
            Refusal: CS4502 when the data cannot be read.
        """
        key = (axis, n, m)
        if key not in self._groups:
            self._groups[key] = self._count(axis, n, m)
        return self._groups[key]

    def _count(self, axis: int, n: int, m: int) -> Groups:
        if self.elements == 0:
            return Groups(0, 0)
        inner = math.prod(self.shape[axis + 1 :])
        block = m * inner  # elements of the groups that start at one place of the axis
        # Eight blocks at a time end on a byte, however small an element is.
        step = block * 8 * max(1, _CHUNK_ELEMENTS // (8 * block))
        broken = 0
        for nonzero in self.nonzero(step):
            members = nonzero.reshape(-1, m, inner).view(np.uint8)
            counts = members[:, 0].copy()
            for place in range(1, m):
                counts += members[:, place]
            broken += int(np.count_nonzero(counts > n))
        return Groups(self.elements // m, broken)

    def nonzero(self, step: int) -> Iterator[npt.NDArray[np.bool_]]:
        """Whether each element is not zero, in storage order, ``step`` elements at a time.

        Args:
            step: elements per piece, a multiple of the elements in a byte.

        Raises:
            Refusal: CS4502 when the data is missing, short or outside the folder.
        """
        bits, mask = _CODES[self.dtype]
        read = self._reader(bits)
        per_code = 8 // bits if bits < 8 else 1
        for start in range(0, self.elements, step):
            stop = min(start + step, self.elements)
            codes = read(start // per_code, -(-stop // per_code))
            if per_code == 1:
                yield (codes & codes.dtype.type(mask)) != 0
            else:
                yield _unpacked(codes, bits, mask)[: stop - start]

    def _reader(self, bits: int) -> Callable[[int, int], npt.NDArray[Any]]:
        """Gives codes from one place to another; they are bytes of several elements when those are smaller than a byte."""
        kind = np.dtype(f"<u{max(bits, 8) // 8}")
        count = -(-self.elements * bits // 8) if bits < 8 else self.elements
        if self._proto.data_location == self._proto.EXTERNAL:
            file, offset = self.place(count * kind.itemsize)
            return lambda start, stop: np.fromfile(file, kind, stop - start, offset=offset + start * kind.itemsize)
        codes = self._inline(kind)
        if len(codes) != count:
            raise self._unreadable(f"it has {len(codes):,} stored codes, {count:,} are expected")
        return lambda start, stop: codes[start:stop]

    def _inline(self, kind: np.dtype[Any]) -> npt.NDArray[Any]:
        raw = self._proto.raw_data
        if len(raw) % kind.itemsize:
            raise self._unreadable(f"it has {len(raw):,} bytes, which is no multiple of {kind.itemsize}")
        if raw:
            return np.frombuffer(raw, kind)
        for field in _TYPED_FIELDS:
            values = getattr(self._proto, field)
            if values:
                array = np.array(values, _FIELD_TYPES[field])
                return array.view(f"<u{array.dtype.itemsize}").astype(kind)  # small codes lie in the low bytes
        return np.empty(0, kind)

    def place(self, needed: int) -> tuple[Path, int]:
        """The file that holds ``needed`` bytes of this tensor, and where they start."""
        entries = {entry.key: entry.value for entry in self._proto.external_data}
        file = (self._folder / entries.get("location", "")).resolve()
        if not file.is_relative_to(self._folder.resolve()):
            raise self._unreadable(f"its data is outside the model's folder, in {entries.get('location')}")
        try:
            offset = int(entries.get("offset", 0))
            length = int(entries.get("length", needed))
        except ValueError:
            raise self._unreadable("its offset or length is not a number") from None
        if not file.is_file():
            raise self._unreadable(f"there is no file {entries.get('location')}")
        if length != needed or offset < 0 or offset + needed > file.stat().st_size:
            raise self._unreadable(
                f"{needed:,} bytes are expected at {offset:,} of {file.name}, which says {length:,} and "
                f"has {file.stat().st_size:,} bytes"
            )
        return file, offset

    def _unreadable(self, why: str) -> Refusal:
        return Refusal(
            "CS4502", f"Weight {self.name!r} of the ONNX file cannot be read.", where=self.name, why=f"{why}."
        )


def _unpacked(codes: npt.NDArray[np.uint8], bits: int, mask: int) -> npt.NDArray[np.bool_]:
    """Elements smaller than a byte: the first is in the low bits."""
    per_byte = 8 // bits
    nonzero = np.empty(len(codes) * per_byte, np.bool_)
    for place in range(per_byte):
        nonzero[place::per_byte] = (codes & np.uint8(mask << (place * bits))) != 0
    return nonzero


def is_all_zero(constant: Constant) -> bool:
    """Whether every element is zero; False for a format whose zeros cannot be read."""
    return constant.readable and not any(bool(piece.any()) for piece in constant.nonzero(_CHUNK_ELEMENTS))
