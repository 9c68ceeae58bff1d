"""Layer by layer: does the runtime compute what the program does, from the values that the runtime itself had?

A whole model may amplify the last bit of a value into another answer, so that two right computations of it disagree, and a wrong
one hides among them. Here nothing is amplified: the program runs in torch, every layer's output is compared with what the runtime
shows for it, and the *runtime's* value is carried on. The next layer starts from what the runtime had.

What rounding explains is measured on the spot: the same run once more, every value off by a random share as large as the
runtime's rounding. Where activations are quantized, this moves some of them to the neighbouring code, as the
runtime's own rounding does.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import fx

from compile_sparse.compiler.artifact.report import LayerError, LayerFidelity
from compile_sparse.compiler.execution.disturbed import DisturbedExecutor
from compile_sparse.compiler.execution.executor import Executor, Observer, decoder_inputs, weight_only
from compile_sparse.compiler.extension.backend_contract import Observation
from compile_sparse.compiler.ir.gemms import gemm_of
from compile_sparse.compiler.ir.nodes import traced_module
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.progress import Progress
from compile_sparse.compiler.runtimes.client import Worker
from compile_sparse.compiler.runtimes.messages import Observe
from compile_sparse.compiler.verify.processor import processor_identity
from compile_sparse.compiler.verify.reference import reference_windows, sample_inputs
from compile_sparse.compiler.verify.rounding import LEAST_RELATIVE, NOISE_FACTOR, rounding_of

__all__ = ["Calls", "check_layers", "layer_errors", "observed_calls"]

ROWS_QUANTILE = 0.9
"""Of all rows, nine in ten: one activation on the border of two codes spoils a row of any right runtime."""
RUN = 8
"""Rows in a row of which the median counts too: a fault at one position or in one expert spoils all of them, a code few."""
SMALL_ROW = 0.1
"""Rows below this share of the typical length are measured against it, not against their own."""
LARGEST_BOUND = 0.3
"""A layer that rounding alone may put farther off is not judged: another choice of experts, for one, changes whole rows."""
BUDGET_BYTES = 256 << 20
"""Of observed values; the number of tokens follows, within these limits. Where even the fewest need more, layers are left out."""
LEAST_TOKENS, MOST_TOKENS, STEPS = 24, 256, 8
SAMPLES = 2
TIMEOUT_SECONDS = 1800

Values = Mapping[str, torch.Tensor]
Errors = tuple[float, ...]
"""Of one layer, one for each way to count rows; the same ways for what is compared."""


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


def observed_calls(observation: Observation, *, text: Sequence[Sequence[int]], seed: int) -> tuple[Observation, Calls]:
    """Calls on ``text``, for a decoder, or on a few samples, and the layers whose values ``BUDGET_BYTES`` leaves room for."""
    program = observation.program
    sizes = {name: _elements(program.node(name)) * 4 for name in observation.values}
    if program.kind == "decoder":
        windows = reference_windows(program, text, seed)
        kept, room = _thinned(sizes, LEAST_TOKENS)
        tokens = min(MOST_TOKENS, room)
        length = min(len(windows[0]), tokens)
        cut = [list(window[:length]) for window in windows[: max(1, tokens // length)]]
        calls = Calls(cut, max(1, length - STEPS))
    else:
        kept, room = _thinned(sizes, 1)
        calls = Calls(feeds=sample_inputs(program, seed, batch=min(SAMPLES, room), text=text))
    return replace(observation, values={name: observation.values[name] for name in kept}), calls


def _elements(node: fx.Node) -> int:
    """Elements of a value per token or sample: symbolic sizes are how many of them there are."""
    value = node.meta["val"]
    return math.prod(size for size in value.shape if isinstance(size, int))


def _thinned(sizes: Mapping[str, int], least: int) -> tuple[list[str], int]:
    """Layers, evenly spread, of which ``least`` tokens or samples fit into the budget, and how many of these do."""
    names, step = list(sizes), 1
    while step < len(names) and least * sum(sizes[name] for name in names[::step]) > BUDGET_BYTES:
        step += 1
    kept = names[::step]
    return kept, max(least, BUDGET_BYTES // max(1, sum(sizes[name] for name in kept)))


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
        program, relative = observation.program, rounding_of(observation.precision or precision)
        expected = _computed(Executor(program), program, calls, found)
        task.advance()
        disturbed = DisturbedExecutor(program, relative=relative, seed=seed)
        noise = layer_errors(_computed(disturbed, program, calls, found), expected)
        task.advance()
    return _judged(program, layer_errors(found, expected), noise)


def _judged(program: Program, errors: Mapping[str, Errors], noise: Mapping[str, Errors]) -> LayerFidelity:
    judged: list[tuple[float, LayerError]] = []
    for name, found in errors.items():
        bounds = [NOISE_FACTOR * each + LEAST_RELATIVE for each in noise[name]]
        if not all(bound <= LARGEST_BOUND for bound in bounds):
            continue
        pairs = list(zip(found, bounds, strict=True))
        excess, error, bound = max((_excess(*pair), *pair) for pair in pairs)
        layer = traced_module(program.node(name)) or name
        judged.append((excess, LayerError(layer=layer, error=error if math.isfinite(error) else None, bound=bound)))
    judged.sort(key=lambda each: each[0], reverse=True)
    wrong = tuple(entry for excess, entry in judged if excess > 1)
    return LayerFidelity(
        checked=len(judged),
        processor=processor_identity(),
        unseen=max(0, _weighted_layers(program) - len(judged)),
        wrong=wrong,
        nearest=judged[0][1] if judged and not wrong else None,
    )


def _weighted_layers(program: Program) -> int:
    """GEMMs and convolutions that have stored weights."""
    stored = weight_only(program)
    found = (gemm_of(node) for node in program.graph.nodes)
    return sum(gemm is not None and (gemm.weight in stored or gemm.input in stored) for gemm in found)


def _excess(error: float, bound: float) -> float:
    return error / bound if math.isfinite(error) else math.inf


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
            # Rows may be counted through: [B * S, N] here and [B, S, N] there. Any other layout is not compared.
            if shown.numel() != value.numel() or shown.shape[-1] != value.shape[-1]:
                return None
            computed[name] = value
            return shown.reshape(value.shape).to(value.dtype)

        return observe

    return {name: observer(name, shown) for name, shown in values.items()}


def layer_errors(found: Sequence[Values], expected: Sequence[Values]) -> dict[str, Errors]:
    """How far each layer is off, relative to its output: of nine rows in ten of the first call, of its worst run of rows, and the
    same of all later calls. Infinite where a value is not a number.
    """
    errors: dict[str, Errors] = {}
    for name in set.intersection(*(set(call) for call in expected)) if expected else ():
        ratios = [_row_errors(mine[name], theirs[name]) for mine, theirs in zip(found, expected, strict=True)]
        steps = [torch.cat([ratio for ratio, _ in ratios[1:]])] if len(ratios) > 1 else []
        runs = [[worst for _, worst in ratios[:1]], [worst for _, worst in ratios[1:]]]
        parts = [float(part.quantile(ROWS_QUANTILE)) for part in (ratios[0][0], *steps)]
        parts += [max(part) for part in runs if part]
        finite = all(bool(ratio.isfinite().all()) for ratio, _ in ratios)
        errors[name] = tuple(part if finite else math.inf for part in parts)
    return errors


def _row_errors(found: torch.Tensor, expected: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Per row (vector of the last dimension; of an image, all of a sample): length of the difference over that of the output. And
    the largest median of a run of rows: one position of all windows, or ``RUN`` rows that follow each other.
    """
    rows = expected.flatten(1) if expected.ndim > 3 else expected.reshape(-1, expected.shape[-1])
    difference = (found.reshape(rows.shape) - rows).float().norm(dim=-1)
    length = rows.float().norm(dim=-1)
    typical = length.square().mean().sqrt()
    ratios = difference / torch.maximum(length, SMALL_ROW * typical).clamp_min(torch.finfo(torch.float32).tiny)
    in_order, run = ratios, RUN
    if expected.ndim == 3 and expected.shape[0] > 2:
        in_order, run = ratios.reshape(expected.shape[:2]).t().flatten(), expected.shape[0]
    run = min(run, len(in_order))
    whole = [*in_order[: len(in_order) // run * run].split(run), in_order[-run:]]
    return ratios, float(torch.stack(whole).median(dim=1).values.max())
