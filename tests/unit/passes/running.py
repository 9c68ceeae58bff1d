"""Running one pass on a toy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from compile_sparse.compiler.execution.calibration import CalibrationStream
from compile_sparse.compiler.ir.program import Program

__all__ = ["AddMM", "Fed", "Linear"]


@dataclass(frozen=True)
class Fed(CalibrationStream):
    """Text for a model that reads none: its inputs themselves."""

    inputs: tuple[torch.Tensor, ...] = ()

    def __len__(self) -> int:
        return len(self.inputs)

    def feeds(self, program: Program) -> Iterator[dict[str, torch.Tensor]]:
        yield from ({"x0": value} for value in self.inputs)


class Linear(torch.nn.Module):
    """``x @ W.T + b`` with ``W: [N, K]``."""

    axis = 1

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight)
        self.bias = torch.nn.Parameter(torch.linspace(-1, 1, weight.shape[0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.weight, self.bias)


class AddMM(torch.nn.Module):
    """The same product from the transposed matrix, ``W: [K, N]``, as GPT-2 stores it."""

    axis = 0

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight.t().contiguous())
        self.bias = torch.nn.Parameter(torch.linspace(-1, 1, weight.shape[0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.bias, x, self.weight)
