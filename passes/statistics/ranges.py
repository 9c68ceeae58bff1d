"""How large activations become on calibration text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import Protocol

import torch
from torch import fx

from compile_sparse.compiler.extension.pass_contract import PassContext
from compile_sparse.compiler.ir.program import Program
from compile_sparse.passes.statistics.observation import observe_values

__all__ = ["largest_magnitudes", "magnitude_percentiles"]

_DROPPED_BITS = 15
_BINS = 1 << (31 - _DROPPED_BITS)


def largest_magnitudes(program: Program, nodes: Iterable[fx.Node], context: PassContext) -> dict[str, float]:
    """Node name -> ``max|x|`` over all calibration windows (min-max calibration, arXiv:2004.09602 section 4.1).

    One run of the text; memory is that of a run.
    """
    found = {node.name: _Largest() for node in nodes}
    _observe(program, found, context)
    return {name: seen.value for name, seen in found.items()}


def magnitude_percentiles(
    program: Program, nodes: Iterable[fx.Node], context: PassContext, percent: float
) -> dict[str, float]:
    """Node name -> the magnitude that ``percent`` of the values of all calibration windows do not exceed (percentile
    calibration, arXiv:2004.09602 section 4.1).

    One run of the text; memory is that of a run and half a megabyte per node: counts of values by the first 16 bits of ``|x|`` as
    float32 (exponent and 8 bits of fraction). The answer is the upper end of a bin, at most ``max|x|``: never below the exact
    percentile and at most ``2^-8`` of it above, however far outliers lie. Where it would be zero, because more than ``percent``
    of the values are, it is ``max|x|``: a range of zero represents nothing.

    Args:
        program: what is run.
        nodes: whose values are observed.
        context: has the text.
        percent: above 0, at most 100; 100 gives ``max|x|``.
    """
    found = {node.name: _Histogram() for node in nodes}
    _observe(program, found, context)
    return {name: seen.percentile(percent) for name, seen in found.items()}


class _Statistic(Protocol):
    def add(self, value: torch.Tensor) -> None: ...


class _Largest:
    def __init__(self) -> None:
        self.value = 0.0

    def add(self, value: torch.Tensor) -> None:
        self.value = max(self.value, float(value.abs().max()))


class _Histogram:
    """Counts of magnitudes in bins of equal relative width: nonnegative floats are ordered as their bit patterns are."""

    def __init__(self) -> None:
        self._counts = torch.zeros(_BINS, dtype=torch.int64)
        self._largest = _Largest()

    def add(self, value: torch.Tensor) -> None:
        self._largest.add(value)
        patterns = value.float().abs().contiguous().view(torch.int32).flatten()
        self._counts += torch.bincount(patterns >> _DROPPED_BITS, minlength=_BINS)

    def percentile(self, percent: float) -> float:
        total = self._counts.cumsum(0)
        rank = math.ceil(Fraction(str(percent)) * int(total[-1]) / 100)
        place = int(torch.searchsorted(total, max(rank, 1)))
        if place == 0:  # zeros, and the smallest of all numbers
            return self._largest.value
        edge = torch.tensor((place + 1) << _DROPPED_BITS, dtype=torch.int32).view(torch.float32)
        return min(float(edge), self._largest.value)


def _observe(program: Program, found: Mapping[str, _Statistic], context: PassContext) -> None:
    if context.calibration is None:
        raise RuntimeError("the caller checks that there is calibration text")
    observers = {name: seen.add for name, seen in found.items()}
    observe_values(program, observers, context.calibration, context.progress, "measure activation ranges")
