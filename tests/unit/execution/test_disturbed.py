"""What rounding does to a program: as much as was asked for, everywhere it rounds and nowhere else."""

from __future__ import annotations

import pytest
import torch

from compile_sparse.compiler.execution.disturbed import DisturbedExecutor
from compile_sparse.compiler.execution.executor import Executor, decoder_inputs
from compile_sparse.compiler.ir.program import Program
from tests.toys import toy_program


class Scaled(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * 2.0).transpose(0, 1)


@pytest.mark.parametrize("relative", [2e-5, 2.0**-9])
def test_each_computed_value_is_off_by_at_most_the_share_and_copies_are_not(relative: float) -> None:
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    program = toy_program(Scaled(), [x])
    inputs = {program.inputs[0].name: x}
    (found,) = DisturbedExecutor(program, relative=relative, seed=0).run(inputs).values()
    share = (found / (2 * x).t() - 1).abs()
    assert relative * 0.98 < share.max() <= relative * 1.001 + 1e-7
    assert share.mean() == pytest.approx(relative / 2, rel=0.1)


def test_the_same_seed_gives_the_same_noise(tiny_llama_program: Program) -> None:
    inputs = decoder_inputs(tiny_llama_program, torch.arange(2 * 7).reshape(2, 7))
    exact = Executor(tiny_llama_program).run(inputs)["logits"]
    first, again, other = (
        DisturbedExecutor(tiny_llama_program, relative=1e-3, seed=seed).run(inputs)["logits"] for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert 1e-4 < (first - exact).norm() / exact.norm() < 3e-2  # masks and angles stay exact: nothing is infinite
