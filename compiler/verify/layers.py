"""Layer by layer: does the runtime compute what the program does, from the values that the runtime itself had?

A whole model may amplify the last bit of a value into another answer, so that two right computations of it disagree, and a wrong
one hides among them. Here nothing is amplified: the program runs in torch, every layer's output is compared with what the runtime
shows for it, and the *runtime's* value is carried on. The next layer starts from what the runtime had.

What rounding explains is measured on the spot: the same run once more, every value off by a random share as large as the
runtime's rounding. Where activations are quantized, this moves some of them to the neighbouring code, as the
runtime's own rounding does.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import fx

from compile_sparse.compiler.artifact.report import LayerError, LayerFidelity
from compile_sparse.compiler.execution.disturbed import DisturbedExecutor
from compile_sparse.compiler.execution.executor import Executor, Observer, decoder_inputs
from compile_sparse.compiler.extension.backend_contract import Observation
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.progress import Progress
from compile_sparse.compiler.runtimes.client import Worker
from compile_sparse.compiler.runtimes.messages import Observe
from compile_sparse.compiler.verify.reference import reference_windows, sample_inputs
from compile_sparse.compiler.verify.rounding import LEAST_RELATIVE, NOISE_FACTOR, rounding_of

__all__ = ["Calls", "check_layers", "decoder_calls", "layer_errors", "observed_calls"]

ROWS_QUANTILE = 0.9
"""A layer's error is that of nine rows in ten: one activation on the border of two codes spoils a row of any right runtime."""
SMALL_ROW = 0.1
"""Rows below this share of the typical length are measured against it, not against their own."""
BUDGET_BYTES = 256 << 20
"""Of observed values; the number of tokens follows, within these limits."""
LEAST_TOKENS, MOST_TOKENS, STEPS = 24, 256, 8
SAMPLES = 2
TIMEOUT_SECONDS = 1800

Values = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Calls:
    """What the runtime is asked: windows of tokens, ``prefill`` at once and then one by one; or one call with ``feeds``."""

    windows: Sequence[Sequence[int]] = ()
    prefill: int = 1
    feeds: Mapping[str, np.ndarray[Any, Any]] | None = None

    @property
    def longest(self) -> int:
        """Tokens of a window; 1 for other models."""
        return len(self.windows[0]) if self.windows else 1

    @property
    def count(self) -> int:
        """Calls of the model."""
        return self.longest - min(self.prefill, self.longest - 1) if self.windows else 1


def observed_calls(observation: Observation, *, text: Sequence[Sequence[int]], seed: int) -> Calls:
    """Calls on ``text``, for a decoder, or on a few samples."""
    program = observation.program
    if program.kind == "decoder":
        windows = reference_windows(program, text, seed)
        return decoder_calls(program, windows, list(observation.values))
    return Calls(feeds=sample_inputs(program, seed, batch=SAMPLES, text=text))


def decoder_calls(program: Program, windows: Sequence[Sequence[int]], names: Sequence[str]) -> Calls:
    """As many of ``windows`` (of one length), or as much of the first, as the observed values of ``names`` leave room for."""
    per_token = sum(4 * int(program.node(name).meta["val"].shape[-1]) for name in names)
    room = max(LEAST_TOKENS, min(MOST_TOKENS, BUDGET_BYTES // max(per_token, 1)))
    length = min(len(windows[0]), room)
    return Calls([list(w[:length]) for w in windows[: max(1, room // length)]], max(1, length - STEPS))


def check_layers(
    worker: Worker,
    name: str,
    observation: Observation,
    calls: Calls,
    *,
    precision: str,
    seed: int,
    progress: Progress,
) -> LayerFidelity:
    """Compare every observed layer.

    Args:
        worker: with ``observation.folder`` loaded.
        name: under which it is.
        observation: of a lowered folder.
        calls: what the model is run on.
        precision: the runtime computes in: ``fp32``, ``fp16`` or ``bf16``.
        seed: of the rounding that is imitated.
        progress: where it is reported.
    """
    with progress.task("layers", total=3) as task:
        found = _observed(worker, name, observation, calls)
        task.advance()
        program, relative = observation.program, rounding_of(precision)
        expected = _computed(Executor(program), program, calls, found)
        task.advance()
        disturbed = DisturbedExecutor(program, relative=relative, seed=seed)
        noise = layer_errors(_computed(disturbed, program, calls, found), expected)
        task.advance()
    return _judged(program, layer_errors(found, expected), noise)


def _judged(program: Program, errors: Mapping[str, float], noise: Mapping[str, float]) -> LayerFidelity:
    bounds = {name: NOISE_FACTOR * noise[name] + LEAST_RELATIVE for name in errors}
    by_excess = sorted(errors, key=lambda name: _excess(errors[name], bounds[name]), reverse=True)
    entries = [
        LayerError(
            layer=_module_of(program.node(name)) or name,
            error=errors[name] if np.isfinite(errors[name]) else None,
            bound=bounds[name],
        )
        for name in by_excess
    ]
    wrong = tuple(each for each in entries if each.error is None or each.error > each.bound)
    nearest = entries[0] if entries and not wrong else None
    return LayerFidelity(checked=len(errors), wrong=wrong, nearest=nearest)


def _module_of(node: fx.Node) -> str:
    """Path of the module a node was traced in; empty when that is not known."""
    stack = node.meta.get("nn_module_stack") or {}
    return next((str(entry[0]) for entry in reversed(stack.values()) if isinstance(entry, tuple)), "")


def _excess(error: float, bound: float) -> float:
    return error / bound if np.isfinite(error) else np.inf


def _observed(worker: Worker, name: str, observation: Observation, calls: Calls) -> list[dict[str, torch.Tensor]]:
    """Values by node of the program, call by call, as the runtime has them."""
    with tempfile.TemporaryDirectory() as scratch:
        feeds, outputs = Path(scratch, "feeds.npz"), Path(scratch, "values.npz")
        if calls.feeds is not None:
            np.savez(feeds, **calls.feeds)  # type: ignore[arg-type]
        request = Observe(
            name,
            sorted(set(observation.values.values())),
            str(outputs),
            windows=[list(window) for window in calls.windows],
            prefill=calls.prefill,
            feeds=str(feeds) if calls.feeds is not None else "",
        )
        worker.call(request, timeout=TIMEOUT_SECONDS)
        with np.load(outputs, allow_pickle=False) as archive:
            shown = set(archive.files)
            return [
                {
                    node: torch.from_numpy(archive[f"{number}.{value}"])
                    for node, value in observation.values.items()
                    if f"{number}.{value}" in shown
                }
                for number in range(calls.count)
            ]


def _computed(
    executor: Executor, program: Program, calls: Calls, found: Sequence[Values]
) -> list[dict[str, torch.Tensor]]:
    """What the program makes of each observed layer when all layers before it have the observed values."""
    results: list[dict[str, torch.Tensor]] = []
    outputs: dict[str, torch.Tensor] = {}
    start, stop = 0, min(calls.prefill, calls.longest - 1)
    tokens = torch.tensor([list(w) for w in calls.windows], dtype=torch.long)
    for values in found:
        computed: dict[str, torch.Tensor] = {}
        if calls.feeds is not None:
            inputs = {name: torch.from_numpy(value) for name, value in calls.feeds.items()}
        else:
            inputs = decoder_inputs(program, tokens[:, start:stop], past=outputs)
            start, stop = stop, stop + 1

        outputs = executor.run(inputs, observe=_carry_on(values, computed))
        results.append(computed)
    return results


def _carry_on(values: Values, computed: dict[str, torch.Tensor]) -> dict[str, Observer]:
    """Observers that note what was computed and put the observed value in its place."""

    def observer(name: str, shown: torch.Tensor) -> Observer:
        def observe(value: torch.Tensor) -> torch.Tensor | None:
            if shown.shape != value.shape:  # another layout of the same thing is not compared
                return None
            computed[name] = value
            return shown.to(value.dtype)

        return observe

    return {name: observer(name, shown) for name, shown in values.items()}


def layer_errors(found: Sequence[Values], expected: Sequence[Values]) -> dict[str, float]:
    """Largest error of each layer over the first call and over all later ones, relative to its output, row by row."""
    errors: dict[str, float] = {}
    for name in expected[0] if expected else ():
        ratios = [_row_errors(mine[name], theirs[name]) for mine, theirs in zip(found, expected, strict=True)]
        parts = [ratios[0], torch.cat(ratios[1:])] if len(ratios) > 1 else ratios
        errors[name] = max(float(part.quantile(ROWS_QUANTILE)) if part.isfinite().all() else np.inf for part in parts)
    return errors


def _row_errors(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Per row (vector of the last dimension; of a convolution, one sample): length of the difference over that of the output."""
    rows = expected.flatten(1) if expected.ndim > 3 else expected.reshape(-1, expected.shape[-1])
    difference = (found.reshape(rows.shape) - rows).float().norm(dim=-1)
    length = rows.float().norm(dim=-1)
    typical = length.square().mean().sqrt()
    return difference / torch.maximum(length, SMALL_ROW * typical).clamp_min(torch.finfo(torch.float32).tiny)
