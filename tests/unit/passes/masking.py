"""Masked toys, and their weights as rows."""

from __future__ import annotations

import numpy as np
import torch

from compile_sparse.compiler.extension.pass_contract import PassContext
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.progress import SilentProgress
from compile_sparse.compiler.targets.target import Target
from compile_sparse.passes.mask import Sparsify
from tests.support.contexts import context, target
from tests.toys import toy_program
from tests.unit.passes.running import AddMM, Fed, Linear

ROWS = 16
DEPTH = 48
FORMS = [Linear, AddMM]
Form = type[Linear] | type[AddMM]


def weight() -> torch.Tensor:
    return torch.randn(ROWS, DEPTH, generator=torch.Generator().manual_seed(5))


def masked(pattern: str, form: Form = Linear, values: torch.Tensor | None = None) -> Program:
    module = form(weight() if values is None else values)
    return Sparsify(pattern=pattern).run(toy_program(module, [torch.zeros(3, DEPTH)]), context()).program


def rows(program: Program, form: Form) -> np.ndarray:
    """The stored weight with the contraction last."""
    value = program.weights.load("weight").numpy()
    return value if form.axis == 1 else value.T


def fed(*inputs: torch.Tensor, goal: Target | None = None, plan_only: bool = False) -> PassContext:
    return PassContext(
        goal or target(), SilentProgress(), calibration=Fed((), inputs=inputs) if inputs else None, plan_only=plan_only
    )
