"""The command line with a vLLM target and the real vLLM, on a tiny random model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from compile_sparse.compiler.runtimes.environments import RuntimeRecord
from tests.shell import shell
from tests.vllm.lowering import here

SMALL = ("--workload", "prompt=16,output=8,rounds=3")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COMPILE_SPARSE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    draws = np.random.default_rng(0)
    path.write_text("".join(json.dumps({"input_ids": draws.integers(3, 320, 64).tolist()}) + "\n" for _ in range(8)))
    return path


@pytest.fixture(scope="module")
def compiled(
    runtime: RuntimeRecord, llama: Path, text: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """Channels -25 % and int8 weights and activations, measured at two levels of concurrency."""
    work = tmp_path_factory.mktemp("work")
    recipe = work / "recipe.yaml"
    reduce = str(bool(runtime.facts.get("int8_saturates"))).lower()
    scheme = f"w8a8, reduce_range: {reduce}" if "w8a8" in here().schemes else "fp8"
    recipe.write_text(f"passes:\n  - prune-channels: {{fraction: 0.25}}\n  - quantize: {{scheme: {scheme}}}\n")
    words = [llama, "--target", here().name, "--recipe", recipe, "--calibration", text, "--eval", f"random={text}"]
    words += ["--max-quality-loss", "1000x"]
    out = work / "artifact"
    found = shell("compile", *words, *SMALL, "--concurrency", "1,3", "--gate", "artifact_bytes<=0.7x", "--out", out)
    assert found.code == 0, found.data
    return out, found.data


def test_the_report(compiled: tuple[Path, dict[str, Any]], runtime: RuntimeRecord) -> None:
    _, report = compiled
    assert report["runtime"]["name"] == "vllm"
    assert report["runtime"]["version"] == runtime.versions["vllm"]
    assert report["verdict"] in ("faster", "smaller-only", "slower")
    fidelity = report["fidelity"]
    assert fidelity["mean_abs_logprob_diff"] <= fidelity["logprob_bound"]
    assert fidelity["top1_agreement"] >= 0.97
    performance = report["performance"]
    assert set(performance["concurrency"]) == {"1", "3"}
    for level in performance["concurrency"].values():
        for model in ("baseline", "compiled"):
            assert level[model]["prefill_tok_s"] > 0
            assert level[model]["decode_tok_s"] > 0
            assert level[model]["ttft_ms"]["p50"] > 0
            assert level[model]["tpot_ms"]["p99"] > 0
    assert performance["compiled"]["peak_rss_bytes"] > 50e6
    assert "peak_rss_bytes" not in performance["concurrency"]["3"]["compiled"]
    for level in performance["concurrency"].values():
        low, high = level["ratio"]["decode_tok_s"]["ci95"]
        assert low <= level["ratio"]["decode_tok_s"]["value"] <= high
    assert performance["ratio"] == performance["concurrency"]["1"]["ratio"]
    slice_ = report["quality"]["slices"]["random"]
    assert slice_["ratio"] > 0
    assert 0 <= slice_["top1_agreement"] <= 1
    assert "kl" not in slice_
    assert report["passes"][-1]["achieved"]["quantization"] == "compressed-tensors"


def test_the_folder(compiled: tuple[Path, dict[str, Any]]) -> None:
    out, report = compiled
    config = json.loads((out / "model" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["intermediate_size"] == 384
    assert config["dtype"] == "bfloat16"
    assert config["quantization_config"]["format"] in ("int-quantized", "float-quantized")
    assert "sparsity_config" not in config["quantization_config"]
    with safe_open(out / "model" / "model.safetensors", "pt") as file:
        names = set(file.keys())
        assert file.get_slice("model.layers.0.mlp.down_proj.weight").get_dtype() in ("I8", "F8_E4M3")
        assert file.get_slice("model.layers.0.mlp.down_proj.weight").get_shape() == [256, 384]
        assert file.get_slice("model.embed_tokens.weight").get_dtype() == "BF16"
    assert "model.layers.3.self_attn.q_proj.weight_scale" in names
    sizes = report["model"]["artifact_bytes"]
    assert sizes["compiled"] < 0.7 * sizes["baseline"]


def test_verify_measures_again(compiled: tuple[Path, dict[str, Any]], text: Path) -> None:
    out, before = compiled
    found = shell("verify", out, "--eval", f"again={text}", *SMALL)
    assert found.code == 0, found.data
    assert set(found.data["quality"]["slices"]) == {"again"}
    assert found.data["fidelity"]["logprob_bound"] == pytest.approx(before["fidelity"]["logprob_bound"], rel=0.5)


def test_what_this_processor_cannot_run_is_written_and_unverified(
    runtime: RuntimeRecord, llama: Path, tmp_path: Path
) -> None:
    """4-bit weights: measured where vLLM has the kernel, written and called unverified where it has not."""
    out = tmp_path / "artifact"
    found = shell("compile", llama, "--target", here().name, "--quantize", "w4a16", *SMALL, "--out", out)
    assert found.code == 0, found.data
    config = json.loads((out / "model" / "config.json").read_text())
    assert config["quantization_config"]["config_groups"]["group_0"]["weights"]["group_size"] == 128
    if runtime.device == "cuda" or "cpu_gemm_wna16" in runtime.facts["kernels"]:
        assert found.data["verdict"] in ("slower", "smaller-only", "faster")
        assert found.data["fidelity"]["mean_abs_logprob_diff"] <= found.data["fidelity"]["logprob_bound"]
    else:
        assert found.data["verdict"] == "unverified"
        assert "cpu_gemm_wna16" in found.data["verdict_why"]
        assert "performance" not in found.data
        again = shell("verify", out)
        assert (again.code, again.data["error"]["code"]) == (5, "CS5007")
        assert "cpu_gemm_wna16" in again.data["error"]["why"]
