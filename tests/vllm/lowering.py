"""Lower programs for vLLM without the command line, and load several of them into one worker."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from compile_sparse.backends.vllm.backend import VllmBackend
from compile_sparse.compiler.execution.calibration import CalibrationStream
from compile_sparse.compiler.extension.backend_contract import Lowered
from compile_sparse.compiler.extension.pass_contract import Pass, PassContext
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.ir.storage import cast_weights, torch_dtype
from compile_sparse.compiler.progress import SilentProgress
from compile_sparse.compiler.runtimes.client import Worker
from compile_sparse.compiler.runtimes.environments import find_runtime
from compile_sparse.compiler.runtimes.messages import Load
from compile_sparse.compiler.targets.target import Target, find_target, load_targets
from compile_sparse.compiler.verify.reference import write_reference

__all__ = ["SEQUENCE", "artifact", "here", "load", "text"]

SEQUENCE = 64
QUIET = SilentProgress()


def text(vocabulary: int, count: int = 8) -> list[list[int]]:
    """Windows of random tokens."""
    draws = np.random.default_rng(1)
    return [draws.integers(3, vocabulary, SEQUENCE).tolist() for _ in range(count)]


def here() -> Target:
    """The target of the registered vLLM: its processor, or the GPU it found."""
    record = find_runtime("vllm")
    if record is None or record.device == "cpu":
        return find_target("vllm-cpu")
    capability = record.facts.get("capability")
    fitting = [t for t in load_targets().values() if t.backend == "vllm" and t.compute_capability == capability]
    if not fitting:
        pytest.skip(f"there is no vLLM target for compute capability {capability}")
    return fitting[0]


def artifact(
    program: Program,
    passes: Sequence[Pass],
    out: Path,
    *,
    target: Target | None = None,
    change: Callable[[Program], Program] = lambda program: program,
) -> tuple[Program, Lowered]:
    """``out/model`` and ``out/reference.json`` as a compilation makes them.

    ``change`` is applied to what is written, and not to the reference: for artifacts that are wrong on purpose.
    """
    goal = target or here()
    windows = text(int(program.config["vocab_size"]))
    calibration = CalibrationStream(tuple(map(tuple, windows)))
    done = program
    for step in passes:
        done = step.run(done, PassContext(target=goal, progress=QUIET, calibration=calibration)).program
    dtype = torch_dtype(goal.baseline_precision)
    done = cast_weights(done, dtype)
    (out / "model").mkdir(parents=True)
    lowered = VllmBackend().lower(change(done), goal, out / "model", QUIET)
    write_reference(done, out, text=windows, precision=goal.baseline_precision, seed=0, progress=QUIET, windows=4)
    return done, lowered


def load(worker: Worker, name: str, folder: Path) -> None:
    """Load ``folder/model`` under ``name``."""
    model, device = str(folder / "model"), here().device
    worker.call(Load(name, model, threads=1, device=device, sequence=SEQUENCE, sequences=4))
