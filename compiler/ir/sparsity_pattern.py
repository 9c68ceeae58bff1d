"""Patterns of zeros in a weight: how they are written, which shapes they divide, and whether a tensor follows one."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

__all__ = ["SparsityPattern"]

FORMS = re.compile(r"(?P<n>\d+):(?P<m>\d+)|block=(?P<rows>\d+)x(?P<columns>\d+):(?P<share>0?\.\d+)|(?P<plain>0?\.\d+)")


@dataclass(frozen=True)
class SparsityPattern:
    """One pattern. Build it with ``parse``.

    Attributes:
        text: as it is written: ``2:4`` (N:M), ``0.5`` (unstructured), ``block=16x16:0.5``.
        kept, run: N and M of an N:M pattern, 0 of others: at most N of M consecutive values along the contraction are not zero.
        rows, columns: sides of a block, 0 of others.
        zero_fraction: share of the weights, or of the blocks, that is zero.
    """

    text: str
    kept: int
    run: int
    rows: int
    columns: int
    zero_fraction: float

    @classmethod
    def parse(cls, text: str) -> SparsityPattern:
        """The pattern that ``text`` names.

        Raises:
            ValueError: it names none.
        """
        found = FORMS.fullmatch(text)
        if found is None or (found["n"] and not 0 < int(found["n"]) < int(found["m"])):
            raise ValueError("write N:M with 0 < N < M, a fraction between 0 and 1 such as 0.5, or block=16x16:0.5")
        kept, run, rows, columns = (int(found[name] or 0) for name in ("n", "m", "rows", "columns"))
        fraction = 1 - kept / run if run else float(found["plain"] or found["share"])
        if fraction <= 0 or (found["rows"] and 0 in (rows, columns)):
            raise ValueError("the fraction and the block sides must be positive")
        return cls(text, kept, run, rows, columns, fraction)

    @property
    def family(self) -> str:
        """The name targets know the pattern by: itself for N:M, ``unstructured`` or ``block``."""
        return self.text if self.run else "block" if self.rows else "unstructured"

    def misfit(self, shape: Sequence[int], axis: int) -> str:
        """Why a tensor of ``shape`` that is contracted along ``axis`` cannot have the pattern, a sentence; empty: it can."""
        if self.run and shape[axis] % self.run:
            return f"Its contraction dimension {shape[axis]} is not a multiple of {self.run}."
        if self.rows and (len(shape) != 2 or shape[0] % self.rows or shape[1] % self.columns):
            return f"Its shape {list(shape)} does not divide into {self.rows}x{self.columns} blocks."
        return ""

    def zeros(self, shape: Sequence[int], axis: int, *, by_row: bool = False) -> int:
        """How many elements of a tensor of ``shape`` become zero.

        Args:
            shape: one that the pattern fits.
            axis: its contraction dimension.
            by_row: an unstructured share is taken of every output row, not of the whole tensor.
        """
        size = math.prod(shape)
        if self.run:
            return size // self.run * (self.run - self.kept)
        if self.rows:
            block = self.rows * self.columns
            return round(size // block * self.zero_fraction) * block
        return (
            size // shape[axis] * round(shape[axis] * self.zero_fraction)
            if by_row
            else round(size * self.zero_fraction)
        )

    def violation(self, zero: torch.Tensor, axis: int, fraction: float) -> str:
        """How a tensor breaks the pattern, a clause with the numbers and the first place; empty: it follows it.

        Args:
            zero: bool, where the tensor is zero; of a shape that the pattern fits.
            axis: contraction dimension, for N:M.
            fraction: share of zeros that the other patterns must reach.
        """
        if self.run:
            left = self.run - zero.movedim(axis, -1).unflatten(-1, (-1, self.run)).sum(-1)
            bad = left > self.kept
            if not bad.any():
                return ""
            *others, place = bad.nonzero()[0].tolist()
            others.insert(axis, _run_slice(place, self.run))
            return (
                f"{int(bad.sum())} of {bad.numel()} runs of {self.run} along dimension {axis} hold more than {self.kept} "
                f"values, the first at [{', '.join(map(str, others))}]"
            )
        if self.rows:
            blocks = zero.unflatten(1, (-1, self.columns)).unflatten(0, (-1, self.rows)).all(3).all(1)
            wanted, found, what = round(blocks.numel() * fraction), int(blocks.sum()), "blocks"
        else:
            wanted, found, what = round(zero.numel() * fraction), int(zero.sum()), "elements"
        return "" if found >= wanted else f"{found} {what} are zero, the mask promises {wanted}"


def _run_slice(place: int, run: int) -> str:
    """Positions of a run, as written in an index."""
    return f"{place * run}:{(place + 1) * run}"
