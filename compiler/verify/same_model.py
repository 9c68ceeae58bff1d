"""From measured fidelity to a decision: is what the runtime computes the program?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

__all__ = ["Departure", "departures", "not_compared"]

TOP1_WITHOUT_NOISE, TOP1_WITHOUT_NOISE_QUANTIZED = 0.99, 0.97
"""Top-1 agreement that is asked for where nobody measured what rounding does to it, in a report of an earlier version:
kernels that round activations to 8 bits in their own order may flip near-ties."""
CONCLUSIVE = {"logprob_bound": 0.5, "error_bound": 0.5}
LEAST_CONCLUSIVE_TOP1 = 0.7
"""Bounds of answers beyond which these decide nothing by themselves."""
MOST_NAMED = 3


class Departure(NamedTuple):
    """One way in which the runtime is farther from the program than rounding explains.

    Attributes:
        metric: name in a gate.
        sign: of the condition that failed.
        value: measured; None when it was no number.
        bound: what was allowed.
        why: a sentence.
    """

    metric: str
    sign: str
    value: float | None
    bound: float
    why: str


def departures(fidelity: Mapping[str, Any], *, quantized: bool) -> list[Departure]:
    """Everything that shows another model than the program; empty for a right one, and where nothing was compared.

    Args:
        fidelity: of the report, as plain data.
        quantized: whether a pass changed numerics, for reports without a measured bound.
    """
    return [*_layers(fidelity), *_logprob(fidelity), *_top1(fidelity, quantized), *_outputs(fidelity)]


def not_compared(fidelity: Mapping[str, Any]) -> str:
    """Why nothing is known of what the runtime computes, a sentence; empty when something is."""
    if all(fidelity.get(key) is None for key in ("top1_agreement", "error_bound", "logprob_bound")):
        return "The runtime's output was not compared with the program's."
    if (fidelity.get("layers") or {}).get("checked"):
        return ""
    wide = [name for name, largest in CONCLUSIVE.items() if (fidelity.get(name) or 0.0) > largest]
    if wide or (fidelity.get("top1_bound") or 1.0) < LEAST_CONCLUSIVE_TOP1:
        return "Rounding alone may change the model's answers so much that they show nothing, and no layer could be compared."
    return ""


def _layers(fidelity: Mapping[str, Any]) -> Iterator[Departure]:
    layers = fidelity.get("layers") or {}
    wrong = layers.get("wrong") or ()
    if not wrong:
        return
    named = ", ".join(
        f"{each['layer']} ({_number(each['error'])}, allowed {each['bound']:.2g})" for each in wrong[:MOST_NAMED]
    )
    more = f" and {len(wrong) - MOST_NAMED} more" if len(wrong) > MOST_NAMED else ""
    yield Departure(
        "wrong_layers",
        "<=",
        float(len(wrong)),
        0.0,
        f"{len(wrong)} of {layers['checked']} layers differ from the program, given the runtime's own inputs: {named}{more}.",
    )


def _logprob(fidelity: Mapping[str, Any]) -> Iterator[Departure]:
    difference, allowed = fidelity.get("mean_abs_logprob_diff"), fidelity.get("logprob_bound")
    if allowed is not None and not (difference is not None and difference <= allowed):
        why = f"The mean log-probability differs by {_number(difference)} nats, and rounding explains {allowed:.3g}."
        yield Departure("fidelity_logprob", "<=", difference, allowed, why)


def _top1(fidelity: Mapping[str, Any], quantized: bool) -> Iterator[Departure]:
    agreement, bound = fidelity.get("top1_agreement"), fidelity.get("top1_bound")
    if bound is None:
        if fidelity.get("error_bound") is not None:
            return
        bound = TOP1_WITHOUT_NOISE_QUANTIZED if quantized else TOP1_WITHOUT_NOISE
    if agreement is not None and not agreement >= bound:
        why = f"The runtime agrees with the program on {agreement:.1%} of top-1 answers, below {bound:.1%}."
        yield Departure("fidelity_top1", ">=", agreement, bound, why)


def _outputs(fidelity: Mapping[str, Any]) -> Iterator[Departure]:
    error, allowed = fidelity.get("relative_error"), fidelity.get("error_bound")
    if allowed is not None and not (error is not None and error <= allowed):
        why = f"The outputs differ by {_number(error)} of their length, more than the {allowed:.2g} that rounding explains."
        yield Departure("fidelity_error", "<=", error, allowed, why)


def _number(value: float | None) -> str:
    return "no number" if value is None else f"{value:.3g}"
