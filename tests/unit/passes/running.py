"""Running one pass on a toy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from compile_sparse.compiler.execution.calibration import CalibrationStream
from compile_sparse.compiler.extension.pass_contract import PassContext
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.progress import SilentProgress
from compile_sparse.compiler.targets.target import Target

__all__ = ["SCHEMES", "AddMM", "Fed", "Linear", "context", "target"]

SCHEMES = ("w8a8", "w8a16", "w4a16", "w4a16-g32")


def target(schemes: tuple[str, ...] = SCHEMES) -> Target:
    """A target that accepts ``schemes`` and says nothing about sparse patterns."""
    return Target(
        name="test-cpu",
        backend="null",
        device="cpu",
        summary="A target for tests.",
        baseline_precision="fp32",
        alignment=1,
        schemes=dict.fromkeys(schemes, "somehow"),
    )


def context(schemes: tuple[str, ...] = SCHEMES, *, plan_only: bool = False) -> PassContext:
    """What a pass is given."""
    return PassContext(target(schemes), SilentProgress(), plan_only=plan_only)


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
