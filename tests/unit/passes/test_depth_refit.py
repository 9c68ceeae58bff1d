"""After blocks are removed, the layers that stay take over what they did."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from compile_sparse.compiler.execution.calibration import CalibrationStream
from compile_sparse.compiler.execution.executor import Executor, decoder_inputs
from compile_sparse.compiler.extension.pass_contract import PassContext
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.progress import SilentProgress
from compile_sparse.compiler.residual.branches import find_branches
from compile_sparse.compiler.residual.remove import drop_branches
from compile_sparse.compiler.targets.target import find_target
from compile_sparse.passes.prune_layers import PruneLayers
from compile_sparse.passes.reconstruction.least_squares import refit

GENERATOR = torch.Generator().manual_seed(4)
WINDOWS = CalibrationStream(tuple(tuple(torch.randint(3, 96, (24,), generator=GENERATOR).tolist()) for _ in range(24)))
SILENT = SilentProgress()


def error(dense: Program, other: Program) -> float:
    ids = torch.tensor(WINDOWS.windows)
    a = Executor(dense).run(decoder_inputs(dense, ids))["logits"]
    b = Executor(other).run(decoder_inputs(other, ids))["logits"]
    return float((a - b).double().square().mean())


@pytest.mark.parametrize("name", ["llama", "gpt2", "gptj", "phi"])  # the last two run attention and MLP side by side
def test_the_layer_before_a_gap_is_fitted_to_the_stream_behind_it(
    name: str, captured: Callable[[str], Program]
) -> None:
    dense = captured(name)
    dropped = drop_branches(dense, [branch for branch in find_branches(dense) if branch.layer == 1])
    ((_, behind),) = dropped.stands_for.items()
    assert behind == find_branches(dense)[-1].add
    repaired = refit(dense, dropped.program, WINDOWS, SILENT, stands_for=dropped.stands_for).program
    to_its_namesake = refit(dense, dropped.program, WINDOWS, SILENT).program
    # Fitted to its own old place a layer has nothing to repair; fitted to the far side of the gap it takes over.
    assert error(dense, repaired) < 0.9 * error(dense, dropped.program)
    assert error(dense, repaired) < error(dense, to_its_namesake)


def test_the_pass_refits_when_it_has_text(tiny_llama_program: Program) -> None:
    context = PassContext(find_target("null"), SILENT, calibration=WINDOWS)
    plain = PruneLayers(fraction=0.5, compensation="none").run(tiny_llama_program, context)
    repaired = PruneLayers(fraction=0.5).run(tiny_llama_program, context)
    assert plain.achieved["compensation"] == "none"
    assert repaired.achieved["compensation"] == "least-squares"
    assert repaired.achieved["removed"] == plain.achieved["removed"]
    assert error(tiny_llama_program, repaired.program) < error(tiny_llama_program, plain.program)
