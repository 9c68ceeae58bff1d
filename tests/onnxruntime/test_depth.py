"""Models that lost blocks, or only the attention of some, in ONNX Runtime and onnxruntime-genai."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from compile_sparse.backends.onnxruntime import OnnxRuntimeBackend
from compile_sparse.compiler.execution.executor import Executor, decoder_inputs
from compile_sparse.compiler.extension.pass_contract import PassContext
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.progress import SilentProgress
from compile_sparse.compiler.residual.units import UnitKind
from compile_sparse.compiler.targets.target import find_target
from compile_sparse.passes.prune_layers import PruneLayers
from tests.onnxruntime.conftest import ProgramOf
from tests.onnxruntime.running import run, session
from tests.support.tolerance import fp32_tolerance

IDS = torch.tensor([[5, 17, 40, 8, 33, 21], [9, 3, 55, 60, 2, 71]])


def shallower(program: Program, unit: UnitKind, out: Path) -> Program:
    """``program`` without half of its ``unit``s, written to ``out``."""
    context = PassContext(find_target("ort-cpu"), SilentProgress())
    pruned = PruneLayers(fraction=0.5, unit=unit, criterion="deepest").run(program, context).program
    OnnxRuntimeBackend().lower(pruned, context.target, out, SilentProgress())
    return pruned


@pytest.mark.parametrize(
    ("name", "unit"), [("llama", "block"), ("llama", "attention"), ("gpt2", "mlp"), ("bert", "block")]
)
def test_runtime_equals_the_program(program_of: ProgramOf, tmp_path: Path, name: str, unit: UnitKind) -> None:
    program = shallower(program_of(name), unit, tmp_path)
    loaded, executor = session(tmp_path), Executor(program)
    past: dict[str, torch.Tensor] = {}
    for part in (IDS[:, :5], IDS[:, 5:]) if program.kind == "decoder" else (IDS,):
        feeds = decoder_inputs(program, part, past=past)
        got, past = run(loaded, feeds), executor.run(feeds)
        assert got.keys() == past.keys()
        for key, wanted in past.items():
            assert (got[key] - wanted).abs().max() <= fp32_tolerance(wanted), key


@pytest.mark.parametrize("unit", ["block", "attention"])
def test_genai_picks_the_same_tokens(program_of: ProgramOf, tmp_path: Path, unit: UnitKind) -> None:
    og = pytest.importorskip("onnxruntime_genai")
    program = shallower(program_of("llama"), unit, tmp_path)
    config = json.loads((tmp_path / "genai_config.json").read_text())
    assert config["model"]["decoder"]["num_hidden_layers"] == 1  # one cache is left, whatever else the blocks hold
    prompt, steps = [5, 17, 40, 8], 12
    parameters = og.GeneratorParams(model := og.Model(str(tmp_path)))
    parameters.set_search_options(max_length=len(prompt) + steps, do_sample=False)
    generator = og.Generator(model, parameters)
    generator.append_tokens(np.array([prompt], np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    picked = [int(token) for token in generator.get_sequence(0)]
    ids, executor, outputs = list(prompt), Executor(program), {}
    while len(ids) < len(picked):
        fresh = ids[-1:] if outputs else ids
        outputs = executor.run(decoder_inputs(program, torch.tensor([fresh]), past=outputs))
        ids.append(int(outputs["logits"][0, -1].argmax()))
    assert len(picked) > len(prompt)
    assert picked == ids
