"""What people ask for: models with and without text, of other kinds, with zeros that gain nothing, planned from a config."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import transformers as hf

from compile_sparse.backends.onnxruntime import OnnxRuntimeBackend
from compile_sparse.compiler.extension.backend_contract import Lowered
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.ir.weights import ResidentTensor
from tests.onnxruntime.end_to_end.commands import SMALL, Data, lines
from tests.random_weights import randomised
from tests.shell import shell


@pytest.fixture(scope="module")
def mute(llama: Path, root: Path) -> Path:
    """The same model without a tokenizer. Its captured program is another one: the folder is."""
    folder = root / "mute"
    shutil.copytree(llama, folder)
    (folder / "tokenizer.json").unlink()
    return folder


def test_without_a_tokenizer_token_files_work_and_text_does_not(mute: Path, data: Data, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.jsonl"
    tokens.write_text("".join(json.dumps({"input_ids": list(range(i, i + 40))}) + "\n" for i in range(3)))
    words = (mute, "--target", "ort-cpu", "--prune", "channels=0.5", "--criterion", "activation", *SMALL)
    words += ("--max-quality-loss", "1000x")
    found = shell(
        *words, "--calibration", tokens, "--eval", f"ids={tokens}", "--sequence-length", 32, "--out", tmp_path / "out"
    )
    assert found.code == 0, found.out
    assert found.data["quality"]["slices"]["ids"]["tokens"] == 3 * (31 + 7)
    assert not (tmp_path / "out" / "model" / "tokenizer.json").exists()
    found = shell(*words, "--calibration", data.calibration, "--sequence-length", 32, "--out", tmp_path / "text")
    assert (found.code, found.error["code"]) == (2, "CS1035")


def test_no_data_is_needed(llama: Path, tmp_path: Path) -> None:
    found = shell(llama, "--target", "ort-cpu", "--quantize", "w4a16-g32", *SMALL, "--out", tmp_path / "out")
    assert found.code == 0, found.out
    quality = found.data["quality"]
    assert quality["known"] is False
    assert list(quality["slices"]) == ["reference"]
    assert quality["slices"]["reference"]["kl"] > 0
    assert "Quality unknown: no evaluation data (--eval)" in found.data["verdict_why"]
    # Nobody said how long evaluation windows are, and the default is longer than this model's context.
    text = lines(tmp_path / "text.jsonl", ["Some text. " * 50])
    again = shell("verify", tmp_path / "out", "--eval", f"en={text}")
    assert again.code == 0, again.out
    # 550 bytes, and a tokenizer that puts nothing before them: four windows of 128, a last one of 38, each without its first.
    assert again.data["quality"]["slices"]["en"]["tokens"] == 550 - 5
    assert again.data["quality"]["known"] is True
    assert "Quality unknown" not in again.data["verdict_why"]
    assert found.data["fidelity"]["tokens"] == 8 * 63
    assert found.data["model"]["artifact_bytes"]["compiled"] < found.data["model"]["artifact_bytes"]["baseline"]


BERT_LIKE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
ENCODERS: dict[str, Callable[[], hf.PreTrainedModel]] = {
    "bert": lambda: hf.BertForSequenceClassification(
        hf.BertConfig(**BERT_LIKE, vocab_size=512, max_position_embeddings=64, num_labels=3)
    ),
    "vit": lambda: hf.ViTForImageClassification(hf.ViTConfig(**BERT_LIKE, image_size=32, patch_size=8, num_labels=5)),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_reports_samples_and_agreement(name: str, tmp_path: Path) -> None:
    randomised(ENCODERS[name]()).save_pretrained(tmp_path / name)
    words = (tmp_path / name, "--target", "ort-cpu", "--prune", "channels=0.25", "--workload", "batch=2,rounds=3")
    found = shell(*words, "--gate", "samples_s>=0.01x", "--out", tmp_path / "out")
    assert found.code == 0, found.out
    report = found.data
    assert report["verdict"] != "unverified"
    assert report["fidelity"]["samples"] == 8
    assert report["fidelity"]["top1_agreement"] == 1.0
    for kind in ("baseline", "compiled"):
        assert report["performance"][kind]["samples_s"] > 0
        assert "decode_tok_s" not in report["performance"][kind]
    assert report["performance"]["ratio"]["samples_s"]["value"] > 0
    (slice_,) = report["quality"]["slices"].values()
    assert 0 <= slice_["top1_agreement"] <= 1
    assert 0 < slice_["mean_cosine"] <= 1.000001
    assert "ppl_baseline" not in slice_


def test_a_plan_needs_the_config_alone(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((llama / "config.json").read_bytes())
    words = ("explain", tmp_path, "--target", "ort-cpu", "--prune", "channels=0.25", "--quantize", "w8a8")
    found = shell(*words)
    assert found.code == 0, found.out
    planned = found.data
    assert planned["parameters"]["baseline"] - planned["parameters"]["compiled"] == 2 * 3 * 32 * 64
    assert planned["bytes"]["compiled"] < planned["bytes"]["baseline"]
    assert planned["refusals"] == []
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    found = shell(tmp_path, "--target", "ort-cpu", "--quantize", "w8a8", "--out", tmp_path / "out")
    assert (found.code, found.error["code"]) == (4, "CS2003")


def test_zeros_the_runtime_multiplies_are_refused_with_figures(llama: Path, tmp_path: Path) -> None:
    words = (llama, "--target", "ort-cpu", "--sparsity", "2:4", *SMALL, "--out", tmp_path / "out")
    refusal = shell(*words)
    assert (refusal.code, refusal.error["code"]) == (4, "CS4103")
    assert "50% of" in refusal.error["why"]
    assert "MB" in refusal.error["why"]
    assert "Measured:" in refusal.error["why"]
    assert "--allow-useless" in refusal.error["hint"]
    assert not list(tmp_path.iterdir())
    planned = shell("explain", llama, "--target", "ort-cpu", "--sparsity", "2:4")
    assert planned.code == 4
    assert [entry["code"] for entry in planned.data["refusals"]] == ["CS4103"]
    found = shell(*words, "--allow-useless")
    assert found.code == 0, found.out
    # The layers' weights are most of the parameters, and half of them are zero.
    assert 0.25 < found.data["model"]["zeros"] < 0.5
    sizes = found.data["model"]["artifact_bytes"]
    assert sizes["compiled"] == pytest.approx(sizes["baseline"], rel=0.01)


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16-g32"])
def test_a_wrong_scale_makes_the_verdict_unverified(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    """The artifact loads and runs, only its logits are another model's. Speed must not be reported as a gain."""
    honest = OnnxRuntimeBackend.write

    def swapped(backend: OnnxRuntimeBackend, program: Program, prepared: Program, *rest: Any, **more: Any) -> Lowered:
        name = "lm_head.weight.scale"
        if name in prepared.weights:
            wrong = ResidentTensor(prepared.weights.load(name).roll(1, 0))
            prepared = replace(prepared, weights=prepared.weights.updated({name: wrong}))
        return honest(backend, program, prepared, *rest, **more)

    words = (llama, "--target", "ort-cpu", "--quantize", scheme, *SMALL, "--gate", "fidelity_top1>=0.97")
    monkeypatch.setattr(OnnxRuntimeBackend, "write", swapped)
    found = shell(*words, "--out", tmp_path / "wrong")
    assert found.code == 3
    assert found.data["verdict"] == "unverified"
    assert found.data["fidelity"]["top1_agreement"] < 0.97
    assert "different model" in found.data["verdict_why"]
