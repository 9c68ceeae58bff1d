"""The check after loading: what counts as rounding, what as a tie, and what as another model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compile_sparse.compiler.progress import SilentProgress
from compile_sparse.compiler.runtimes.messages import Ran, Run, TokenTrace, Trace, Traces
from compile_sparse.compiler.verify.fidelity import check_fidelity
from compile_sparse.compiler.verify.verdict import decide, wrong_model

COUNT = 200
NOISE = 0.02


class FakeWorker:
    """Answers ``trace`` with the program's traces, changed."""

    def __init__(self, noise: float = 0.0, flipped: int = 0, broken: bool = False) -> None:
        self.noise, self.flipped, self.broken = noise, flipped, broken

    def call(self, request: Trace, **_: Any) -> Traces:
        trace = traces(self.noise, self.flipped)[0]
        return Traces([TokenTrace(trace["top1"], [float("nan")] * COUNT if self.broken else trace["logprob"])])


def traces(noise: float = 0.0, flipped: int = 0) -> list[dict[str, Any]]:
    # The first ten positions are near ties, the rest is clear.
    margin = [0.005] * 10 + [2.0] * (COUNT - 10)
    return [{"top1": [i + (i < flipped) for i in range(COUNT)], "logprob": [-1.0 + noise] * COUNT, "margin": margin}]


def reference(folder: Path, noise: float = NOISE, flipped: int = 0) -> Path:
    data = {"prefill": 4, "windows": [[1, 2]], "traces": traces(), "disturbed": traces(noise, flipped)}
    (folder / "reference.json").write_text(json.dumps(data))
    return folder


def check(worker: Any, folder: Path) -> Any:
    return check_fidelity(worker, "m", folder, SilentProgress())


def gates(found: Any) -> list[str]:
    return [each["gate"].split("=")[0] for each in wrong_model({"fidelity": found.model_dump()}, quantized=False)]


def test_a_runtime_may_differ_by_a_few_times_what_rounding_does_to_the_program(tmp_path: Path) -> None:
    found = check(FakeWorker(noise=0.05), reference(tmp_path))
    assert found.logprob_bound == pytest.approx(3 * NOISE + 1e-3)
    assert found.mean_abs_logprob_diff == pytest.approx(0.05)
    assert gates(found) == []
    assert gates(check(FakeWorker(noise=0.07), tmp_path)) == ["fidelity_logprob<"]


def test_exact_arithmetic_is_not_held_to_nothing(tmp_path: Path) -> None:
    reference(tmp_path, noise=0.0)
    assert gates(check(FakeWorker(noise=5e-4), tmp_path)) == []
    assert gates(check(FakeWorker(noise=2e-3), tmp_path)) == ["fidelity_logprob<"]


def test_ties_are_left_out_and_clear_positions_are_not(tmp_path: Path) -> None:
    reference(tmp_path, noise=0.0)
    assert check(FakeWorker(flipped=10), tmp_path).top1_agreement == 1.0
    found = check(FakeWorker(flipped=30), tmp_path)
    assert found.ties == 10
    assert found.top1_agreement == pytest.approx(1 - 20 / 190)
    assert gates(found) == ["fidelity_top1>"]


def test_answers_that_rounding_alone_flips_are_not_held_against_the_runtime(tmp_path: Path) -> None:
    reference(tmp_path, noise=0.0, flipped=20)
    found = check(FakeWorker(flipped=30), tmp_path)
    assert found.top1_bound == pytest.approx(0.99 - 3 * 10 / 190)
    assert gates(found) == []
    assert gates(check(FakeWorker(flipped=50), tmp_path)) == ["fidelity_top1>"]


def test_what_is_no_number_is_another_model(tmp_path: Path) -> None:
    found = check(FakeWorker(broken=True), reference(tmp_path))
    assert found.mean_abs_logprob_diff is None
    assert gates(found) == ["fidelity_logprob<", "fidelity_top1>"]
    assert "no number" in wrong_model({"fidelity": found.model_dump()}, quantized=False)[0]["why"]
    report = {"performance": {"ratio": {}}, "fidelity": found.model_dump()}
    assert decide(report).verdict == "unverified"


class Samples:
    """Answers ``run`` with one array."""

    def __init__(self, values: np.ndarray[Any, Any]) -> None:
        self.values = values

    def call(self, request: Run) -> Ran:
        np.savez(request.outputs, y=self.values)
        return Ran(["y"])


def sampled(folder: Path, noise: float) -> np.ndarray[Any, Any]:
    values = np.random.default_rng(0).standard_normal((3, 5)).astype(np.float32)
    np.savez(folder / "reference.npz", **{"in.x": values, "out.y": values, "disturbed.y": values * (1 + noise)})
    return values


def test_outputs_are_compared_by_length_not_by_their_largest_feature(tmp_path: Path) -> None:
    values = sampled(tmp_path, noise=0.01)
    found = check(Samples(values * 1.02), tmp_path)
    assert found.top1_agreement is None
    assert (found.relative_error, found.error_bound) == (pytest.approx(0.02, rel=1e-3), pytest.approx(0.0302, rel=1e-3))
    assert gates(found) == []
    assert gates(check(Samples(values * 1.04), tmp_path)) == ["fidelity_error<"]


def test_outputs_that_are_no_numbers_fail_the_check(tmp_path: Path) -> None:
    """A runtime that overflows must not end in an error of ours."""
    values = sampled(tmp_path, noise=0.01)
    found = check(Samples(np.full_like(values, np.nan)), tmp_path)
    assert (found.samples, found.relative_error, found.mean_cosine) == (3, None, None)
    assert gates(found) == ["fidelity_error<"]
