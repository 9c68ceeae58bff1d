"""Every step towards the graph leaves a program that the verifier accepts, whatever the weights' format."""

from __future__ import annotations

import pytest

from compile_sparse.backends.tensorrt.graph.lowering import lowering_steps
from compile_sparse.compiler.extension.pass_contract import PassContext
from compile_sparse.compiler.pipeline.runner import run_passes
from compile_sparse.compiler.progress import SilentProgress
from compile_sparse.compiler.targets.target import find_target
from tests.tensorrt.conftest import ProgramOf, passed


@pytest.mark.parametrize(
    ("name", "target_name", "scheme", "sparsity"),
    [
        ("llama", "trt-a100", "", "2:4"),
        ("llama", "trt-a100", "w8a8-static", ""),
        ("llama", "trt-a100", "w4a16", ""),
        ("llama", "trt-l4", "fp8-static", ""),
        ("llama", "trt-rtx5090", "nvfp4", ""),
        ("gpt2", "trt-a100", "w8a8-static", ""),
        ("bert", "trt-a100", "", ""),
        ("vit", "trt-a100", "w4a16", ""),
        ("resnet", "trt-a100", "", ""),
    ],
)
def test_steps_verify(program_of: ProgramOf, name: str, target_name: str, scheme: str, sparsity: str) -> None:
    target = find_target(target_name)
    program = passed(program_of(name), target, scheme, sparsity)
    context = PassContext(target=target, progress=SilentProgress())
    _, sections = run_passes(program, lowering_steps(target.baseline_precision), context, verify_each=True)
    assert [section.name for section in sections][-1] == "mixed precision"
