"""Lowered folders of small models."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from compile_sparse.backends.onnxruntime import OnnxRuntimeBackend
from compile_sparse.compiler.extension.pass_contract import PassContext
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.progress import SilentProgress
from compile_sparse.compiler.targets.target import find_target
from compile_sparse.passes.quantize import Quantize

Lowered = Callable[..., Path]


@pytest.fixture(scope="module")
def lowered(captured: Callable[[str], Program], tmp_path_factory: pytest.TempPathFactory) -> Lowered:
    """The lowered folder of a tiny model of ONNX Runtime's tests."""
    target = find_target("ort-cpu")

    @cache
    def make(name: str, scheme: str) -> Path:
        program = captured(f"small/{name}")
        if scheme:
            context = PassContext(target=target, progress=SilentProgress())
            program = Quantize(scheme=scheme).run(program, context).program  # type: ignore[arg-type]
        out = tmp_path_factory.mktemp("lowered") / "model"
        out.mkdir()
        OnnxRuntimeBackend().lower(program, target, out, SilentProgress())
        return out

    return lambda name, scheme="": make(name, scheme)
