"""Quantize weights with what calibration text says about their inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from compile_sparse.compiler.execution.calibration import CalibrationStream
from compile_sparse.compiler.execution.scratch import Scratch
from compile_sparse.compiler.extension.quantizer_contract import Quantizer
from compile_sparse.compiler.ir.linears import Linear
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.ir.weights import TensorSource
from compile_sparse.compiler.progress import Progress
from compile_sparse.passes.quantization.weights import Weight
from compile_sparse.passes.statistics.gram import Gram, each_gram
from compile_sparse.passes.statistics.norms import feature_norms

__all__ = ["calibrated_weights", "input_powers"]

POWER_WINDOWS = 16
TINY = 1e-300


def calibrated_weights(
    program: Program,
    linears: Sequence[Linear],
    weights: Mapping[tuple[str, int], Weight],
    quantizer: Quantizer,
    calibration: CalibrationStream,
    progress: Progress,
) -> dict[tuple[str, int], dict[str, TensorSource]]:
    """The stored tensors of every weight. Each is quantized as soon as the second moments of its inputs are there, and goes to
    disk: memory is that of ``each_gram``, not the model's.

    Args:
        program: what the text runs through.
        linears: layers of that program.
        weights: theirs.
        quantizer: which needs statistics.
        calibration, progress: the text, and where the work is reported.
    """
    inputs: dict[tuple[str, int], list[str]] = {}
    for linear in linears:
        inputs.setdefault((linear.tensor, linear.axis), []).append(linear.input.name)
    waiting, grams, scratch = dict(weights), dict[str, Gram](), Scratch()
    found: dict[tuple[str, int], dict[str, TensorSource]] = {}
    names = {name for group in inputs.values() for name in group}
    with progress.task("quantize", total=len(weights)) as task:
        for name, gram in each_gram(program, names, calibration, progress):
            grams[name] = gram
            for key in [key for key in waiting if all(each in grams for each in inputs[key])]:
                weight = waiting.pop(key)
                made = weight.computed(quantizer, _moment([grams[each] for each in inputs[key]]))
                found[key] = weight.kept(scratch.keep, made)
                task.advance()
            needed = {each for key in waiting for each in inputs[key]}
            grams = {name: each for name, each in grams.items() if name in needed}
            del gram  # before the next one is summed
    return found


def input_powers(
    program: Program, linears: Sequence[Linear], calibration: CalibrationStream, progress: Progress
) -> dict[tuple[str, int], torch.Tensor]:
    """``E[x_j^2]``, ``[K]`` float64, of the inputs of every weight, by tensor and contraction dimension.

    On at most ``POWER_WINDOWS`` windows, spread over the text: a mean per input settles long before a matrix of them does.

    Args:
        program: what the text runs through.
        linears: layers of that program.
        calibration, progress: the text, and where the work is reported.
    """
    text = calibration.spread(POWER_WINDOWS)
    norms = feature_norms(program, ((linear.input.name, -1) for linear in linears), text, progress)
    sums: dict[tuple[str, int], torch.Tensor] = {}
    for linear in linears:
        key, squares = (linear.tensor, linear.axis), norms[linear.input.name, -1].square()
        sums[key] = sums[key] + squares if key in sums else squares
    # Of several inputs the sum, of rows too: how they count against each other is all that matters.
    return {key: total / max(float(total.mean()), TINY) for key, total in sums.items()}


def _moment(grams: Sequence[Gram]) -> torch.Tensor:
    """``E[x x^T]`` over the inputs of all layers that share a weight."""
    if len(grams) == 1:
        return grams[0].moment
    return torch.stack([gram.second for gram in grams]).sum(0) / max(sum(gram.count for gram in grams), 1)
