"""Every pass on every architecture leaves a program that the IR's verifier accepts, and says honestly that it changed it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from compile_sparse.compiler.execution.executor import Executor
from compile_sparse.compiler.extension.pass_contract import PassContext
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.ir.verifier import verify_program
from compile_sparse.compiler.lowering import raising_steps, run_steps
from compile_sparse.compiler.pipeline.runner import run_passes
from compile_sparse.compiler.progress import SilentProgress
from compile_sparse.compiler.targets.target import find_target
from compile_sparse.passes.mask import Sparsify
from compile_sparse.passes.prune_channels import PruneChannels
from compile_sparse.passes.prune_conv import PruneConv
from compile_sparse.passes.quantize import Quantize
from compile_sparse.testing.models import MODELS, example_inputs

CONVOLUTIONAL = frozenset({"efficientnet", "resnet", "resnet_basic"})
"""Models without an MLP; hardly a linear layer to mask or quantize."""


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16-g32"])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_all_passes_verify_on_every_model(captured: Callable[[str], Program], name: str, scheme: str) -> None:
    dense = captured(name)
    verify_program(dense)
    if name in CONVOLUTIONAL:
        passes = [PruneConv(fraction=0.25)]
    else:
        passes = [PruneChannels(fraction=0.25), Sparsify(pattern="2:4"), Quantize(scheme=scheme)]
    context = PassContext(target=find_target("null"), progress=SilentProgress())
    program, sections = run_passes(dense, passes, context, verify_each=True)
    verify_program(run_steps(program, raising_steps())[0], after="raising")
    assert [section.name for section in sections] == [step.name for step in passes]
    assert program.parameter_count() < dense.parameter_count()
    outputs = Executor(program).run(example_inputs(program, 2, 6))
    assert all(bool(torch.isfinite(value).all()) for value in outputs.values())
