"""What cannot be measured here is written all the same, and verify says what is missing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers as hf

from compile_sparse.compiler.cli.main import run
from tests.vllm.registered import record
from tests.vllm.test_contract import SIZES


@pytest.fixture(autouse=True)
def no_runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPILE_SPARSE_RUNTIMES", str(tmp_path / "runtimes"))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES | {"hidden_size": 64, "intermediate_size": 128})).save_pretrained(folder)
    return folder


@pytest.fixture
def compiled(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., dict[str, Any]]:
    """The report of a compilation that cannot be measured; the artifact is ``tmp_path / "artifact"``."""
    monkeypatch.setenv("COMPILE_SPARSE_CACHE", str(tmp_path / "cache"))

    def call(*options: str) -> dict[str, Any]:
        words = [
            "compile",
            str(weights),
            "--target",
            "vllm-cpu",
            *options,
            "--out",
            str(tmp_path / "artifact"),
            "--json",
        ]
        assert run([*words, "--force"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["verdict"] == "unverified"
        assert (tmp_path / "artifact" / "model" / "config.json").is_file()
        return report

    return call


def verify_error(artifact: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    code = run(["verify", str(artifact), "--json"])
    error = json.loads(capsys.readouterr().out)["error"]
    assert code == error["exit_code"]
    return error


def test_without_a_runtime_the_artifact_is_written_and_verify_says_what_to_install(
    compiled: Callable[..., dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = compiled()
    assert "No vLLM is registered." in report["verdict_why"]
    error = verify_error(tmp_path / "artifact", capsys)
    assert (error["exit_code"], error["code"]) == (5, "CS5007")
    assert "compile-sparse runtime install vllm" in error["hint"]


def test_a_runtime_that_cannot_measure_is_named(
    compiled: Callable[..., dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record({}, version="0.20.0")
    assert "vLLM 0.20.0 is older than" in compiled()["verdict_why"]
    assert "--version" in verify_error(tmp_path / "artifact", capsys)["hint"]
    record({}, python="/gone/bin/python")
    error = verify_error(tmp_path / "artifact", capsys)
    assert "Its Python is gone" in error["why"]
    assert "--force" in error["hint"]
    record({"capability": "9.0", "gpu": "a GPU"}, device="cuda")
    assert "runs on cuda, the target on cpu" in verify_error(tmp_path / "artifact", capsys)["why"]


def test_codes_that_the_processor_here_cannot_run_are_written_and_not_measured(
    compiled: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    record({"isa": "avx2", "kernels": ["onednn_scaled_mm"], "int8_saturates": True})
    four = compiled("--quantize", "w4a16-g32")
    assert "no kernel for 4-bit weights (cpu_gemm_wna16) on this processor (avx2)" in four["verdict_why"]
    eight = compiled("--quantize", "w8a8")
    assert "overflows silently" in eight["verdict_why"]
    assert "reduce_range: true" in eight["verdict_why"]


def test_an_artifact_of_another_tool_is_not_verified(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "manifest.json").write_text(
        json.dumps({"schemaVersion": 2, "mediaType": "application/json", "layers": []})
    )
    assert verify_error(tmp_path, capsys)["exit_code"] == 2
