"""The command line with the hf target: compile, load in transformers in a process of its own, report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers as hf

from compile_sparse.compiler.cli.main import run
from tests.huggingface.emitting import load
from tests.huggingface.test_depth import randomised

SMALL = ("--workload", "prompt=8,output=4,rounds=3,threads=1")
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 96,
    "max_position_embeddings": 64,
}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COMPILE_SPARSE_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    draws = np.random.default_rng(0)
    path.write_text("".join(json.dumps({"input_ids": draws.integers(3, 96, 32).tolist()}) + "\n" for _ in range(8)))
    return path


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    randomised(hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES))).save_pretrained(folder)
    return folder


def test_a_decoder(llama: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "artifact"
    words = ["--target", "hf", "--prune", "channels=0.25", "--calibration", text, "--eval", f"a={text}", *SMALL]
    words += ["--max-quality-loss", "1000x"]
    assert run([str(word) for word in ["compile", llama, *words, "--out", out, "--json"]]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["fidelity"]["top1_agreement"] == 1.0
    assert report["fidelity"]["max_abs_diff"] < 1e-3
    assert report["runtime"]["name"] == "transformers"
    assert report["quality"]["slices"]["a"]["ratio"] > 0
    assert report["performance"]["compiled"]["decode_tok_s"] > 0
    assert report["passes"][-1]["achieved"] == {"config": {"intermediate_size": 96}}
    assert load(out / "model").config.intermediate_size == 96


def test_an_image_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {key: value for key, value in SIZES.items() if key not in ("vocab_size", "max_position_embeddings")}
    config = hf.ViTConfig(**sizes, image_size=16, patch_size=4, num_labels=5)
    randomised(hf.ViTForImageClassification(config)).save_pretrained(tmp_path / "vit")
    out = tmp_path / "artifact"
    words = [tmp_path / "vit", "--target", "hf", "--prune", "channels=0.25", *SMALL, "--out", out, "--json"]
    assert run([str(word) for word in ["compile", *words]]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["fidelity"]["max_abs_diff"] < 1e-3
    assert report["performance"]["compiled"]["samples_s"] > 0
    assert load(out / "model").config.intermediate_size == 96


def test_explain_says_what_the_class_cannot_express(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["explain", str(llama), "--target", "hf", "--prune", "channels=0.25", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["runtime"] == []
    # 3 of 4 heads do not divide a width of 64.
    assert run(["explain", str(llama), "--target", "hf", "--prune", "heads=0.25", "--json"]) == 4
    (diagnostic,) = json.loads(capsys.readouterr().out)["refusals"]
    assert diagnostic["code"] == "CS4205"
    assert "not a multiple" in diagnostic["why"]


def test_quantization_is_not_a_scheme_of_this_target(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["explain", str(llama), "--target", "hf", "--quantize", "w8a8", "--json"]) == 4
