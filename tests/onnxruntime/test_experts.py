"""Mixtures of experts, dense and with fewer experts, in ONNX Runtime: prefill and a cached step equal the program."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from compile_sparse.backends.onnxruntime import OnnxRuntimeBackend
from compile_sparse.compiler.axes.analysis import analyse
from compile_sparse.compiler.axes.rewrite import rewrite
from compile_sparse.compiler.execution.executor import Executor, decoder_inputs
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.progress import SilentProgress
from compile_sparse.compiler.targets.target import find_target
from compile_sparse.testing.oracles import relative_error, tolerance
from tests.onnxruntime.running import run, session


@pytest.mark.parametrize("fewer", [False, True])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts(name: str, fewer: bool, captured: Callable[[str], Program], tmp_path: Path) -> None:
    program = captured(name)
    if fewer:
        analysis = analyse(program)
        keep = {g.anchor: torch.arange(g.size) % 3 != 1 for g in analysis.prunable("experts")}
        program = rewrite(program, analysis, keep)
    OnnxRuntimeBackend().lower(program, find_target("ort-cpu"), tmp_path, SilentProgress())
    ids = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(1))
    first = decoder_inputs(program, ids[:, :8])
    expected = Executor(program).run(first)
    past = {key: value for key, value in expected.items() if key.startswith("present")}
    step = decoder_inputs(program, ids[:, 8:], past=past)
    loaded = session(tmp_path)
    for feed, wanted in ((first, expected), (step, Executor(program).run(step))):
        found = run(loaded, feed)
        assert relative_error(found["logits"], wanted["logits"]) <= 4 * tolerance(program)
