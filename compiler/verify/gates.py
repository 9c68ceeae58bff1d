"""Gates: conditions on a report, such as ``decode_tok_s>=1.2x`` or ``ppl[en]<=1.05x``.

Grammar: ``METRIC [ "[" SELECTOR "]" ] ( ">=" | "<=" ) NUMBER [ "x" ]``. The suffix ``x`` makes the gate a ratio to the dense
baseline. Ratios that were measured with noise carry a confidence interval, and the *unfavourable* end of it is compared:
the lower bound for ``>=``, the upper for ``<=``. A comparison of a model with itself therefore cannot pass
``decode_tok_s>=1.05x`` by luck. Quality ratios are compared by value: both models saw the same windows.

A metric that was not measured fails its gate, with the reason.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from compile_sparse.compiler.errors import UsageError

__all__ = ["METRICS", "SCORES", "Gate", "Metric", "evaluate_gates", "parse_gate"]

Kind = Literal["speed", "size", "quality", "agreement", "sparsity"]


@dataclass(frozen=True)
class Metric:
    """A number of the report that can be gated.

    Attributes:
        name: as written in a gate.
        kind: where the report keeps it, and how a ratio of it is judged.
        selectors: what may stand in brackets; ``None`` means no brackets, an empty tuple means any slice name.
        has_ratio, has_value: whether ``x`` may or must be written.
    """

    name: str
    kind: Kind
    selectors: tuple[str, ...] | None = None
    has_ratio: bool = True
    has_value: bool = True

    @property
    def by_slice(self) -> bool:
        """True when the selector names a quality slice."""
        return self.selectors == ()


_AGAINST_DENSE: Mapping[str, str] = {
    "kl": "kl",
    "top1": "top1_agreement",
    "cosine": "mean_cosine",
    "rank_agreement": "rank_agreement",
    "logit_error": "logit_error",
}
"""Metric -> field of a quality slice that compares the compiled model's answers with the dense model's."""
_LOSSES = ("worst_slice_loss", "loss")
SCORES = (
    *("accuracy", "accuracy@5", "f1", "auc", "rank_correlation"),
    *("recall@1", "recall@5", "recall@10", "mrr", "ndcg@10", "dense_index_recall@1"),
)
"""Scores of labelled data and of pairs, as slices have them under ``scores``; a ratio of one is compiled over dense."""
_PERCENTILES = ("p50", "p95", "p99")
METRICS: Mapping[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("decode_tok_s", "speed"),
        Metric("prefill_tok_s", "speed"),
        Metric("samples_s", "speed"),
        Metric("ttft_ms", "speed", selectors=_PERCENTILES),
        Metric("tpot_ms", "speed", selectors=_PERCENTILES),
        Metric("peak_rss_bytes", "speed"),
        Metric("artifact_bytes", "size"),
        Metric("parameters", "size"),
        Metric("ppl", "quality", selectors=()),
        Metric("worst_slice_ppl", "quality"),
        Metric("worst_slice_loss", "quality"),  # a factor anyway: 'x' may be written and changes nothing
        Metric("loss", "quality", selectors=()),
        *(Metric(name, "quality", selectors=(), has_ratio=False) for name in _AGAINST_DENSE),
        *(Metric(name, "quality", selectors=()) for name in SCORES),
        Metric("fidelity_top1", "agreement", has_ratio=False),
        Metric("sparse_layers", "sparsity", has_ratio=False),
    )
}
_NO_RATIO: Mapping[str, str] = {
    "quality": "already compares with a reference",
    "agreement": "already compares with a reference",
    "sparsity": "counts layers, and a dense baseline has none",
}
_EXPRESSION = re.compile(
    r"\s*(?P<metric>[\w@]+)\s*(?:\[\s*(?P<selector>[^\[\]]+?)\s*\])?\s*(?P<sign>>=|<=)\s*"
    r"(?P<number>\d+(?:\.\d*)?(?:[eE][-+]?\d+)?|\.\d+)\s*(?P<ratio>x?)\s*\Z",
    re.ASCII,
)


@dataclass(frozen=True)
class Gate:
    """A parsed condition. ``threshold`` is a ratio to the baseline when ``ratio`` is true, else in the metric's unit."""

    text: str
    metric: Metric
    selector: str | None
    sign: Literal[">=", "<="]
    threshold: float
    ratio: bool


def parse_gate(text: str) -> Gate:
    """Parse one gate.

    Raises:
        UsageError: CS1011, saying which part is wrong.
    """
    match = _EXPRESSION.match(text)
    if match is None:
        raise _wrong(text, "It does not have the form METRIC>=NUMBER or METRIC<=NUMBER, with 'x' for a ratio.")
    metric = METRICS.get(match["metric"])
    if metric is None:
        near = difflib.get_close_matches(match["metric"], METRICS, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else ""
        raise _wrong(text, f"There is no metric {match['metric']!r}. Metrics: {', '.join(METRICS)}.", hint)
    selector, ratio, threshold = match["selector"], bool(match["ratio"]), float(match["number"])
    if metric.selectors is None and selector is not None:
        raise _wrong(text, f"{metric.name} takes nothing in brackets.")
    if metric.selectors is not None and selector is None:
        raise _wrong(text, f"{metric.name} needs brackets: {metric.name}[{(metric.selectors or ('SLICE',))[0]}].")
    if metric.selectors and selector not in metric.selectors:
        raise _wrong(text, f"{metric.name} is reported at {', '.join(metric.selectors)}.")
    if ratio and not metric.has_ratio:
        raise _wrong(text, f"{metric.name} {_NO_RATIO[metric.kind]}; write the number without 'x'.")
    if not math.isfinite(threshold):
        raise _wrong(text, "The number is not finite.")
    sign: Literal[">=", "<="] = ">=" if match["sign"] == ">=" else "<="
    return Gate(text.strip(), metric, selector, sign, threshold, ratio)


def _wrong(text: str, why: str, hint: str = "") -> UsageError:
    return UsageError("CS1011", f"{text!r} is not a gate.", where="--gate", why=why, hint=hint)


def evaluate_gates(gates: Iterable[str], report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Judge every gate on a report (the plain data of ``report.json``).

    Returns:
        One ``{"gate", "value", "bound", "passed", "why"}`` per gate, in order: ``value`` is the estimate, ``bound`` the
        number that was compared (the unfavourable end of the interval where there is one); both None when not measured.
    """
    return [_evaluate(parse_gate(gate), report) for gate in gates]


def _evaluate(gate: Gate, report: Mapping[str, Any]) -> dict[str, Any]:
    value, interval = _measured(gate, report)
    if value is None or not math.isfinite(value):
        reason = _reason(gate, report)
        return {
            "gate": gate.text,
            "value": None,
            "bound": None,
            "passed": False,
            "why": f"Not measured: {reason}".rstrip(".") + ".",
        }
    bound = value
    if interval is not None and gate.ratio and gate.metric.kind == "speed":
        bound = interval[0] if gate.sign == ">=" else interval[1]
    passed = bound >= gate.threshold if gate.sign == ">=" else bound <= gate.threshold
    unit = "x" if gate.ratio else ""
    measured = f"{value:.4g}{unit}"
    if interval is not None and gate.ratio:
        measured += f" (95 % interval {interval[0]:.4g}{unit} to {interval[1]:.4g}{unit})"
    relation = "" if passed else ", which does not satisfy the gate"
    if not passed and bound != value:
        relation = f"; its unfavourable end, {bound:.4g}{unit}, does not satisfy the gate"
    return {
        "gate": gate.text,
        "value": value,
        "bound": bound,
        "passed": passed,
        "why": f"Measured {measured}{relation}.",
    }


def _reason(gate: Gate, report: Mapping[str, Any]) -> str:
    """Why the metric was not measured, as far as the report says."""
    own = _at(report, "sparsity", "unverified") if gate.metric.kind == "sparsity" else None
    return str(own or report.get("verdict_why") or "the run did not produce it")


Measured = tuple[float | None, tuple[float, float] | None]


def _measured(gate: Gate, report: Mapping[str, Any]) -> Measured:
    finders = {"speed": _speed, "size": _size, "quality": _quality, "agreement": _agreement, "sparsity": _sparsity}
    return finders[gate.metric.kind](gate, report)


def _at(data: Any, *path: str | None) -> Any:
    """Nested lookup; a None step is skipped, anything absent gives None."""
    for step in path:
        if step is None:
            continue
        if not isinstance(data, Mapping):
            return None
        data = data.get(step)
    return data


def _number(value: Any) -> float | None:
    """A finite number, or None: a measurement that is not a number was not a measurement."""
    usable = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if usable else None


def _divided(compiled: Any, baseline: Any) -> float | None:
    top, bottom = _number(compiled), _number(baseline)
    return top / bottom if top is not None and bottom else None


def _estimate(found: Any) -> Measured:
    """Value and interval of a ``{"value", "ci95"}``."""
    interval = _at(found, "ci95")
    bounds = (float(interval[0]), float(interval[1])) if isinstance(interval, (list, tuple)) else None
    return _number(_at(found, "value")), bounds


def _speed(gate: Gate, report: Mapping[str, Any]) -> Measured:
    performance, name = report.get("performance"), gate.metric.name
    compiled = _at(performance, "compiled", name, gate.selector)
    if not gate.ratio:
        return _number(compiled), None
    value, interval = _estimate(_at(performance, "ratio", name, gate.selector))
    if value is None:
        return _divided(compiled, _at(performance, "baseline", name, gate.selector)), None
    return value, interval


def _size(gate: Gate, report: Mapping[str, Any]) -> Measured:
    sizes = _at(report, "model", gate.metric.name)
    compiled = _at(sizes, "compiled")
    return (_divided(compiled, _at(sizes, "baseline")) if gate.ratio else _number(compiled)), None


def _quality(gate: Gate, report: Mapping[str, Any]) -> Measured:
    slices = _at(report, "quality", "slices") or {}
    name = gate.metric.name
    if name in SCORES:
        score = _at(slices, gate.selector, "scores", name)
        compiled = _at(score, "compiled")
        return (_divided(compiled, _at(score, "baseline")) if gate.ratio else _number(compiled)), None
    key = _AGAINST_DENSE.get(name, "ratio" if gate.ratio else "ppl_compiled")
    if name in _LOSSES:
        key = "loss"
    if gate.metric.by_slice:
        found = _at(slices, gate.selector)
        return _number(_at(found, key)), _estimate({"value": 0, "ci95": _at(found, "ci95")})[1]
    values = [_number(_at(found, key)) for found in slices.values()]
    if not values or any(value is None for value in values):
        return None, None
    return max(value for value in values if value is not None), None


def _agreement(gate: Gate, report: Mapping[str, Any]) -> Measured:
    return _number(_at(report, "fidelity", "top1_agreement")), None


def _sparsity(gate: Gate, report: Mapping[str, Any]) -> Measured:
    """Products with a sparse kernel in the profile that has the fewest: by the builder's log and by the names of the kernels, the
    smaller number where both are known.
    """
    profiles = _at(report, "sparsity", "profiles")
    if not isinstance(profiles, Mapping) or not profiles:
        return None, None
    counts = []
    for found in profiles.values():
        known = [n for n in (_number(_at(found, "chosen")), _number(_at(found, "kernels"))) if n is not None]
        if not known:
            return None, None
        counts.append(min(known))
    return min(counts), None
