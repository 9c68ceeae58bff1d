"""Encoders of text, images and audio in ONNX Runtime: dense and pruned by every kind, equal to the program run in torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from compile_sparse.backends.onnxruntime import OnnxRuntimeBackend
from compile_sparse.compiler.axes.analysis import analyse
from compile_sparse.compiler.axes.rewrite import rewrite
from compile_sparse.compiler.execution.executor import Executor
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.progress import SilentProgress
from compile_sparse.compiler.targets.target import find_target
from compile_sparse.testing.encoders import ENCODERS
from compile_sparse.testing.models import example_inputs
from compile_sparse.testing.oracles import relative_error, tolerance
from tests.onnxruntime.running import run, session
from tests.support.encoder_groups import GROUPS
from tests.unit.axes.test_models import random_keep

CASES = [(name, kind) for name in ENCODERS for kind in ("dense", *sorted({kind for kind, _ in GROUPS[name]}))]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_encoder(captured: Callable[[str], Program], name: str, kind: str, tmp_path: Path) -> None:
    program, target = captured(name), find_target("ort-cpu")
    if kind != "dense":
        analysis = analyse(program)
        program = rewrite(program, analysis, random_keep(analysis, kind, seed=1))
    backend = OnnxRuntimeBackend()
    assert not backend.plan(program, target)
    backend.lower(program, target, tmp_path, SilentProgress())
    loaded = session(tmp_path)
    for batch, length in ((2, 7), (1, 4)):
        feeds = example_inputs(program, batch, length)
        expected, found = Executor(program).run(feeds), run(loaded, feeds)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert relative_error(found[key], value) <= tolerance(program), key
