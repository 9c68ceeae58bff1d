"""One word for a report, and the sentence behind it.

An artifact is called ``faster`` only when it was measured faster: the 95 % interval of the workload's speed ratio lies above
1 *and* the estimate reaches 1.03. The second condition is there because a very steady machine makes differences
significant that nobody would call a gain.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from compile_sparse.compiler.verify.same_model import departures, not_compared

__all__ = ["GAIN", "Decision", "Verdict", "decide", "workload_speedup", "wrong_model"]

Verdict = Literal["faster", "smaller-only", "slower", "no-gain", "quality-lost", "refused", "unverified"]
GAIN = 1.03
"""Smallest speed ratio called faster; a ratio of at most 0.97 is called slower."""
LOSS = 0.97
SMALLER = 0.99
"""Artifact bytes, compiled over baseline, below which it is called smaller."""


class Decision(NamedTuple):
    """The verdict and why, for ``verdict`` and ``verdict_why`` of the report."""

    verdict: Verdict
    why: str


def decide(report: Mapping[str, Any], *, quantized: bool = False) -> Decision:
    """Judge a report (plain data of ``report.json``; its own ``verdict`` is ignored).

    Args:
        report: measurements; ``performance`` and ``fidelity`` may be absent or None.
        quantized: whether a pass changed numerics.
    """
    performance = report.get("performance")
    if not performance:
        return Decision("unverified", "Nothing was measured in the runtime.")
    fidelity = report.get("fidelity") or {}
    if unknown := not_compared(fidelity):
        return Decision("unverified", unknown)
    if departed := departures(fidelity, quantized=quantized):
        return Decision("unverified", f"{departed[0].why} The speed is that of a different model.")
    speed = workload_speedup(performance)
    if speed is None:
        return Decision("unverified", "The speed of baseline and artifact could not be compared.")
    value, low, high = speed
    said = f"{value:.2f}x on the workload (95 % interval {low:.2f}x to {high:.2f}x)"
    if low > 1.0 and value >= GAIN:
        return Decision("faster", f"Measured {said}.")
    if high < 1.0 and value <= LOSS:
        return Decision("slower", f"Measured {said}.")
    sizes = (report.get("model") or {}).get("artifact_bytes") or {}
    ratio = sizes["compiled"] / sizes["baseline"] if sizes.get("baseline") else 1.0
    if ratio < SMALLER:
        return Decision("smaller-only", f"Speed did not change measurably: {said}; bytes {ratio:.2f}x.")
    return Decision("no-gain", f"Neither speed nor size changed measurably: {said}; bytes {ratio:.2f}x.")


def wrong_model(report: Mapping[str, Any], *, quantized: bool) -> list[dict[str, Any]]:
    """A failed gate for each way in which the runtime demonstrably computes something else than the program.

    It needs no asking for: an artifact that loads and answers wrongly must not pass a pipeline.
    """
    return [
        {
            "gate": f"{found.metric}{found.sign}{found.bound:.4g} (always checked)",
            "value": found.value,
            "bound": found.value,
            "passed": False,
            "why": f"The runtime loads the artifact and computes something else than the program. {found.why}",
        }
        for found in departures(report.get("fidelity") or {}, quantized=quantized)
    ]


def workload_speedup(performance: Mapping[str, Any]) -> tuple[float, float, float] | None:
    """Speed ratio of the declared workload: ``(value, low, high)``, or None when it was not measured.

    Encoders and vision models: the ratio of ``samples_s``. Decoders: total time is prefill plus decode,
    ``prompt / prefill_tok_s + output / decode_tok_s``; ``ratio.workload`` (from per-round totals) is used when the report has
    it. Otherwise each bound combines the same bound of both phases: a box around both intervals, so wider than needed,
    never narrower.
    """
    ratio = performance.get("ratio") or {}
    for whole in ("workload", "samples_s"):
        if found := _triple(ratio.get(whole)):
            return found
    prefill, decode = _triple(ratio.get("prefill_tok_s")), _triple(ratio.get("decode_tok_s"))
    baseline, workload = performance.get("baseline") or {}, performance.get("workload") or {}
    if not (prefill and decode and baseline.get("prefill_tok_s") and baseline.get("decode_tok_s")):
        return None
    prefill_time = workload.get("prompt_tokens", 0) / baseline["prefill_tok_s"]
    decode_time = workload.get("output_tokens", 0) / baseline["decode_tok_s"]
    if prefill_time + decode_time <= 0:
        return None

    def combined(index: int) -> float:
        compiled_time = prefill_time / prefill[index] + decode_time / decode[index]
        return (prefill_time + decode_time) / compiled_time

    return combined(0), combined(1), combined(2)


def _triple(found: Any) -> tuple[float, float, float] | None:
    if not isinstance(found, Mapping) or found.get("value") is None or not found.get("ci95"):
        return None
    low, high = found["ci95"]
    return (float(found["value"]), float(low), float(high)) if low > 0 else None
