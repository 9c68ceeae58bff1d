"""Verdicts of synthetic reports; a model compared with itself is not a gain."""

from __future__ import annotations

import numpy as np
import pytest

from compile_sparse.compiler.verify.gates import evaluate_gates
from compile_sparse.compiler.verify.statistics import ratio_of_rounds
from compile_sparse.compiler.verify.verdict import decide, workload_speedup, wrong_model


def _report(decode=(1.0, 0.95, 1.05), prefill=None, bytes_ratio=1.0, agreement=0.999):
    prefill = prefill or decode
    return {
        "model": {"artifact_bytes": {"baseline": 1000, "compiled": int(1000 * bytes_ratio)}},
        "fidelity": {"top1_agreement": agreement},
        "performance": {
            "workload": {"batch": 1, "prompt_tokens": 128, "output_tokens": 64, "rounds": 5},
            "baseline": {"prefill_tok_s": 1280.0, "decode_tok_s": 64.0},  # 0.1 s and 1 s
            "compiled": {},
            "ratio": {
                name: {"value": triple[0], "ci95": list(triple[1:])}
                for name, triple in (("prefill_tok_s", prefill), ("decode_tok_s", decode))
            },
        },
    }


@pytest.mark.parametrize(
    ("report", "verdict"),
    [
        (_report((1.3, 1.2, 1.4)), "faster"),
        (_report((1.3, 0.9, 1.6)), "no-gain"),  # large but not certain
        (_report((1.02, 1.01, 1.03)), "no-gain"),  # certain but tiny
        (_report((1.02, 1.01, 1.03), bytes_ratio=0.5), "smaller-only"),
        (_report((0.8, 0.7, 0.9), bytes_ratio=0.5), "slower"),
        (_report((0.98, 0.97, 0.99)), "no-gain"),
        (_report((1.0, 0.9, 1.1), bytes_ratio=1.2), "no-gain"),
        (_report((1.3, 1.2, 1.4), agreement=0.5), "unverified"),
        (_report((1.3, 1.2, 1.4), agreement=None), "unverified"),
        (_report((1.3, 1.2, 1.4), agreement=float("nan")), "unverified"),
        ({"performance": None}, "unverified"),
        ({}, "unverified"),
        # prefill is a tenth of the time: doubling it alone is worth 5 %, halving decode loses more than it gives
        (_report((1.0, 0.999, 1.001), prefill=(2.0, 1.9, 2.1)), "faster"),
        (_report((0.5, 0.49, 0.51), prefill=(2.0, 1.9, 2.1)), "slower"),
    ],
)
def test_verdicts(report, verdict):
    found = decide(report)
    assert found.verdict == verdict
    assert found.why.endswith(".")


def test_the_measured_bound_decides_and_without_one_what_passes_did():
    report = _report((1.3, 1.2, 1.4), agreement=0.98)
    assert decide(report, quantized=True).verdict == "faster"
    assert "98.0%" in decide(report).why
    report["fidelity"]["top1_bound"] = 0.975
    assert decide(report).verdict == "faster"


def test_a_wrong_layer_is_another_model_whatever_the_answers_say():
    report = _report((1.3, 1.2, 1.4))
    report["fidelity"]["layers"] = {"checked": 9, "wrong": [{"layer": "h.3.up", "error": 0.02, "bound": 0.001}]}
    found = decide(report)
    assert found.verdict == "unverified"
    assert "1 of 9 layers" in found.why
    assert "h.3.up (0.02, allowed 0.001)" in found.why
    (gate,) = wrong_model(report, quantized=False)
    assert gate["gate"].startswith("wrong_layers<=0")


def test_workload_weights_the_phases():
    performance = _report((2.0, 2.0, 2.0), prefill=(1.0, 1.0, 1.0))["performance"]
    assert workload_speedup(performance)[0] == pytest.approx(1.1 / (0.1 + 0.5))


def test_measured_workload_ratio_is_preferred_and_encoders_have_one_number():
    performance = _report()["performance"]
    performance["ratio"]["workload"] = {"value": 1.5, "ci95": [1.4, 1.6]}
    assert workload_speedup(performance) == (1.5, 1.4, 1.6)
    assert workload_speedup({"ratio": {"samples_s": {"value": 2, "ci95": [1.9, 2.1]}}}) == (2.0, 1.9, 2.1)
    assert workload_speedup({"ratio": {}}) is None


@pytest.mark.parametrize("noise", [0.01, 0.05, 0.15])
@pytest.mark.parametrize("rounds", [3, 5, 9])
def test_comparing_a_model_with_itself_is_not_a_gain(noise, rounds):
    """False alarms in 1,000 A/A experiments per setting, both phases noisy and independent, stay below 5 % for the verdict
    and for a 1.05x gate. (One side of a 95 % interval is 2.5 %; the standard error of that is 0.5 %.)"""
    rng = np.random.default_rng(int(noise * 100) * 100 + rounds)
    faster = slower = passed = 0
    for _ in range(1_000):
        draws = np.exp(rng.normal(0, noise, size=(4, rounds)))
        prefill, decode = ratio_of_rounds(draws[0], draws[1]), ratio_of_rounds(draws[2], draws[3])
        report = _report((decode.value, decode.low, decode.high), (prefill.value, prefill.low, prefill.high))
        verdict = decide(report).verdict
        faster += verdict == "faster"
        slower += verdict == "slower"
        passed += evaluate_gates(["decode_tok_s>=1.05x"], report)[0]["passed"]
    assert faster < 50
    assert slower < 50
    assert passed < 50


def test_a_real_gain_is_found():
    """Power: 20 % more speed under 5 % noise is called faster in at least 95 % of experiments with 5 rounds."""
    rng = np.random.default_rng(0)
    found = 0
    for _ in range(200):
        draws = np.exp(rng.normal(0, 0.05, size=(4, 5)))
        decode, prefill = ratio_of_rounds(draws[0], 1.2 * draws[1]), ratio_of_rounds(draws[2], 1.2 * draws[3])
        report = _report((decode.value, decode.low, decode.high), (prefill.value, prefill.low, prefill.high))
        found += decide(report).verdict == "faster"
    assert found >= 190
