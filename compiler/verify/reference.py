"""The program's own answers, computed once in torch and kept in the artifact: what the runtime must reproduce.

Decoders: next-token predictions on a batch of windows of real text, the cache filled by one prefill and then one token at a
time. The runtime is asked for exactly the same calls, because run-time activation scales depend on what is in a call.
Other models: outputs on text, or on seeded inputs where the model reads none.

Beside them lie the answers of the same program when every value is off by as much as the runtime's rounding
(``rounding.py``): what these differ by is what a right runtime may differ by.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compile_sparse.compiler.execution.disturbed import DisturbedExecutor
from compile_sparse.compiler.execution.executor import Executor, decoder_inputs
from compile_sparse.compiler.ir.model_facts import context_length
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.progress import Progress, Task
from compile_sparse.compiler.verify.rounding import rounding_of

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


def _windows(text: Sequence[Sequence[int]], count: int, vocabulary: int, length: int, seed: int) -> list[list[int]]:
    """``count`` windows of ``length`` ids, spread over ``text``; random ids when there is too little text."""
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
    length = min(TOKENS, context_length(program.config) or TOKENS)
    return _windows(text, windows, int(program.config["vocab_size"]), length, seed)


def sample_inputs(
    program: Program, seed: int, *, batch: int = 1, length: int = 64, text: Sequence[Sequence[int]] = ()
) -> dict[str, np.ndarray[Any, Any]]:
    """Inputs of a model of text, images or audio features without a cache: ``batch`` samples.

    Args:
        program: the model.
        seed: of what is drawn.
        batch: samples.
        length: tokens of each.
        text: token ids to take windows from; ids are drawn where there is too little.
    """
    draws = np.random.default_rng(seed)
    length = min(length, context_length(program.config) or length)
    values: dict[str, np.ndarray[Any, Any]] = {}
    for item in program.inputs:
        if item.role in ("pixel_values", "input_features"):
            shape = program.node(item.placeholder).meta["val"].shape
            values[item.name] = draws.standard_normal((batch, *map(int, shape[1:])), dtype=np.float32)
        elif item.role == "input_ids":
            values[item.name] = np.array(
                _windows(text, batch, int(program.config["vocab_size"]), length, seed), np.int64
            )
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
    precision: str,
    seed: int,
    progress: Progress,
    windows: int = WINDOWS,
) -> None:
    """Run ``program`` in torch and write what a runtime must reproduce into ``folder``.

    Args:
        program: what was lowered, with what the runtime's kernels round inside made explicit.
        folder: gets ``DECODER_FILE`` or ``SAMPLE_FILE``.
        text: token ids to take windows from.
        precision: the runtime computes in: ``fp32``, ``fp16`` or ``bf16``.
        seed: of what is drawn.
        progress: where it is reported.
        windows: how many (decoders).
    """
    exact, disturbed = Executor(program), DisturbedExecutor(program, relative=rounding_of(precision), seed=seed)
    if program.kind == "decoder":
        chosen = reference_windows(program, text, seed, windows)
        tokens, steps = torch.tensor(chosen, dtype=torch.long), max(1, len(chosen[0]) - PREFILL)
        with progress.task("reference in torch", total=2 * steps) as task:
            traces, noisy = (_traces(program, executor, tokens, task) for executor in (exact, disturbed))
        data = {"prefill": PREFILL, "windows": chosen, "traces": traces, "disturbed": noisy}
        (folder / DECODER_FILE).write_text(json.dumps(data), encoding="utf-8")
        return
    inputs = sample_inputs(program, seed, batch=SAMPLES, text=text)
    tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
    arrays = {f"in.{name}": value for name, value in inputs.items()}
    with progress.task("reference in torch", total=2) as task:
        for kind, executor in (("out", exact), ("disturbed", disturbed)):
            arrays |= {f"{kind}.{name}": value.float().numpy() for name, value in executor.run(tensors).items()}
            task.advance()
    np.savez(folder / SAMPLE_FILE, **arrays)  # type: ignore[arg-type]


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
