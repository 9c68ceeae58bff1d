"""The program's own answers, computed once in torch and kept in the artifact: what the runtime must reproduce.

Decoders: next-token predictions on a batch of windows of real text, the cache filled by one prefill and then one token at a
time. The runtime is asked for exactly the same calls, because run-time activation scales depend on what is in a call.
Encoders and vision models: outputs on seeded inputs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compile_sparse.compiler.execution.executor import Executor, decoder_inputs
from compile_sparse.compiler.ir.float_activations import with_float_activations
from compile_sparse.compiler.ir.model_facts import context_length
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.progress import Progress, Task

__all__ = [
    "DECODER_FILE",
    "SAMPLES",
    "SAMPLE_FILE",
    "reference_windows",
    "sample_inputs",
    "write_reference",
]

DECODER_FILE = "reference.json"
SAMPLE_FILE = "reference.npz"
WINDOWS, TOKENS, PREFILL = 8, 64, 56
SAMPLES = 8


def _windows(text: Sequence[Sequence[int]], count: int, vocabulary: int, context: int, seed: int) -> list[list[int]]:
    """``count`` windows of up to ``TOKENS`` ids, spread over ``text``; random ids when there is too little text."""
    length = min(TOKENS, context)
    usable = [list(window[:length]) for window in text if len(window) >= length]
    chosen = [usable[i * len(usable) // count] for i in range(count)] if len(usable) >= count else usable
    draws = np.random.default_rng(seed)
    while len(chosen) < count:
        chosen.append(draws.integers(0, vocabulary, length).tolist())
    return chosen


def reference_windows(
    program: Program, text: Sequence[Sequence[int]], seed: int, windows: int = WINDOWS
) -> list[list[int]]:
    """Token ids that a decoder's reference is computed on."""
    return _windows(text, windows, int(program.config["vocab_size"]), context_length(program.config) or TOKENS, seed)


def sample_inputs(program: Program, seed: int, *, batch: int = 1, length: int = 64) -> dict[str, np.ndarray[Any, Any]]:
    """Seeded inputs of a model of text, images or audio features without a cache: ``batch`` samples."""
    draws = np.random.default_rng(seed)
    length = min(length, context_length(program.config) or length)
    values: dict[str, np.ndarray[Any, Any]] = {}
    for item in program.inputs:
        if item.role in ("pixel_values", "input_features"):
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
    program: Program,
    folder: Path,
    *,
    text: Sequence[Sequence[int]],
    seed: int,
    progress: Progress,
    windows: int = WINDOWS,
    dense: Program | None = None,
) -> None:
    """Run ``program`` in torch and write what a runtime must reproduce into ``folder``.

    Args:
        program: what was lowered.
        folder: gets ``DECODER_FILE`` or ``SAMPLE_FILE``.
        text: token ids to take windows from (decoders).
        seed: of inputs that are drawn.
        progress: where windows are reported.
        windows: how many (decoders).
        dense: the dense program; with it (decoders) the file tells its answers on the same windows too, which shows how noisy
            the runtime's own arithmetic is, and how much quantizing activations changes the program's.
    """
    executor = Executor(program)
    if program.kind == "decoder":
        chosen = reference_windows(program, text, seed, windows)
        tokens, steps = torch.tensor(chosen, dtype=torch.long), max(1, len(chosen[0]) - PREFILL)
        with progress.task("reference in torch", total=steps * (1 if dense is None else 2)) as task:
            traces = _traces(program, executor, tokens, task)
            data: dict[str, Any] = {"prefill": PREFILL, "windows": chosen, "traces": traces}
            if dense is not None:
                data["dense_traces"] = _traces(dense, Executor(dense), tokens, task)
        plain = with_float_activations(program) if dense is not None else program
        if plain is not program:
            with progress.task("effect of quantized activations", total=steps) as task:
                others = _traces(plain, Executor(plain), tokens, task)
            data["activation_error"] = _mean_difference(traces, others)
        (folder / DECODER_FILE).write_text(json.dumps(data), encoding="utf-8")
        return
    with progress.task("reference in torch", total=1) as task:
        inputs = sample_inputs(program, seed, batch=SAMPLES)
        outputs = executor.run({name: torch.from_numpy(value) for name, value in inputs.items()})
        task.advance()
    arrays = {f"in.{name}": value for name, value in inputs.items()}
    arrays |= {f"out.{name}": value.numpy() for name, value in outputs.items()}
    np.savez(folder / SAMPLE_FILE, **arrays)  # type: ignore[arg-type]


def _mean_difference(some: list[dict[str, list[float]]], others: list[dict[str, list[float]]]) -> float:
    pairs = zip(some, others, strict=True)
    return float(np.mean([np.abs(np.subtract(a["logprob"], b["logprob"])) for a, b in pairs]))


def _traces(program: Program, executor: Executor, tokens: torch.Tensor, task: Task) -> list[dict[str, list[float]]]:
    """Predictions for ``tokens [B, T]``, per window; all windows run as one batch, so each weight is read once per step."""
    length = tokens.shape[1]
    traces: list[dict[str, list[float]]] = [{"top1": [], "logprob": [], "margin": []} for _ in tokens]
    outputs: dict[str, torch.Tensor] = {}
    start, stop = 0, min(PREFILL, length - 1)
    while start < length - 1:
        outputs = executor.run(decoder_inputs(program, tokens[:, start:stop], past=outputs))
        logits = outputs["logits"].double()
        best = logits.topk(2, dim=-1)
        picked = logits.log_softmax(-1).gather(2, tokens[:, start + 1 : stop + 1, None])[..., 0]
        margins = best.values[..., 0] - best.values[..., 1]
        for row, trace in enumerate(traces):
            trace["top1"] += best.indices[row, :, 0].tolist()
            trace["logprob"] += picked[row].tolist()
            trace["margin"] += margins[row].tolist()
        task.advance()
        start, stop = stop, stop + 1
    return traces
