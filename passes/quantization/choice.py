"""Which layers a scheme would put too far off, by the error of their outputs, and what they have instead."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from compile_sparse.compiler.diagnostics import Diagnostic
from compile_sparse.compiler.execution.executor import decoder_inputs
from compile_sparse.compiler.execution.layerwise import LayerwiseExecutor
from compile_sparse.compiler.extension.pass_contract import PassContext
from compile_sparse.compiler.ir.linears import Linear, is_lm_head
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.ir.quantization_schemes import SCHEMES, Scheme
from compile_sparse.compiler.verify.reference import sample_inputs
from compile_sparse.passes.quantization.layer_error import layer_error

__all__ = ["Choices", "choose_schemes"]

LARGEST_ERROR = 0.05
"""Of the output's length, where a slower format follows that is still quantized. With one scale per token SmolLM2-135M has 26 of
210 layers above it, nearly all of them value projections (3 % of a block's weights), and its lm_head; the median is 0.025, and
8-bit weights alone halve every one of them."""
DESTROYED = 0.1
"""The same where floating point is all that follows, which takes at least twice the time: one per cent of the output's energy is
noise. With one fixed scale per tensor SmolLM2's perplexity is 2.1x to 2.3x; with layers above 0.2 (8 of 211) left in floating
point 1.19x to 1.23x, above 0.1 (59, with those that share an input) 1.01x to 1.02x."""
TOKENS = 128
"""Tokens that are measured, of two windows: errors of layers differ by factors, those of one layer on other text by tenths."""
WINDOWS = 2
_ROLES = {"input_ids", "attention_mask", "position_ids", "token_type_ids", "past_key", "past_value"} | {
    *("pixel_values", "input_features"),
}

Key = tuple[str, int]
"""Tensor, and its contraction dimension."""


@dataclass(frozen=True)
class Choices:
    """Scheme by weight; None: it stays in floating point.

    Attributes:
        schemes: those that do not have the scheme asked for.
        float_outputs: nodes of layers whose output is not to be rounded, although that was asked for.
        diagnostics: one per such weight or output.
        notes: what was measured.
    """

    schemes: Mapping[Key, str | None] = field(default_factory=dict)
    float_outputs: Collection[str] = ()
    diagnostics: Sequence[Diagnostic] = ()
    notes: Sequence[str] = ()


def choose_schemes(
    program: Program,
    linears: Sequence[Linear],
    asked: tuple[str, Scheme],
    context: PassContext,
    ranges: Mapping[str, float] | None,
    outputs: Sequence[Linear] = (),
) -> Choices:
    """Run the program on a little text and measure each layer in turn, from unrounded inputs.

    A layer keeps the scheme asked for when its error (``layer_error``) is at most ``LARGEST_ERROR``; else it gets the first
    fallback of the target whose error is within the limit, and stays in floating point where there is none. The last scheme that
    is tried is held to ``DESTROYED``. Layers that read a value with one fixed scale stay together, because runtimes make one GEMM
    of them; so do all readers of one weight.

    The text is that of calibration, or the packaged sample; without any, seeded random token ids (or pixels, features), which
    are enough to tell the layers whose inputs have outliers. Memory: that of ``LayerwiseExecutor`` and one weight.

    Args:
        program: whose linear layers are ``linears``.
        linears: what is about to be quantized.
        asked: name and scheme.
        context: the target says what the fallbacks are.
        ranges: node -> magnitude that the largest code stands for, for static schemes.
        outputs: layers whose output is about to be rounded to int8 too; where that puts it too far off, it is not.
    """
    name, scheme = asked
    candidates = {name: scheme} | {other: SCHEMES[other] for other in context.target.fallbacks[name]}  # type: ignore[index]
    feeds, source = _feeds(program, context)
    if not feeds:
        return Choices(notes=(f"No layer was measured: {source}. All have {name}.",))
    errors, rounded = _measured(program, linears, candidates, feeds, context, ranges, outputs)
    schemes: dict[Key, str | None] = {}
    diagnostics = []
    for group in _together(linears, by_input=scheme.static):
        keys = list(dict.fromkeys((linear.tensor, linear.axis) for linear in group))
        worst = {
            each: max(errors[key][each] for key in keys if each in errors[key])
            for each in candidates
            if any(each in errors[key] for key in keys)
        }
        chosen, limit = _first_within(worst, list(candidates))
        if chosen == name:
            continue
        for key in keys:
            schemes[key] = chosen
            why = f"With {name} its output would be {worst[name]:.1%} off, and {limit:.0%} is the limit (measured on {source})."
            instead = f"It has {chosen} ({worst[chosen]:.1%} off)." if chosen else "It stays in floating point."
            diagnostics.append(Diagnostic(key[0], "CS2210", f"{why} {instead}", "quantize.fallback: none keeps it."))
    floats = [linear for linear in outputs if schemes.get((linear.tensor, linear.axis), name) == name]
    floats = [linear for linear in floats if not rounded[linear.node.name] <= DESTROYED]
    for linear in floats:
        error = rounded[linear.node.name]
        why = f"Rounded to int8, its output would be {error:.1%} off, and {DESTROYED:.0%} is the limit (measured on {source})."
        left = "Its output stays in floating point; a sparse kernel may not be chosen for it."
        diagnostics.append(Diagnostic(linear.tensor, "CS2210", f"{why} {left}", "quantize.fallback: none rounds it."))
    kept = len(errors) - len(schemes)
    note = f"Chosen by the error of each layer's output on {source}: {kept} weights have {name}"
    counts = [(each, sum(value == each for value in schemes.values())) for each in (*list(candidates)[1:], None)]
    note += "".join(f", {count} {each or 'floating point'}" for each, count in counts if count) + "."
    return Choices(schemes, {linear.node.name for linear in floats}, diagnostics, (note,))


def _first_within(errors: Mapping[str, float], order: Sequence[str]) -> tuple[str | None, float]:
    """The first scheme whose error is within its limit, and the limit of the first one."""
    limits = [LARGEST_ERROR] * (len(order) - 1) + [DESTROYED]
    found = (name for name, limit in zip(order, limits, strict=True) if errors.get(name, float("inf")) <= limit)
    return next(found, None), limits[0]


def _feeds(program: Program, context: PassContext) -> tuple[list[dict[str, torch.Tensor]], str]:
    """Model inputs of about ``TOKENS`` tokens, and what they are."""
    text = context.calibration or context.sample
    if text is not None:
        apart, length = max(1, len(text.windows) // WINDOWS), TOKENS // WINDOWS
        short = replace(text, windows=tuple(window[:length] for window in text.windows[::apart][:WINDOWS]))
        batches = short.feeds(program)
        source = "the packaged text" if context.calibration is None else "calibration data"
        return list(batches) if text.windows else [next(iter(batches))], source
    roles = {entry.role for entry in program.inputs}
    if not roles <= _ROLES:
        return [], "there is no calibration data and the model's inputs are of an unknown kind"
    length = TOKENS // WINDOWS
    if program.kind != "decoder":
        made = sample_inputs(program, context.seed, batch=WINDOWS, length=length)
        return [{name: torch.from_numpy(value) for name, value in made.items()}], "random inputs"
    draws = torch.Generator().manual_seed(context.seed)
    ids = torch.randint(0, int(program.config["vocab_size"]), (WINDOWS, length), generator=draws)
    return [decoder_inputs(program, ids)], "random token ids"


def _measured(
    program: Program,
    linears: Sequence[Linear],
    candidates: Mapping[str, Scheme],
    feeds: Iterable[dict[str, torch.Tensor]],
    context: PassContext,
    ranges: Mapping[str, float] | None,
    outputs: Sequence[Linear],
) -> tuple[dict[Key, dict[str, float]], dict[str, float]]:
    """Errors by weight and scheme, of the fallbacks only where the scheme asked for is over its limit; and by node those of
    ``outputs`` with their result rounded as well.
    """
    rounded: dict[str, float] = {}
    narrow = {linear.node.name for linear in outputs}
    readers: dict[str, list[Linear]] = {}
    for linear in linears:
        readers.setdefault(linear.input.name, []).append(linear)
    errors: dict[Key, dict[str, float]] = {}
    walk = LayerwiseExecutor(program, feeds)
    with context.progress.task("choose formats", total=len(readers)) as task:
        for node in program.graph.nodes:
            if node.name not in readers:
                continue
            seen: list[torch.Tensor] = []
            walk.advance(node, inclusive=True, watch={node.name: partial(_note, seen)})
            for linear in readers[node.name]:
                found = errors.setdefault((linear.tensor, linear.axis), {})
                _measure(program, linear, torch.cat(seen), candidates, context, ranges, found)
                if linear.node.name in narrow and ranges is not None:
                    rounded[linear.node.name] = _with_output(program, linear, torch.cat(seen), candidates, ranges)
            task.advance()
    return errors, rounded


def _with_output(
    program: Program, linear: Linear, x: torch.Tensor, candidates: Mapping[str, Scheme], ranges: Mapping[str, float]
) -> float:
    stored = None if linear.bias is None else program.tensor_of(linear.bias)
    return layer_error(
        x,
        _weight_rows(program, linear),
        next(iter(candidates.values())),
        peak=ranges[linear.input.name],
        bias=None if stored is None else program.weights.load(stored).to(torch.float32),
        output_peak=ranges[linear.node.name],
    )


def _weight_rows(program: Program, linear: Linear) -> torch.Tensor:
    """``[N, K]`` float32."""
    value = program.weights.load(linear.tensor).to(torch.float32)
    return value if linear.axis == 1 else value.t()


def _measure(
    program: Program,
    linear: Linear,
    x: torch.Tensor,
    candidates: Mapping[str, Scheme],
    context: PassContext,
    ranges: Mapping[str, float] | None,
    found: dict[str, float],
) -> None:
    rows = _weight_rows(program, linear)
    for name, scheme in candidates.items():
        error = layer_error(
            x,
            rows,
            scheme,
            peak=None if ranges is None else ranges[linear.input.name],
            rounds_groups=context.target.grouped_inputs == "int8",
            differences=is_lm_head(program, linear.node),
        )
        found[name] = max(error, found.get(name, 0.0))
        if error <= (LARGEST_ERROR if len(candidates) > 1 else DESTROYED):
            return


def _note(seen: list[torch.Tensor], place: int, value: torch.Tensor) -> None:
    seen.append(_rows(value))


def _rows(value: torch.Tensor) -> torch.Tensor:
    """At most ``TOKENS`` rows, evenly spread."""
    rows = value.reshape(-1, value.shape[-1]).float()
    return rows[:: max(1, len(rows) // TOKENS)][:TOKENS]


def _together(linears: Sequence[Linear], *, by_input: bool) -> list[list[Linear]]:
    """Layers that have one format: those of one weight and, if asked for, of one input; what overlaps is one group."""
    groups: list[tuple[set[object], list[Linear]]] = []
    for linear in linears:
        marks: set[object] = {(linear.tensor, linear.axis), *([linear.input] if by_input else [])}
        joined = [linear]
        for group in [group for group in groups if group[0] & marks]:
            groups.remove(group)
            marks, joined = marks | group[0], [*group[1], *joined]
        groups.append((marks, joined))
    return [group for _, group in groups]
