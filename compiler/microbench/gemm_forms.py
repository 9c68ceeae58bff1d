"""The forms of a GEMM: dense, fewer bits, 2:4, each prepared for one shape and one device.

A form is a small object of the protocol ``Form``; another one, such as one built for a single GEMM, is one more
object in the list that ``probe_model`` takes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

from compile_sparse.compiler.microbench.device import Device
from compile_sparse.compiler.microbench.shapes import ProductShape

__all__ = ["Cast", "Form", "Integer", "Prepared", "Sparse", "forms_for"]

Format = Literal["fp16", "bf16", "int8", "fp8"]
_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
_OUTPUTS = {"fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.int32, "fp8": torch.bfloat16}
_SINCE = {"fp16": (7, 0), "bf16": (8, 0), "int8": (7, 5), "fp8": (8, 9)}
_LARGEST_CODE = 127
# Where the two zeros of a group of four are: all six choices.
_KEPT = ((1, 1, 0, 0), (1, 0, 1, 0), (1, 0, 0, 1), (0, 1, 1, 0), (0, 1, 0, 1), (0, 0, 1, 1))


@dataclass(frozen=True)
class Prepared:
    """A GEMM that is ready to run.

    Attributes:
        calls: the GEMM with one weight each; all weights have the same values.
        left: activations, ``[rows, K]``, as they are multiplied.
        right: the weight's values, ``[N, K]``, zeros included.
        transposed: a call gives ``[N, rows]``.
        note: what differs from the shape that was asked for, or empty.
    """

    calls: tuple[Callable[[], torch.Tensor], ...]
    left: torch.Tensor
    right: torch.Tensor
    transposed: bool = False
    note: str = ""


class Form(Protocol):
    """A way to compute a GEMM.

    Attributes:
        name: in tables.
        format: number format of both factors.
        pattern: of the weight's zeros, or empty.
        bound: largest relative error, in the Frobenius norm, of a kernel that works; 0 is exact.
    """

    @property
    def name(self) -> str: ...
    @property
    def format(self) -> Format: ...
    @property
    def pattern(self) -> str: ...
    @property
    def bound(self) -> float: ...

    def unavailable(self, device: Device) -> str:
        """Why this device, or this torch, does not have it; empty when it does."""
        ...

    def misfit(self, shape: ProductShape) -> str:
        """Why its kernels do not take this shape; empty when they do."""
        ...

    def prepare(self, shape: ProductShape, device: Device) -> Prepared:
        """Random factors on the device and calls that multiply them. May raise whatever torch raises."""
        ...


def forms_for(precision: str) -> list[Form]:
    """All forms, the dense one in ``precision`` first: everything else is compared with it."""
    dense: Format = "bf16" if precision == "bf16" else "fp16"
    return [Cast(dense), Integer(), Cast("fp8"), Sparse(dense), Sparse("int8"), Sparse("fp8")]


@dataclass(frozen=True)
class _Torch:
    """What the forms have in common that torch computes."""

    format: Format
    pattern: str = ""

    @property
    def name(self) -> str:
        return f"{self.format} {self.pattern}".strip()

    @property
    def bound(self) -> float:
        """Eight roundings of the result's format: one when it is stored, the others for sums that are split and rounded on
        their way (cuBLAS may add partial sums of fp16 and bf16 in that format). Integers are exact.
        """
        output = _OUTPUTS[self.format]
        return 8 * torch.finfo(output).eps / 2 if output.is_floating_point else 0.0

    def unavailable(self, device: Device) -> str:
        first = _SINCE[self.format]
        if device.capability < first:
            return (
                f"Compute capability {_dotted(device.capability)} has no {self.format} GEMMs "
                f"({_dotted(first)} is the first)."
            )
        return ""

    def misfit(self, shape: ProductShape) -> str:
        multiple = {"int8": 8, "fp8": 16}.get(self.format, 1)
        return _multiples(shape, multiple, multiple)

    def _factors(self, rows: int, shape: ProductShape, device: Device) -> tuple[torch.Tensor, torch.Tensor]:
        """Activations ``[rows, K]`` and a weight ``[N, K]``. Floating-point results have a variance near 1 (near K for fp8,
        whose weights would otherwise lie below its smallest normal number).
        """
        sizes = (rows, shape.inner), (shape.outer, shape.inner)
        if self.format == "int8":
            left, right = (
                torch.randint(-_LARGEST_CODE, _LARGEST_CODE + 1, size, dtype=torch.int8, device=device.where)
                for size in sizes
            )
            return left, right
        wide = torch.bfloat16 if self.format == "fp8" else _DTYPES[self.format]
        left, right = (torch.randn(size, dtype=wide, device=device.where) for size in sizes)
        if self.format != "fp8":
            right /= shape.inner**0.5
        return left.to(_DTYPES[self.format]), right.to(_DTYPES[self.format])


class Cast(_Torch):
    """A dense GEMM in a floating-point format: cuBLAS, for fp8 through ``torch._scaled_mm`` with one scale per factor."""

    def unavailable(self, device: Device) -> str:
        """See ``Form``."""
        missing = "This torch has no _scaled_mm." if self.format == "fp8" and not hasattr(torch, "_scaled_mm") else ""
        return super().unavailable(device) or missing

    def prepare(self, shape: ProductShape, device: Device) -> Prepared:
        """See ``Form``."""
        left, right = self._factors(shape.rows, shape, device)
        weights = _copied(right, device)
        if self.format != "fp8":
            return Prepared(tuple(lambda w=w: torch.nn.functional.linear(left, w) for w in weights), left, right)  # type: ignore[misc]
        one = torch.ones((), device=device.where)
        output = _OUTPUTS["fp8"]
        return Prepared(
            tuple(lambda w=w: torch._scaled_mm(left, w.t(), one, one, out_dtype=output) for w in weights),  # type: ignore[misc]
            left,
            right,
        )


class Integer(_Torch):
    """A dense GEMM of 8-bit integers with 32-bit results: cuBLAS through ``torch._int_mm``."""

    LEAST_ROWS = 32

    def __init__(self) -> None:
        super().__init__("int8")

    def unavailable(self, device: Device) -> str:
        """See ``Form``."""
        return super().unavailable(device) or ("" if hasattr(torch, "_int_mm") else "This torch has no _int_mm.")

    def prepare(self, shape: ProductShape, device: Device) -> Prepared:
        """See ``Form``. torch takes more than 16 rows only; fewer are filled up, as a serving kernel would."""
        rows = max(shape.rows, self.LEAST_ROWS)
        left, right = self._factors(rows, shape, device)
        calls = tuple(lambda w=w: torch._int_mm(left, w.t()) for w in _copied(right, device))  # type: ignore[misc]
        return Prepared(calls, left, right, note=_filled(rows, shape.rows))


class Sparse(_Torch):
    """A GEMM with a 2:4 weight: cuSPARSELt, with the algorithm that its own search finds fastest.

    The results have the type of the dense form's (int8: 32 bits), so that the two write as much.
    """

    def __init__(self, format: Format) -> None:
        super().__init__(format, "2:4")

    def unavailable(self, device: Device) -> str:
        """See ``Form``."""
        if device.capability < (8, 0):
            return f"Compute capability {_dotted(device.capability)} has no sparse tensor cores (8.0 is the first)."
        if not torch.backends.cusparselt.is_available() or not hasattr(torch, "_cslt_sparse_mm"):
            return "This torch is built without cuSPARSELt."
        return super().unavailable(device)

    def misfit(self, shape: ProductShape) -> str:
        """See ``Form``. torch's limits, in ``SparseSemiStructuredTensorCUSPARSELT``."""
        multiple = 32 if self.format in ("int8", "fp8") else 16
        return _multiples(shape, multiple, multiple)

    def prepare(self, shape: ProductShape, device: Device) -> Prepared:
        """See ``Form``."""
        multiple = 16 if self.format in ("int8", "fp8") else 8
        rows = -(-shape.rows // multiple) * multiple
        left, right = self._factors(rows, shape, device)
        right = two_of_four(right)
        packed = torch._cslt_compress(right)
        output = _OUTPUTS[self.format]
        algorithm = _fastest(packed, left, output)
        calls = tuple(
            lambda w=w: torch._cslt_sparse_mm(w, left.t(), out_dtype=output, alg_id=algorithm)  # type: ignore[misc]
            for w in _copied(packed, device)
        )
        return Prepared(calls, left, right, transposed=True, note=_filled(rows, shape.rows))


def two_of_four(weight: torch.Tensor) -> torch.Tensor:
    """``weight`` ``[N, K]`` with two random zeros in every four values along K, a multiple of 4."""
    outer, inner = weight.shape
    kept = torch.tensor(_KEPT, dtype=torch.bool, device=weight.device)
    choice = torch.randint(len(_KEPT), (outer, inner // 4), device=weight.device)
    # fp8 has no GEMMs with masks; its zero is the byte 0, as in every format here.
    codes = weight.view(torch.uint8) if weight.dtype == torch.float8_e4m3fn else weight
    return (codes * kept[choice].view(outer, inner)).view(weight.dtype)


def _fastest(packed: torch.Tensor, left: torch.Tensor, output: torch.dtype) -> int:
    try:
        return int(torch._cslt_sparse_mm_search(packed, left.t(), out_dtype=output))
    except (RuntimeError, AttributeError):  # older torch: the library's first choice
        return 0


def _copied(weight: torch.Tensor, device: Device) -> list[torch.Tensor]:
    count = device.copies(weight.numel() * weight.element_size())
    return [weight, *(weight.clone() for _ in range(count - 1))]


def _multiples(shape: ProductShape, inner: int, outer: int) -> str:
    wrong: list[Any] = [f"K = {shape.inner} of {inner}"] if shape.inner % inner else []
    wrong += [f"N = {shape.outer} of {outer}"] if shape.outer % outer else []
    return f"{' and '.join(wrong)} is no multiple, which its kernels need." if wrong else ""


def _filled(rows: int, wanted: int) -> str:
    return f"{rows} rows in place of {wanted}, which its kernels need" if rows != wanted else ""


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
