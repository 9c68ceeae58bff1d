"""Programs of the small models and their lowered folders, made once per session."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compile_sparse.backends.tensorrt.backend import TensorRtBackend
from compile_sparse.compiler.execution.calibration import CalibrationStream
from compile_sparse.compiler.extension.backend_contract import Lowered
from compile_sparse.compiler.extension.backend_options import RunFacts
from compile_sparse.compiler.extension.pass_contract import PassContext
from compile_sparse.compiler.extension.run_settings import DEFAULT_SETTINGS, RunSettings
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.ir.storage import cast_weights, torch_dtype
from compile_sparse.compiler.pipeline.settling import settle_run
from compile_sparse.compiler.progress import SilentProgress
from compile_sparse.compiler.recipes.building import Building
from compile_sparse.compiler.targets.target import Target, find_target
from compile_sparse.compiler.targets.workload import Workload
from compile_sparse.passes.mask import Sparsify
from compile_sparse.passes.quantize import Quantize
from compile_sparse.testing import calibration_for as random_calibration
from tests.support.served_models import WIDE
from tests.tensorrt.decoders import BATCH, LENGTH, decoder_folder
from tests.tensorrt.graphs import DECODER

if find_spec("onnx") is None or find_spec("onnxruntime") is None or find_spec("tensorrt_rtx") is None:
    collect_ignore_glob = ["test_*.py"]


@dataclass(frozen=True)
class Folder:
    """A lowered model: where, what was said of it, and the program it stands for."""

    path: Path
    lowered: Lowered
    program: Program


ProgramOf = Callable[[str], Program]
FolderOf = Callable[..., Folder]


def settings_for(target: Target, **building: Any) -> RunSettings:
    """What a run with the default workload and these options chooses, for the small models."""
    return settle_run(target, Building(**building), RunFacts(Workload(), WIDE.context))


def calibration_for(program: Program) -> CalibrationStream:
    """A little random text, or random images."""
    return random_calibration(program, samples=16 if program.kind == "vision" else 8, length=32)


def passed(
    program: Program, target: Target, scheme: str, sparsity: str, settings: RunSettings = DEFAULT_SETTINGS
) -> Program:
    """``program`` after the passes that are asked for, as it will be stored."""
    context = PassContext(target, SilentProgress(), calibration_for(program), settings=settings)
    if sparsity:
        program = Sparsify(pattern=sparsity).run(program, context).program
    if scheme:
        program = Quantize(scheme=scheme).run(program, context).program
    return cast_weights(program, torch_dtype(settings.precision_on(target)))


@pytest.fixture(scope="session")
def program_of(captured: ProgramOf) -> ProgramOf:
    """Captured program of a wide model by its family."""
    return lambda family: captured(f"wide/{family}")


@pytest.fixture(scope="session")
def folder_of(program_of: ProgramOf, tmp_path_factory: pytest.TempPathFactory) -> FolderOf:
    """``folder_of(name, target, scheme, sparsity, precision)``: the lowered folder; TensorRT-RTX built its graph on the way."""

    @cache
    def lower(
        name: str, target_name: str = "trt-a100", scheme: str = "", sparsity: str = "", precision: str = ""
    ) -> Folder:
        target = find_target(target_name)
        settings = settings_for(target, precision=precision or None)
        program = passed(program_of(name), target, scheme, sparsity, settings)
        out = tmp_path_factory.mktemp(f"{name}-{scheme or 'float'}")
        return Folder(out, TensorRtBackend().lower(program, target, out, SilentProgress(), settings), program)

    return lower


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return decoder_folder(tmp_path_factory.mktemp("decoder"), decomposable=True)


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return decoder_folder(tmp_path_factory.mktemp("exact"), precision="float32")


@pytest.fixture(scope="module")
def tokens() -> np.ndarray[Any, Any]:
    return np.random.default_rng(1).integers(0, DECODER["vocabulary"], (BATCH, LENGTH + 1))
