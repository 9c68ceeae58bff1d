"""vLLM's own loader of ModelOpt checkpoints reads ours as the program means them (on a CPU; NVFP4 has no kernel there)."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.runtimes.environments import RuntimeRecord
from tests.tensorrt.test_unified import logits, made, written
from tests.vllm.conftest import registered_runtimes, runtime  # noqa: F401  (fixtures)
from tests.vllm.layouts import IDS, PASSED_ON

pytestmark = pytest.mark.slow
READER = Path(__file__).with_name("vllm_reader.py")
NAMES = ("plain", "FP8", "FP8_PER_CHANNEL_PER_TOKEN")
SECONDS = 300


def told(program: Program) -> torch.Tensor:
    """Log-probability of every token but the first, given those before it."""
    found = logits(program).log_softmax(-1)[:, :-1]
    return found.gather(-1, torch.tensor(IDS)[:, 1:, None])[..., 0]


def other_scales(folder: Path) -> None:
    """Make every weight a quarter larger."""
    tensors = load_file(folder / "model.safetensors")
    changed = {name: value * 1.25 if name.endswith("weight_scale") else value for name, value in tensors.items()}
    save_file(changed, folder / "model.safetensors")


@pytest.fixture(scope="module")
def answers(runtime: RuntimeRecord, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, torch.Tensor]:  # noqa: F811
    """What vLLM tells of every folder; one process loads all."""
    base = tmp_path_factory.mktemp("unified")
    for name in (*NAMES, "mutant"):
        written(made("FP8" if name == "mutant" else name), base / name)
    other_scales(base / "mutant")
    folders = [str(base / name) for name in (*NAMES, "mutant")]
    job = base / "job.json"
    job.write_text(json.dumps({"folders": folders, "ids": IDS, "answer": str(base / "answer.json")}), encoding="utf-8")
    given = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    command = [str(runtime.python), "-P", str(READER), str(job)]
    ended = subprocess.run(
        command, env={**given, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    found = json.loads((base / "answer.json").read_text(encoding="utf-8"))
    return {name: torch.tensor(value) for name, value in found.items()}


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).abs().mean())


def test_a_plain_checkpoint_differs_by_bfloat16(answers: Mapping[str, torch.Tensor]) -> None:
    """vLLM computes in bfloat16, which keeps 8 bits: about 2^-9 of logits of a few units, over 15 products."""
    assert difference(answers["plain"], told(made("plain"))) < 2**-9 * 4 * 15**0.5


@pytest.mark.parametrize("name", ["FP8", "FP8_PER_CHANNEL_PER_TOKEN"])
def test_coded_checkpoints_are_what_the_program_means(name: str, answers: Mapping[str, torch.Tensor]) -> None:
    """Nearer to the coded program than that is to the dense one: a value that bfloat16 moves over a boundary of e4m3 (one of
    about 16, 2^-9 against 2^-4) gets the next code, so a share of the coding noise differs.
    """
    coded, dense = told(made(name)), told(made("plain"))
    assert difference(answers[name], coded) < 0.8 * difference(coded, dense)


def test_other_scales_would_be_noticed(answers: Mapping[str, torch.Tensor]) -> None:
    coded, dense = told(made("FP8")), told(made("plain"))
    assert difference(answers["mutant"], coded) > 2 * difference(coded, dense)
