"""Running one pass on a toy."""

from __future__ import annotations

import torch

from compile_sparse.compiler.contract import PassContext
from compile_sparse.compiler.progress import SilentProgress
from compile_sparse.compiler.targets import Target

__all__ = ["SCHEMES", "AddMM", "Linear", "context", "target"]

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
