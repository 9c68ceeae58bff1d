"""Prove that an attention mask is causal, or causal with a window, by evaluating it.

A mask is code, and code that looks causal may not be (prefix attention, chunks, packed documents). So the mask's subgraph runs
on concrete inputs and is compared, at every valid query, with

    allowed(row, column) = column <= row  and  (window == 0 or column > row - window)

at several batch sizes, lengths and cache sizes, with and without right padding, and at the model's full context, where any
window must show. Only then may a kernel that builds the mask itself replace it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from compile_sparse.compiler.ir.model_facts import context_length
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.lowering.evaluation import Point, evaluate, sample_inputs, valid_queries

__all__ = ["CausalMask", "CausalityProver"]

_UNKNOWN_CONTEXT = 8192
_POINTS = ((1, 1, 0), (2, 5, 0), (3, 6, 4), (2, 1, 7), (1, 9, 3))


@dataclass(frozen=True)
class CausalMask:
    """A proved mask. ``window`` positions are visible, all of them when it is 0."""

    window: int


class CausalityProver:
    """Answers for masks of one program; layers that share a mask share the answer."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._answers: dict[fx.Node, CausalMask | str] = {}

    def prove(self, mask: fx.Node) -> CausalMask | str:
        """The proved form, or a sentence saying why there is none."""
        if mask not in self._answers:
            self._answers[mask] = self._examine(mask)
        return self._answers[mask]

    def _examine(self, mask: fx.Node) -> CausalMask | str:
        far = max(context_length(self._program.config) or _UNKNOWN_CONTEXT, 16)
        try:
            last = self._allowed(mask, Point(1, 2, far - 2))
            if isinstance(last, str):
                return last
            seen = int(last[0, 0, -1].sum())
            window = 0 if seen == far else seen
            sizes = [*_POINTS, (1, 2, far - 2)]
            if window:
                sizes += [(1, 3, window), (2, 4, max(window - 2, 0))]
            points = [Point(*size, padded=padded) for size in sizes for padded in (False, True)]
            for point in points:
                allowed = self._allowed(mask, point)
                if isinstance(allowed, str):
                    return allowed
                if not _matches(allowed, point, window):
                    return (
                        f"the mask is not causal{f' with a window of {window}' if window else ''} "
                        f"for batch {point.batch}, {point.length} new and {point.past} cached positions"
                        f"{', right-padded' if point.padded else ''}"
                    )
        except LookupError as error:
            return f"the mask cannot be evaluated: {error.args[0]}"
        return CausalMask(window)

    def _allowed(self, mask: fx.Node, point: Point) -> torch.Tensor | str:
        """Bool ``[B or 1, heads or 1, S, P + S]``."""
        value = evaluate(self._program, mask, sample_inputs(self._program, point))
        if value.dim() != 4:
            return f"the mask has {value.dim()} dimensions instead of 4"
        if value.dtype == torch.bool:
            return value
        if not value.is_floating_point():
            return f"the mask has dtype {value.dtype}"
        hidden = value <= torch.finfo(torch.float16).min
        return value == 0 if bool(((value == 0) | hidden).all()) else "the mask adds a bias besides hiding positions"


def _matches(allowed: torch.Tensor, point: Point, window: int) -> bool:
    total = point.past + point.length
    rows = torch.arange(point.past, total)[:, None]
    columns = torch.arange(total)[None, :]
    expected = columns <= rows
    if window:
        expected &= columns > rows - window
    if allowed.shape[-2:] not in {(point.length, total), (1, total)}:
        return False
    equal = (allowed == expected[None, None]).all(dim=-1).all(dim=1)
    return bool((equal | ~valid_queries(point)).all())
