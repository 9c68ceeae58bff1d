"""Decompositions cost one run of the model for all Gram matrices, and do not depend on how Fisher matrices are grouped."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from compile_sparse.compiler.execution.calibration import CalibrationStream
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.progress import SilentProgress
from compile_sparse.passes.factoring.candidates import find_candidates
from compile_sparse.passes.factoring.decompositions import decompositions
from tests.support.contexts import context
from tests.unit.counting import count_calls

GENERATOR = torch.Generator().manual_seed(5)
TEXT = CalibrationStream(
    tuple(tuple(torch.randint(3, 96, (16,), generator=GENERATOR).tolist()) for _ in range(12)), tokens_per_batch=64
)


@pytest.mark.parametrize("name", ["llama", "gptj"])  # gptj's MLP reads again what attention read
def test_every_node_runs_once_per_batch(captured: Callable[[str], Program], name: str) -> None:
    program = captured(name).clone()
    candidates, _ = find_candidates(program, context())
    calls = count_calls(program)
    found = list(decompositions(program, candidates, TEXT, SilentProgress(), outputs=False, budget_bytes=1))
    assert [each for each, _ in found] == candidates
    assert max(calls.values()) == len(TEXT)


def test_groups_of_fisher_matrices_change_nothing(tiny_llama_program: Program) -> None:
    candidates, _ = find_candidates(tiny_llama_program, context())
    whole, single = (
        list(decompositions(tiny_llama_program, candidates, TEXT, SilentProgress(), outputs=True, budget_bytes=budget))
        for budget in (1 << 30, 1)
    )
    assert len(whole) == len(single) == len(candidates)
    for (one, found), (other, expected) in zip(single, whole, strict=True):
        assert one is other
        assert torch.allclose(found.energies, expected.energies, rtol=1e-9, atol=0.0)
