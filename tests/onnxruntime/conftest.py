"""Programs of the tiny models and lowered folders, made once per session."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

from compile_sparse.backends.onnxruntime import OnnxRuntimeBackend
from compile_sparse.compiler.extension.backend_contract import Lowered
from compile_sparse.compiler.extension.pass_contract import PassContext
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.progress import SilentProgress
from compile_sparse.compiler.targets.target import find_target
from compile_sparse.passes.quantize import Quantize

if find_spec("onnx") is None or find_spec("onnxruntime") is None:
    collect_ignore_glob = ["test_*.py"]

ProgramOf = Callable[[str], Program]
FolderOf = Callable[..., tuple[Path, Lowered, Program]]


@pytest.fixture(scope="session")
def program_of(captured: ProgramOf) -> ProgramOf:
    """Captured program of a small model by its family."""
    return lambda family: captured(f"small/{family}")


@pytest.fixture(scope="session")
def folder_of(program_of: ProgramOf, tmp_path_factory: pytest.TempPathFactory) -> FolderOf:
    """``folder_of(name, scheme)``: the lowered folder, its description and the program it stands for."""
    target = find_target("ort-cpu")

    @cache
    def lower(name: str, scheme: str = "") -> tuple[Path, Lowered, Program]:
        program = program_of(name)
        if scheme:
            context = PassContext(target=target, progress=SilentProgress())
            program = Quantize(scheme=scheme).run(program, context).program
        out = tmp_path_factory.mktemp(f"{name}-{scheme or 'fp32'}")
        return out, OnnxRuntimeBackend().lower(program, target, out, SilentProgress()), program

    return lower
