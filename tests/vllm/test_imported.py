"""Checkpoints that compressed-tensors wrote: their weights are what it decodes, bit for bit, and their logits are its own."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from compile_sparse.compiler.capture import capture, open_folder
from compile_sparse.compiler.capture.quantized import compressed_tensors as format_
from compile_sparse.compiler.execution.executor import Executor, decoder_inputs
from compile_sparse.compiler.ir.float_activations import with_float_activations
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.ir.quantized_tensor import QuantizedTensor
from compile_sparse.compiler.ir.verifier import verify_program
from compile_sparse.compiler.pipeline.imported import KeepCodes, scheme_name
from compile_sparse.compiler.runtimes.environments import RuntimeRecord
from compile_sparse.testing.oracles import relative_error, tolerance
from tests.vllm.layouts import IDS, PASSED_ON, SETTINGS, Answer, context, gpu, llama_model, read_back

WRITER = Path(__file__).with_name("compressed_tensors_writer.py")
INT8 = {"num_bits": 8, "type": "int"}
FP8 = {"num_bits": 8, "type": "float"}
FP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
TOKEN = {"strategy": "token", "dynamic": True}
FIXED = {"strategy": "tensor", "dynamic": False}


def four_bit(**changes: Any) -> dict[str, Any]:
    return {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, **changes}


Case = tuple[dict[str, Any], dict[str, Any] | None, str]
CASES: dict[str, Case] = {
    "int4": (four_bit(), None, "w4a16-g32"),
    "int4-bf16": (four_bit(group_size=128), None, "w4a16"),
    "int4-asym": (four_bit(symmetric=False), None, "w4a16-g32-asym"),
    "int4-channel-asym": (four_bit(strategy="channel", group_size=None, symmetric=False), None, "-"),
    "int4-order": (four_bit(actorder="group"), None, ""),
    "int4-order-asym": (four_bit(actorder="group", symmetric=False), None, ""),
    "int8-group": ({**INT8, "strategy": "group", "group_size": 128}, None, "w8a16"),
    "int8-asym": ({**INT8, "strategy": "channel", "symmetric": False}, None, ""),
    "int3": (four_bit(num_bits=3), None, ""),
    "int2-asym": (four_bit(num_bits=2, symmetric=False), None, ""),
    "w8a8": ({**INT8, "strategy": "channel"}, {**INT8, **TOKEN}, "w8a8"),
    "w8a8-tensor": ({**INT8, "strategy": "tensor"}, {**INT8, **TOKEN}, "w8a8"),
    "w8a8-static": ({**INT8, "strategy": "channel"}, {**INT8, **FIXED}, "w8a8-static"),
    "w8a8-static-asym": ({**INT8, "strategy": "channel"}, {**INT8, **FIXED, "symmetric": False}, ""),
    "fp8": ({**FP8, "strategy": "channel"}, {**FP8, **TOKEN}, "fp8"),
    "fp8-static": ({**FP8, "strategy": "tensor"}, {**FP8, **FIXED}, "fp8-static"),
    "fp8-block": (
        {**FP8, "strategy": "block", "block_structure": [128, 128]},
        {**FP8, "strategy": "group", "group_size": 128, "dynamic": True},
        "fp8-block",
    ),
    "nvfp4": (FP4, {**FP4, "dynamic": "local", "scale_dtype": "torch.float8_e4m3fn"}, "nvfp4"),
}
"""Weights, inputs, and the name of the scheme the codes are kept in: none where there is no operator, - where no target's."""


def described(case: Case) -> dict[str, Any]:
    weights, inputs, _ = case
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {"config_groups": {"group_0": group}, "ignore": ["lm_head"], "quantization_status": "initialized"}


@pytest.fixture(scope="module")
def read(runtime: RuntimeRecord, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, tuple[Path, Answer]]:
    """Every case as compressed-tensors wrote it, and what it makes of that: two processes for all."""
    base = tmp_path_factory.mktemp("imported")
    llama_model().save_pretrained(base / "dense")
    job = {
        "model": str(base / "dense"),
        "out": str(base),
        "cases": {name: described(case) for name, case in CASES.items()},
    }
    (base / "job.json").write_text(json.dumps(job), encoding="utf-8")
    given = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    command = [str(runtime.python), "-P", str(WRITER), str(base / "job.json")]
    ended = subprocess.run(command, env={**given, **SETTINGS}, capture_output=True, text=True, timeout=300, check=False)
    assert not ended.returncode, ended.stderr[-3000:]
    answers = read_back(runtime.python, [base / name for name in CASES], base / "read.json")
    return {name: (base / name, answers[name]) for name in CASES}


def logits(program: Program) -> torch.Tensor:
    return Executor(program).run(decoder_inputs(program, torch.tensor(IDS)))["logits"]


@pytest.mark.parametrize("name", CASES)
def test_weights_are_what_compressed_tensors_decodes(read: Mapping[str, tuple[Path, Answer]], name: str) -> None:
    folder, answer = read[name]
    assert not answer.failure, answer.failure
    program = capture(open_folder(folder))
    assert len(answer.weights) == 15
    for module, wanted in answer.weights.items():
        assert torch.equal(program.weights.load(f"{module}.weight"), wanted), module
    assert relative_error(answer.plain, logits(program)) <= tolerance(program)


@pytest.mark.parametrize("name", CASES)
def test_codes_are_kept_where_there_is_an_operator(read: Mapping[str, tuple[Path, Answer]], name: str) -> None:
    folder, answer = read[name]
    dense, wanted = capture(open_folder(folder)), CASES[name][2]
    coded = [source for source in dense.weights.values() if isinstance(source, QuantizedTensor)]
    assert len(coded) == (14 if wanted else 0)
    assert bool(dense.source.said) == (not wanted)
    result = KeepCodes(method="compressed-tensors", captured=dense).run(dense, context())
    verify_program(result.program)
    if wanted in ("", "-"):
        assert not result.modified
        assert result.diagnostics
        return
    assert {scheme_name(source.scheme, gpu()) for source in coded} == {wanted}
    assert result.achieved == {"codes": {wanted: 14}, "in_float": 0}
    plain = with_float_activations(result.program)
    assert relative_error(answer.plain, logits(plain)) <= tolerance(plain)
    apart = relative_error(answer.quantized, logits(result.program))
    rounding = relative_error(answer.plain, answer.quantized)
    # Run-time scales of int8 inputs are max/127.5 in compressed-tensors, max/127 in runtimes and here: another rounding as large.
    assert apart <= (2 * rounding if wanted == "w8a8" else 0.1 * rounding) + tolerance(plain)


MUTANTS = {
    "nibbles": ("int4", "unpacked", lambda made: lambda words, bits, dim: made(words, bits, dim).flip(dim)),
    "zero points": (
        "int4-asym",
        "unpacked",
        lambda made: (
            lambda words, bits, dim: made(words, bits, dim).roll(1, dim) if dim == 0 else made(words, bits, dim)
        ),
    ),
    "order": ("int4-order", "_order", lambda made: lambda *given: made(*given).roll(1)),
    "fp4": ("nvfp4", "fp4_codes", lambda made: lambda pairs: made(pairs).unflatten(-1, (-1, 2)).flip(-1).flatten(-2)),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_decoding_is_noticed(
    read: Mapping[str, tuple[Path, Answer]], monkeypatch: pytest.MonkeyPatch, mutant: str
) -> None:
    name, attribute, change = MUTANTS[mutant]
    monkeypatch.setattr(format_, attribute, change(getattr(format_, attribute)))
    with pytest.raises(AssertionError):
        test_weights_are_what_compressed_tensors_decodes(read, name)
