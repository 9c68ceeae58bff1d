"""Options shared by ``compile`` and ``explain``, and how their text becomes values.

Only the form ``KEY=VALUE`` is checked here; what a value may be is the recipe's business, so that flags, YAML and Python
obey one set of rules.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

__all__ = ["debug_option", "json_option", "measurement_options", "recipe_options"]

_Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def _named_fractions(
    ctx: click.Context, parameter: click.Parameter, values: tuple[str, ...]
) -> dict[str, float] | None:
    named: dict[str, float] = {}
    for key, text in _pairs(values, "KIND=FRACTION", repeated=True):
        try:
            number = float(text)
        except ValueError:
            raise click.BadParameter(f"{text!r} is not a number.", ctx, parameter) from None
        if not 0.0 < number < 1.0:
            raise click.BadParameter(
                f"{key}={text}: the fraction removed must lie strictly between 0 and 1; 0.25 removes a quarter.",
                ctx,
                parameter,
            )
        if key in named:
            from compile_sparse.compiler.recipes.conflicts import refuse_repetition

            first = f"--prune {key}={named[key]:g}"
            refuse_repetition(first, f"--prune {key}={text}", named[key], number, where="--prune")
        named[key] = number
    return named or None


def _named_files(ctx: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, str] | None:
    return dict(_pairs(values, "SLICE=FILE")) or None


def _pairs(values: tuple[str, ...], form: str, *, repeated: bool = False) -> list[tuple[str, str]]:
    pairs: list[tuple[str, str]] = []
    for value in values:
        key, separator, text = value.partition("=")
        if not (separator and key and text):
            raise click.BadParameter(f"{value!r} does not have the form {form}.")
        if not repeated and key in dict(pairs):
            raise click.BadParameter(f"{key!r} is given twice.")
        pairs.append((key, text))
    return pairs


json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
debug_option = click.option("--debug", is_flag=True, expose_value=False, help="Show tracebacks.")

_MEASUREMENT = (
    click.option(
        "--eval", "eval_", metavar="SLICE=FILE", multiple=True, callback=_named_files,
        help="A named quality slice: JSONL text, pairs or labels, or .npz arrays; repeatable.",
    ),
    click.option(
        "--max-quality-loss", metavar="FACTOR",
        help="How many times worse than dense the worst slice may be, e.g. 1.10x (the default), or none for any; "
        "beyond it the exit code is 3.",
    ),
    click.option("--workload", metavar="KEY=N,...", help="What is measured, e.g. prompt=128,output=64,batch=1."),
    click.option(
        "--concurrency", metavar="N,...", help="Requests at once, e.g. 1,8: each is measured; the verdict follows the first."
    ),
    click.option(
        "--gate", "gates", metavar="EXPR", multiple=True,
        help="Condition for exit code 0, e.g. 'decode_tok_s>=1.2x' or 'ppl[en]<=1.05x'; repeatable.",
    ),
)  # fmt: skip

_RECIPE = (
    click.argument("model"),
    click.option("--target", required=True, help="Runtime and hardware; see 'compile-sparse targets'."),
    click.option("--recipe", metavar="FILE|NAME", help="YAML recipe or a built-in one; other options override it."),
    click.option(
        "--prune", metavar="KIND=FRACTION", multiple=True, callback=_named_fractions,
        help="Remove this share of channels, heads, width, layers, experts or conv; repeatable.",
    ),
    click.option("--criterion", metavar="NAME", help="How importance is scored: magnitude, activation, wanda, taylor, ..."),
    click.option(
        "--allocation", metavar="uniform|global",
        help="Remove the same share everywhere, or where one ranking over all layers says.",
    ),
    click.option("--sparsity", metavar="PATTERN", help="Zeros: 2:4, N:M, 0.5 or block=16x16:0.5."),
    click.option("--low-rank", metavar="FRACTION", type=float, help="Remove this share by factorisation."),
    click.option("--quantize", metavar="SCHEME", help="w8a8, w8a16, w4a16, w4a16-g32, fp8, ..."),
    click.option("--quantizer", metavar="NAME", help="How codes are chosen: rtn, or a quantizer of another package."),
    click.option("--kv-cache", metavar="FORMAT", help="Quantize the key-value cache: fp8."),
    click.option("--calibration", metavar="FILE", help="JSONL the model is observed on."),
    click.option("--calibration-samples", metavar="N", type=int, help="Windows of calibration text."),
    click.option("--sequence-length", metavar="N", type=int, help="Tokens per calibration and evaluation window."),
    click.option(
        "--bos", metavar="tokenizer|always|never",
        help="Whether windows cut from text begin with the beginning-of-sequence token.  [default: as the tokenizer does]",
    ),
    *_MEASUREMENT,
    click.option(
        "--require-sparse", metavar="N", type=int,
        help="Fail unless at least N layers run sparse kernels; the gate 'sparse_layers>=N'.",
    ),
    click.option("--tensor-parallel", metavar="N", type=int, help="GPUs the model will be split over; sizes stay divisible."),
    click.option("--precision", metavar="NAME", help="Of what is not quantized, where the target has a choice: fp16, bf16."),
    click.option("--image-size", metavar="N|HxW", help="Models of images: the size the artifact takes, e.g. 224 or 224x320."),
    click.option("--emit", metavar="NAME", multiple=True, help="Also write: triton (a model repository); repeatable."),
    click.option("--seed", metavar="N", type=int, help="For anything random.  [default: 0]"),
    click.option("--allow-useless", is_flag=True, help="Accept what the target cannot exploit."),
)  # fmt: skip


def _applied(options: tuple[_Decorator, ...]) -> _Decorator:
    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


recipe_options = _applied(_RECIPE)
"""MODEL, --target and everything that shapes a recipe."""
measurement_options = _applied(_MEASUREMENT)
"""--eval, --max-quality-loss, --workload, --gate."""
