"""Codes and scales of one weight, as tensors that are computed when they are written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch

from compile_sparse.compiler.ir.quantization_schemes import WeightFormat
from compile_sparse.compiler.ir.weights import AbsentTensor, DerivedTensor, DowncastTensor, TensorSource
from compile_sparse.passes.quantization.round_to_nearest import (
    quantize_channels,
    quantize_fp8_blocks,
    quantize_fp8_channels,
    quantize_fp8_tensor,
    quantize_groups,
    quantize_groups_with_zero_points,
    quantize_nvfp4,
    scale_shape,
)

__all__ = ["CodeMemory", "code_sources"]

Described = tuple[tuple[int, ...], torch.dtype]


def code_sources(
    source: TensorSource,
    axis: int,
    fmt: WeightFormat,
    stored: torch.dtype,
    memory: CodeMemory,
    shared: TensorSource | None = None,
) -> dict[str, TensorSource]:
    """``codes``, ``scale`` and, where the format has one, ``zero_point``.

    Args:
        source: the weight, ``[N, K]`` or ``[K, N]``.
        axis: its contraction dimension.
        fmt: how to code it.
        stored: type the scales will be stored in.
        memory: shared by the weights of a model.
        shared: what weights with one input have in common: NVFP4's divisor, or the scale of a whole tensor.
    """
    depth, channels = source.shape[axis], source.shape[1 - axis]
    shapes = _shapes(channels, depth, fmt)
    shapes["codes"] = (tuple(source.shape), shapes["codes"][1])
    if isinstance(source, AbsentTensor):
        absent = {key: AbsentTensor(shape, dtype, source.name) for key, (shape, dtype) in shapes.items()}
        return _with_stored_scale(absent, stored)

    def compute() -> dict[str, torch.Tensor]:
        value = source.load().to(torch.float32)
        rows = value if axis == 1 else value.t()
        made = dict(zip(shapes, _coded(rows, fmt, stored, shared), strict=True))
        return made if axis == 1 else {**made, "codes": made["codes"].t().contiguous()}

    made = {
        key: DerivedTensor(shape, dtype, partial(memory.part, key, compute)) for key, (shape, dtype) in shapes.items()
    }
    return _with_stored_scale(made, stored)


def _with_stored_scale(made: Mapping[str, TensorSource], stored: torch.dtype) -> dict[str, TensorSource]:
    """What the scales are stored in counts for the size; their values are representable in it already."""
    scale = made["scale"]
    shorter = stored != torch.float32 and scale.dtype == torch.float32
    return {**made, "scale": DowncastTensor(scale, stored)} if shorter else dict(made)


class CodeMemory:
    """What was computed last. The tensors of one weight are asked for one after the other: it is coded once, and memory is one
    weight's.
    """

    def __init__(self) -> None:
        self._last: tuple[object, dict[str, torch.Tensor]] | None = None

    def part(self, key: str, compute: Callable[[], dict[str, torch.Tensor]]) -> torch.Tensor:
        """One of the tensors ``compute`` makes."""
        if self._last is None or self._last[0] is not compute:
            self._last = None  # freed before the next ones are made
            self._last = (compute, compute())
        return self._last[1][key]


def _shapes(channels: int, depth: int, fmt: WeightFormat) -> dict[str, Described]:
    rows = (channels, depth)
    if fmt.kind == "fp4":
        return {"codes": (rows, torch.int8), "scale": ((channels, -(-depth // fmt.group)), torch.float8_e4m3fn)}
    if fmt.block:
        squares = (-(-channels // fmt.block), -(-depth // fmt.block))
        return {"codes": (rows, torch.float8_e4m3fn), "scale": (squares, torch.float32)}
    codes = torch.float8_e4m3fn if fmt.kind == "fp8" else torch.int8
    shape = scale_shape(channels, depth, fmt.group)
    found: dict[str, Described] = {"codes": (rows, codes), "scale": (shape, torch.float32)}
    return found if fmt.symmetric else {**found, "zero_point": (shape, torch.int8)}


def _coded(
    rows: torch.Tensor, fmt: WeightFormat, stored: torch.dtype, shared: TensorSource | None
) -> tuple[torch.Tensor, ...]:
    if fmt.kind == "fp4":
        assert shared is not None
        return quantize_nvfp4(rows, fmt.group, shared.load())
    if fmt.block:
        return quantize_fp8_blocks(rows, fmt.block)
    if fmt.kind == "fp8":
        if not fmt.whole:
            return quantize_fp8_channels(rows, stored)
        assert shared is not None
        return quantize_fp8_tensor(rows, shared.load(), stored)
    if not fmt.symmetric:
        return quantize_groups_with_zero_points(rows, fmt.bits, fmt.group, stored)
    if fmt.group:
        return quantize_groups(rows, fmt.bits, fmt.group, stored)
    return quantize_channels(rows, fmt.bits, stored)
