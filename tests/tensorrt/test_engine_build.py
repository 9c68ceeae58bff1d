"""What is built where. TensorRT proper needs the target's GPU: here the builder is replaced by one that answers as it would, so
that everything around it runs; what a real one says is unverified.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compile_sparse.backends.tensorrt.backend import TensorRtBackend
from compile_sparse.backends.tensorrt.description import read_description
from compile_sparse.backends.tensorrt.engine import engine_build
from compile_sparse.backends.tensorrt.engine.builder import BuildRequest, Built
from compile_sparse.backends.tensorrt.layout import TWIN
from compile_sparse.compiler.artifact.report import Change, Fidelity, Interval, ModelSection, Report
from compile_sparse.compiler.extension.backend_contract import Lowered, Probe
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.pipeline.compilation import judge
from compile_sparse.compiler.progress import SilentProgress
from compile_sparse.compiler.runtimes.messages import Benchmark, BenchmarkSamples, Round, Rounds, SampleTimes
from compile_sparse.compiler.targets.target import find_target
from compile_sparse.compiler.targets.workload import Workload
from compile_sparse.compiler.verify.measure import Measured, model_bytes
from compile_sparse.compiler.verify.performance import COMPILED, measure_over_dense
from tests.tensorrt.conftest import ProgramOf, passed, settings_for

Requests = list[BuildRequest]


def _answer(request: BuildRequest, nodes: list[str]) -> Built:
    assert request.engine is not None
    request.engine.write_bytes(b"sparse" if request.sparse else b"dense")
    found = f"[V] (Sparsity) Found {len(nodes)} layer(s) eligible to use sparse tactics: {', '.join(nodes)}"
    chose = f"[V] (Sparsity) Chose {len(nodes) - 1} layer(s) using sparse tactics: {', '.join(nodes[1:])}"
    return Built(
        sha256=hashlib.sha256(request.engine.read_bytes()).hexdigest(),
        bytes=request.engine.stat().st_size,
        builder="tensorrt",
        version="11.4.0",
        compute_capability="8.0",
        gpu="NVIDIA A100-SXM4-80GB",
        substitute="",
        flags=("SPARSE_WEIGHTS",) if request.sparse else (),
        seconds=1.0,
        peak_rss_bytes=1,
        messages=(found, chose, found, chose) if request.sparse else (),
        inspector="",
        layers=10,
    )


def _lowered(program: Program, folder: Path, sparsity: str) -> Lowered:
    """For an A100, into ``folder/model``."""
    target = find_target("trt-a100")
    settings, model = settings_for(target), folder / "model"
    model.mkdir()
    stored = passed(program, target, "", sparsity, settings)
    return TensorRtBackend().lower(stored, target, model, SilentProgress(), settings)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Requests:
    """A machine with TensorRT and an A100, as far as the compiler can tell; what it asked to build."""
    requests: Requests = []

    def build(request: BuildRequest, progress: Any) -> Built:
        requests.append(request)
        from compile_sparse.backends.tensorrt.sparsity.sparse_gate import check_sparsity

        return _answer(request, [row.node for row in check_sparsity(request.onnx) if row.state == "2:4"])

    monkeypatch.setenv("COMPILE_SPARSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(engine_build, "probe_runtime", lambda target: Probe(True, "tensorrt", "11.4.0", "cuda"))
    monkeypatch.setattr(engine_build, "build", build)
    return requests


def test_an_engine_and_its_dense_twin(gpu: Requests, program_of: ProgramOf, tmp_path: Path) -> None:
    lowered = _lowered(program_of("llama"), tmp_path, "2:4")
    model = tmp_path / "model"
    sparse, dense = gpu
    assert (sparse.sparse, dense.sparse) == (True, False)
    assert sparse.onnx == dense.onnx
    assert sparse.timing_cache == dense.timing_cache, "dense kernels are timed once"
    assert sparse.timing_cache is not None
    assert sparse.timing_cache.parent == tmp_path / "cache" / "tensorrt", "and not again by the next compilation"
    assert [profile["name"] for profile in sparse.profiles] == ["prefill", "decode"]
    (record,), (twin,) = read_description(model).engines, read_description(model / TWIN).engines
    assert (record.gpu, record.flags, twin.flags) == ("NVIDIA A100-SXM4-80GB", ("SPARSE_WEIGHTS",), ())
    assert (model / record.file).read_bytes() == b"sparse"
    assert (model / TWIN / twin.file).read_bytes() == b"dense"
    for name, digest in lowered.files.items():
        assert hashlib.sha256((model / name).read_bytes()).hexdigest() == digest
    section = lowered.sparsity
    assert section is not None
    for profile in ("prefill", "decode"):
        found = section["profiles"][profile]
        assert (section["intended"], found["eligible"], found["chosen"], found["kernels"]) == (10, 10, 9, None)
        assert sum(shape["layers"] for shape in found["declined"]) == 1
    assert section["unverified"] == ""


def test_a_dense_model_has_no_twin(gpu: Requests, program_of: ProgramOf, tmp_path: Path) -> None:
    lowered = _lowered(program_of("llama"), tmp_path, "")
    assert len(gpu) == 1
    assert not gpu[0].sparse
    assert not (tmp_path / "model" / TWIN).exists()
    assert lowered.sparsity is None


def test_bytes_are_those_of_the_graph(tmp_path: Path) -> None:
    for name, size in (("model.onnx", 3), ("model.engine", 5), ("twin/model.engine", 100), ("checkpoint/w", 1000)):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(size))
    assert model_bytes(TensorRtBackend(), tmp_path) == 3
    assert TensorRtBackend().dense_build(tmp_path) == tmp_path / TWIN


class _Worker:
    """Answers as the measuring process on the GPU would: the twin takes twice as long for prompts and as long per token."""

    def call(self, request: Benchmark | BenchmarkSamples) -> Rounds | SampleTimes:
        assert request.names == [TWIN, COMPILED]
        if isinstance(request, BenchmarkSamples):
            return SampleTimes({TWIN: [0.3, 0.31, 0.29], COMPILED: [0.2, 0.21, 0.19]})
        assert (request.prompt_tokens, request.output_tokens) == (32, 8)
        times = {TWIN: (2.0, 1.0), COMPILED: (1.0, 1.0)}
        return Rounds(
            {
                name: [Round(prefill + d, decode + d, []) for d in (0.0, 0.01, -0.01)]
                for name, (prefill, decode) in times.items()
            }
        )


def test_the_twin_is_measured_against(twin_ratio: Callable[..., dict[str, Interval]]) -> None:
    found = twin_ratio(None)
    assert found["prefill"].value == pytest.approx(2.0, rel=0.02)
    assert found["decode"].value == pytest.approx(1.0, rel=0.02)
    assert twin_ratio({})["samples"].value == pytest.approx(1.5, rel=0.05)


@pytest.fixture
def twin_ratio() -> Callable[..., dict[str, Interval]]:
    workload = Workload(prompt=32, output=8, rounds=3)
    return lambda feeds: measure_over_dense(
        _Worker(),  # type: ignore[arg-type]
        TWIN,
        workload,
        feeds,
        vocabulary=9,
        seed=0,
        progress=SilentProgress(),
    )


def test_the_report_has_the_ratio_per_profile(
    gpu: Requests, program_of: ProgramOf, tmp_path: Path, twin_ratio: Callable[..., dict[str, Interval]]
) -> None:
    lowered = _lowered(program_of("llama"), tmp_path, "2:4")
    size = ModelSection(kind="decoder", parameters=Change(baseline=1, compiled=1))
    # As it comes back from the staging folder.
    section = json.loads(json.dumps(lowered.sparsity))
    report = Report(target="trt-a100", verdict="unverified", model=size, sparsity=section)
    fine = Fidelity(top1_agreement=1.0, mean_abs_logprob_diff=0.0)
    measured = Measured(None, fine, fine, None, None, twin_ratio(None))
    found = judge(report, measured, ("sparse_layers>=9",))
    assert found.sparsity is not None
    assert found.sparsity.profiles is not None
    assert found.sparsity.profiles["prefill"].twin == twin_ratio(None)["prefill"]
    assert [gate.passed for gate in found.gates] == [True]
    assert not judge(report, measured, ("sparse_layers>=10",)).gates[0].passed
