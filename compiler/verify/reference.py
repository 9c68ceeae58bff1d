"""The program's own answers, computed once in torch and kept in the artifact: what the runtime must reproduce.

Decoders: next-token predictions on windows of real text, with the cache filled by one prefill and then one token at a time.
The runtime is asked for exactly the same calls, because run-time activation scales depend on what is in a call.
Encoders and vision models: outputs on seeded inputs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compile_sparse.compiler.execute import Executor, decoder_inputs
from compile_sparse.compiler.program import Program
from compile_sparse.compiler.progress import Progress

__all__ = ["DECODER_FILE", "SAMPLE_FILE", "reference_windows", "sample_inputs", "write_reference"]

DECODER_FILE = "reference.json"
SAMPLE_FILE = "reference.npz"
WINDOWS, TOKENS, PREFILL = 8, 64, 48
SAMPLES = 8


def reference_windows(text: Sequence[Sequence[int]], vocabulary: int, context: int, seed: int) -> list[list[int]]:
    """``WINDOWS`` windows of up to ``TOKENS`` ids, spread over ``text``; random ids when there is too little text."""
    length = min(TOKENS, context)
    usable = [list(window[:length]) for window in text if len(window) >= length]
    chosen = [usable[i * len(usable) // WINDOWS] for i in range(WINDOWS)] if len(usable) >= WINDOWS else usable
    draws = np.random.default_rng(seed)
    while len(chosen) < WINDOWS:
        chosen.append(draws.integers(0, vocabulary, length).tolist())
    return chosen


def sample_inputs(program: Program, seed: int, *, batch: int = 1, length: int = 64) -> dict[str, np.ndarray[Any, Any]]:
    """Seeded inputs of an encoder or vision model: ``batch`` samples."""
    draws = np.random.default_rng(seed)
    length = min(length, int(program.config.get("max_position_embeddings") or length))
    values: dict[str, np.ndarray[Any, Any]] = {}
    for item in program.inputs:
        if item.role == "pixel_values":
            shape = program.node(item.placeholder).meta["val"].shape
            values[item.name] = draws.standard_normal((batch, *map(int, shape[1:])), dtype=np.float32)
        elif item.role == "input_ids":
            values[item.name] = draws.integers(0, int(program.config["vocab_size"]), (batch, length))
        elif item.role == "attention_mask":
            values[item.name] = np.ones((batch, length), np.int64)
        else:
            values[item.name] = np.zeros((batch, length), np.int64)
    return values


def write_reference(
    program: Program, folder: Path, *, windows: Sequence[Sequence[int]], seed: int, progress: Progress
) -> None:
    """Run ``program`` in torch and write what a runtime must reproduce into ``folder``."""
    executor = Executor(program)
    if program.kind == "decoder":
        traces = []
        with progress.task("reference in torch", total=len(windows)) as task:
            for window in windows:
                traces.append(_trace(program, executor, list(window)))
                task.advance()
        data = {"prefill": PREFILL, "windows": [list(w) for w in windows], "traces": traces}
        (folder / DECODER_FILE).write_text(json.dumps(data), encoding="utf-8")
        return
    with progress.task("reference in torch", total=1) as task:
        inputs = sample_inputs(program, seed, batch=SAMPLES)
        outputs = executor.run({name: torch.from_numpy(value) for name, value in inputs.items()})
        task.advance()
    arrays = {f"in.{name}": value for name, value in inputs.items()}
    arrays |= {f"out.{name}": value.numpy() for name, value in outputs.items()}
    np.savez(folder / SAMPLE_FILE, **arrays)  # type: ignore[arg-type]


def _trace(program: Program, executor: Executor, ids: list[int]) -> dict[str, list[float]]:
    tokens = torch.tensor([ids], dtype=torch.long)
    first = min(PREFILL, len(ids) - 1)
    outputs = executor.run(decoder_inputs(program, tokens[:, :first]))
    rows = [outputs["logits"][0]]
    for position in range(first, len(ids) - 1):
        outputs = executor.run(decoder_inputs(program, tokens[:, position : position + 1], past=outputs))
        rows.append(outputs["logits"][0])
    logits = torch.cat(rows).double()
    log_probabilities = logits.log_softmax(-1)
    best = logits.topk(2, dim=-1)
    picked = log_probabilities.gather(1, tokens[0, 1:, None])
    return {
        "top1": best.indices[:, 0].tolist(),
        "logprob": picked[:, 0].tolist(),
        "margin": (best.values[:, 0] - best.values[:, 1]).tolist(),
    }
