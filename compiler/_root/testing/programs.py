"""What conformance checks run on: tiny captured programs, text for them, and the same programs without weights."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from functools import cache

import numpy as np
import torch

from compile_sparse.compiler.capture import capture_model
from compile_sparse.compiler.execution.calibration import CalibrationStream
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.ir.weights import AbsentTensor, WeightStore
from compile_sparse.testing.models import build_model

__all__ = ["calibration_for", "contents", "tiny_program", "without_weights"]


@cache
def tiny_program(name: str) -> Program:
    """The tiny model called ``name`` (see ``testing.models.MODELS``), captured once per process."""
    return capture_model(build_model(name))


def calibration_for(program: Program, *, samples: int = 8, length: int = 12) -> CalibrationStream:
    """Random token windows for a model that reads text, random arrays for one that reads images or sound."""
    draws = np.random.default_rng(0)
    vocabulary = int(program.config.get("vocab_size") or 0)
    if any(entry.role == "input_ids" for entry in program.inputs):
        return CalibrationStream(tuple(tuple(draws.integers(3, vocabulary, length).tolist()) for _ in range(samples)))
    arrays = {}
    for entry in program.inputs:
        shape = program.node(entry.placeholder).meta["val"].shape[1:]
        arrays[entry.name] = draws.standard_normal((samples, *map(int, shape)), np.float32)
    return CalibrationStream((), arrays=arrays)


def without_weights(program: Program) -> Program:
    """The program as ``explain`` sees it: parameters known by shape only, so that reading one is an error."""
    parameters = {binding.tensor for binding in program.bindings.values() if binding.kind == "parameter"}
    return replace(
        program,
        weights=WeightStore(
            {
                name: AbsentTensor(source.shape, source.dtype, name) if name in parameters else source
                for name, source in program.weights.items()
            }
        ),
    )


def contents(program: Program, *, values: bool = True) -> str:
    """Digest of a program: graph, bindings, interface, masks, shapes and dtypes, and with ``values`` every stored number."""
    digest = hashlib.sha256(str(program.graph).encode())
    for part in (program.bindings, program.inputs, program.outputs, program.masks, program.aliases):
        digest.update(repr(part).encode())
    for name in sorted({binding.tensor for binding in program.bindings.values()}):
        source = program.weights[name]
        digest.update(f"{name} {source.shape} {source.dtype}".encode())
        if values:
            digest.update(source.load().flatten().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
