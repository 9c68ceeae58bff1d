"""The command line with TensorRT targets, on machines without their GPUs: the graph is built by TensorRT-RTX and thrown away, and
ONNX Runtime, the reference runtime, answers for fidelity and quality. With a GPU of a target these tests measure engines instead.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from compile_sparse.backends.tensorrt.description import DESCRIPTION_FILE, read_description
from compile_sparse.backends.tensorrt.processor import probe_runtime
from compile_sparse.compiler.targets.target import find_target
from tests.shell import Shell, shell
from tests.support.served_models import WIDE
from tests.support.tiny_models import build_tiny

SMALL = ("--workload", "prompt=16,output=8,rounds=3")
NO_GPU = not probe_runtime(find_target("trt-a100")).available


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COMPILE_SPARSE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    draws = np.random.default_rng(0)
    lines = [json.dumps({"input_ids": draws.integers(3, WIDE.vocabulary, 64).tolist()}) for _ in range(8)]
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llama"
    build_tiny("wide/llama").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "vit"
    build_tiny("wide/vit").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def compiled(llama: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Shell]:
    """2:4 zeros chosen by Wanda, int8 weights and activations with fixed ranges, a gate on sparse kernels."""
    out = tmp_path_factory.mktemp("work") / "artifact"
    words = (llama, "--target", "trt-a100", "--sparsity", "2:4", "--criterion", "wanda", "--quantize", "w8a8-static")
    words += ("--calibration", text, "--eval", f"random={text}", "--require-sparse", "10", *SMALL, "--out", out)
    words += ("--max-quality-loss", "1000x")
    return out, shell("compile", *words, "--verify-each")


@pytest.mark.skipif(not NO_GPU, reason="the GPU is here: engines are built")
def test_without_the_gpu_answers_are_checked_and_speed_is_not(compiled: tuple[Path, Shell]) -> None:
    _, found = compiled
    report = found.data
    assert found.code == 3, "the gate on sparse kernels was not measured, so it fails"
    assert report["verdict"] == "unverified"
    assert "tensorrt" in report["verdict_why"]
    assert "performance" not in report
    fidelity = report["fidelity"]
    assert "onnxruntime" in fidelity["runtime"]
    assert fidelity["mean_abs_logprob_diff"] <= fidelity["logprob_bound"]
    assert report["quality"]["slices"]["random"]["tokens"] > 0
    (gate,) = report["gates"]
    assert not gate["passed"]
    assert "not installed" in gate["why"] or "no GPU" in gate["why"]


def test_the_report_says_which_layers_are_sparse(compiled: tuple[Path, Shell]) -> None:
    _, found = compiled
    sparsity = found.data["sparsity"]
    assert (sparsity["pattern"], sparsity["intended"]) == ("2:4", 10)
    assert sparsity["in_graph"]["states"]["2:4"] == 10
    assert all("proj" in layer["node"] for layer in sparsity["in_graph"]["layers"])
    mask = next(section for section in found.data["passes"] if section["name"] == "mask")
    left = {skip["where"]: skip["why"] for skip in mask["skips"]}
    small = [why for where, why in left.items() if "k_proj" in where or "v_proj" in where]
    assert len(small) == 4
    assert all("128 outputs" in why for why in small), "what is left dense is said with its sizes"
    quantize = next(section for section in found.data["passes"] if section["name"] == "quantize")
    assert quantize["achieved"]["int8_outputs"] == 10


def test_the_artifact_is_complete(compiled: tuple[Path, Shell]) -> None:
    out, _ = compiled
    manifest = json.loads((out / "manifest.json").read_text())
    assert {"model/model.onnx", "model/model.onnx.data", f"model/{DESCRIPTION_FILE}"} <= set(manifest["files"])
    description = read_description(out / "model")
    assert description.max_length == 128
    assert description.precision == "fp16"
    onnx.checker.check_model(str(out / "model" / "model.onnx"))


@pytest.mark.skipif(not NO_GPU, reason="the GPU is here")
def test_verifying_needs_the_gpu(compiled: tuple[Path, Shell]) -> None:
    found = shell("verify", compiled[0])
    assert found.code == 5
    assert "trt-a100 cannot be measured here" in found.errors


def test_an_engine_ahead_of_time_is_kept_and_recorded(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "artifact"
    found = shell("compile", llama, "--target", "trt-l4", "--engine", "rtx-aot", "--no-verify", "--out", out)
    assert found.code == 0, found.errors
    (record,) = read_description(out / "model").engines
    assert (record.builder, record.compute_capability, record.profiles) == (
        "tensorrt_rtx",
        "8.9",
        ("prefill", "decode"),
    )
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["files"]["model/model.rtx.engine"]["sha256"] == record.sha256
    assert any("TensorRT-RTX" in note for note in found.data["notes"])


def test_no_ahead_of_time_engine_for_a_gpu_that_something_else_stands_in_for(llama: Path, tmp_path: Path) -> None:
    found = shell("compile", llama, "--target", "trt-h100", "--engine", "rtx-aot", "--out", tmp_path / "a")
    assert found.code == 4
    assert "CS4430" in found.errors


def test_precision_and_length_are_options(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "artifact"
    words = ("--precision", "bf16", "--max-length", "72", "--out", out, *SMALL)
    found = shell("compile", llama, "--target", "trt-h100", *words)
    assert found.code == 0, found.errors
    assert found.data["fidelity"]["mean_abs_logprob_diff"] < 2.0**-9  # angles in bf16
    description = read_description(out / "model")
    assert (description.precision, description.max_length) == ("bf16", 72)
    shapes = {value.name: value.shape for value in description.inputs}
    assert shapes["past_key_values.0.key"][2] == 72


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("--target", "trt-a100", "--precision", "fp32"), "CS1043"),
        (("--target", "trt-a100", "--max-length", "20", *SMALL), "CS1047"),
        (("--target", "ort-cpu", "--engine", "none"), "CS1046"),
        (("--target", "ort-cpu", "--max-length", "64"), "CS1046"),
        (("--target", "trt-a100", "--emit", "tritn"), "CS1061"),
        (("--target", "trt-a100", "--max-length", "5000"), "CS1047"),
        (("--target", "trt-a100", "--tensor-parallel", "2"), "CS1046"),
    ],
)
def test_wrong_options(llama: Path, tmp_path: Path, words: tuple[str, ...], code: str) -> None:
    found = shell("compile", llama, *words, "--out", tmp_path / "a")
    assert found.code == 2
    assert code in found.errors
    assert not (tmp_path / "a").exists()


def test_a_decoder_is_not_deployed_as_a_tensorrt_model(llama: Path, tmp_path: Path) -> None:
    found = shell("compile", llama, "--target", "trt-a100", "--emit", "triton", "--out", tmp_path / "a")
    assert found.code == 4
    assert "CS4621" in found.errors


def test_an_image_model_is_calibrated_on_arrays(vit: Path, tmp_path: Path) -> None:
    images = tmp_path / "images.npz"
    np.savez(images, pixel_values=np.random.default_rng(0).standard_normal((12, 3, 32, 32), np.float32))
    words = ("--target", "trt-l4", "--quantize", "w8a8-static", "--calibration", images)
    found = shell("compile", vit, *words, "--out", tmp_path / "artifact")
    assert found.code == 0, found.errors
    assert found.data["fidelity"]["mean_cosine"] > 0.99
    assert found.data["quality"]["slices"]["seeded"]["mean_cosine"] > 0.9


@pytest.mark.skipif(not NO_GPU, reason="the GPU is here: its engine is deployed")
def test_without_an_engine_there_is_nothing_to_deploy(vit: Path, tmp_path: Path) -> None:
    """Said before anything is compiled."""
    found = shell("compile", vit, "--target", "trt-l4", "--emit", "triton", "--out", tmp_path / "a")
    assert (found.code, "CS4622" in found.errors) == (4, True)


def test_a_model_repository_is_a_part_of_the_artifact(vit: Path, tmp_path: Path) -> None:
    out = tmp_path / "artifact"
    found = shell("compile", vit, "--target", "ort-cpu", "--emit", "triton", "--no-verify", "--out", out)
    assert found.code == 0, found.errors
    files = json.loads((out / "manifest.json").read_text())["files"]
    assert {"triton/vit/config.pbtxt", "triton/vit/1/model.onnx"} <= set(files)
    assert (out / "triton/vit/1/model.onnx").read_bytes() == (out / "model/model.onnx").read_bytes()


def test_calibration_arrays_must_fit(vit: Path, tmp_path: Path) -> None:
    images = tmp_path / "images.npz"
    words = ("--target", "trt-l4", "--quantize", "w8a8-static", "--calibration", images, "--out", tmp_path / "a")
    np.savez(images, pixel_values=np.zeros((4, 3, 16, 16), np.float32))
    found = shell("compile", vit, *words)
    assert (found.code, "CS1048" in found.errors) == (2, True)
    assert "[samples, 3, 32, 32]" in found.errors
    images.write_bytes(b"no archive")
    found = shell("compile", vit, *words)
    assert (found.code, "CS1048" in found.errors) == (2, True)


@pytest.mark.skipif(not NO_GPU, reason="engines are built")
def test_what_nothing_here_can_run_is_unverified_with_the_reason(llama: Path, text: Path, tmp_path: Path) -> None:
    words = ("--target", "trt-rtx5090", "--quantize", "nvfp4", "--calibration", text, "--out", tmp_path / "a")
    found = shell("compile", llama, *words)
    assert found.code == 0, found.errors
    assert found.data["verdict"] == "unverified"
    assert "TRT_FP4DynamicQuantize is TensorRT's own operator" in found.data["verdict_why"]
    assert "fidelity" not in found.data


def test_values_beyond_fp16_are_found_before_anything_is_written(tmp_path: Path) -> None:
    """Every weight fits fp16, and so does every output; what is in between does not. ONNX Runtime would not show it."""
    model = build_tiny("wide/bert")
    layer = model.bert.encoder.layer[0]
    with torch.no_grad():
        layer.intermediate.dense.weight.mul_(3e4)
        layer.output.dense.weight.div_(3e4)
    model.save_pretrained(tmp_path / "bert")
    found = shell("compile", tmp_path / "bert", "--target", "trt-a100", "--out", tmp_path / "a")
    assert (found.code, "CS4432" in found.errors) == (4, True)
    assert "encoder.layer.0" in found.errors
    assert "--precision bf16" in found.errors
    assert not (tmp_path / "a").exists()
    found = shell("compile", tmp_path / "bert", "--target", "trt-a100", "--precision", "bf16", "--out", tmp_path / "a")
    assert found.code == 0, found.errors


def test_no_cache_no_length(vit: Path, tmp_path: Path) -> None:
    found = shell("compile", vit, "--target", "trt-l4", "--max-length", "64", "--out", tmp_path / "a")
    assert (found.code, "CS1046" in found.errors) == (2, True)


def test_explain_reads_no_weights(llama: Path, text: Path) -> None:
    words = ("--sparsity", "2:4", "--quantize", "w8a8-static", "--calibration", text)
    found = shell("explain", llama, "--target", "trt-a100", *words)
    assert found.code == 0, found.errors
    assert found.data["refusals"] == []
    assert found.data["bytes"]["compiled"] < 0.7 * found.data["bytes"]["baseline"]
