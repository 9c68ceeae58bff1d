"""The check after loading: what counts as rounding, what as a tie, and what as another model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compile_sparse.compiler.progress import SilentProgress
from compile_sparse.compiler.runtimes.messages import Ran, Run, TokenTrace, Trace, Traces
from compile_sparse.compiler.verify.fidelity import check_fidelity, has_dense_traces
from compile_sparse.compiler.verify.verdict import decide, wrong_model

COUNT = 200


class FakeWorker:
    """Answers ``trace`` with the program's traces, changed."""

    def __init__(self, noise: float = 0.0, flipped: int = 0, broken: bool = False) -> None:
        self.noise, self.flipped, self.broken = noise, flipped, broken

    def call(self, request: Trace, **_: Any) -> Traces:
        trace = traces()[0]
        logprob = np.asarray(trace["logprob"]) + self.noise
        top1 = [t + 1 if i < self.flipped else t for i, t in enumerate(trace["top1"])]
        return Traces([TokenTrace(top1, [float("nan")] * COUNT if self.broken else logprob.tolist())])


def traces() -> list[dict[str, list[float]]]:
    # The first ten positions are near ties, the rest is clear.
    margin = [0.005] * 10 + [2.0] * (COUNT - 10)
    return [{"top1": list(range(COUNT)), "logprob": [-1.0] * COUNT, "margin": margin}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    data = {"prefill": 4, "windows": [[1, 2]], "traces": traces(), "dense_traces": traces(), "activation_error": 0.03}
    (tmp_path / "reference.json").write_text(json.dumps(data))
    return tmp_path


def check(worker: FakeWorker, folder: Path, **options: Any) -> Any:
    return check_fidelity(worker, "m", folder, SilentProgress(), **options)  # type: ignore[arg-type]


def test_the_bound_is_twice_the_noise_and_two_independent_codings(folder: Path) -> None:
    found = check(FakeWorker(noise=0.05), folder, noise=0.02)
    assert found.logprob_bound == pytest.approx(2 * 0.02 + 2**0.5 * 0.03)
    assert found.mean_abs_logprob_diff == pytest.approx(0.05)
    assert wrong_model({"fidelity": found.model_dump()}, 0.99) == []
    worse = check(FakeWorker(noise=0.09), folder, noise=0.02)
    (gate,) = wrong_model({"fidelity": worse.model_dump()}, 0.99)
    assert not gate["passed"]
    assert gate["gate"].startswith("fidelity_logprob<=0.0824")


def test_exact_runtimes_are_not_held_to_nothing(folder: Path) -> None:
    assert check(FakeWorker(noise=5e-4), folder, noise=1e-7).logprob_bound == pytest.approx(1e-3 + 2**0.5 * 0.03)


def test_without_a_dense_reference_there_is_no_bound(folder: Path) -> None:
    assert has_dense_traces(folder)
    assert check(FakeWorker(noise=5.0), folder).logprob_bound is None


def test_ties_are_left_out_and_clear_positions_are_not(folder: Path) -> None:
    assert check(FakeWorker(flipped=10), folder, noise=0.0).top1_agreement == 1.0
    found = check(FakeWorker(flipped=30), folder, noise=0.0)
    assert found.ties == 10
    assert found.top1_agreement == pytest.approx(1 - 20 / 190)
    assert wrong_model({"fidelity": found.model_dump()}, 0.97)


def test_what_is_no_number_is_another_model(folder: Path) -> None:
    found = check(FakeWorker(broken=True), folder, noise=0.01)
    assert found.mean_abs_logprob_diff is None
    (gate,) = wrong_model({"fidelity": found.model_dump()}, 0.99)
    assert "no number" in gate["why"]
    report = {"performance": {"ratio": {}}, "fidelity": found.model_dump()}
    assert decide(report).verdict == "unverified"


def test_outputs_that_are_no_numbers_fail_the_check(tmp_path: Path) -> None:
    """A runtime that overflows must not end in an error of ours."""

    class Overflowing:
        def call(self, request: Run) -> Ran:
            np.savez(request.outputs, y=np.full((3, 5), np.nan, np.float32))
            return Ran(["y"])

    values = np.random.default_rng(0).standard_normal((3, 5)).astype(np.float32)
    np.savez(tmp_path / "reference.npz", **{"in.x": values, "out.y": values})
    found = check(Overflowing(), tmp_path)  # type: ignore[arg-type]
    assert (found.samples, found.top1_agreement, found.mean_cosine) == (3, 0.0, None)
    (gate,) = wrong_model({"fidelity": found.model_dump()}, 0.99)
    assert not gate["passed"]
