"""A checkpoint keeps the types of the source's files: nothing is doubled, and the config says what is stored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from compile_sparse.compiler.cli.main import run
from tests.huggingface.test_depth import randomised

SMALL = ("--workload", "prompt=8,output=4,rounds=3,threads=1", "--max-quality-loss", "1000x", "--json")
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 96,
    "max_position_embeddings": 64,
}
NORM = "model.layers.1.input_layernorm.weight"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPILE_SPARSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def llama(out: Path, dtype: torch.dtype, **others: torch.dtype) -> Path:
    """A Llama stored in ``dtype``, some tensors in another."""
    randomised(hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES))).to(dtype).save_pretrained(out)
    if others:
        values = load_file(out / "model.safetensors")
        # Values that the shorter type does not have.
        values |= {name: values[name].to(other) * (1 + 2**-12) for name, other in others.items()}
        save_file(values, out / "model.safetensors", {"format": "pt"})
    return out


def compiled(source: Path, out: Path, *words: str, target: str = "hf") -> Path:
    """The folder that the runtime loads, of a compilation without measurements."""
    asked = ["--target", target, "--prune", "channels=0.25", *words, "--no-verify", "--out", str(out)]
    assert run(["compile", str(source), *asked]) == 0
    return out / "model"


def types(folder: Path) -> dict[str, torch.dtype]:
    return {name: value.dtype for name, value in load_file(folder / "model.safetensors").items()}


@pytest.mark.parametrize("target", ["hf", "vllm-cpu"])
def test_a_tensor_of_another_type_keeps_it(target: str, tmp_path: Path) -> None:
    """Routers and norms of large models are stored in float32 among bfloat16."""
    source = llama(tmp_path / "m", torch.bfloat16, **{NORM: torch.float32})
    model = compiled(source, tmp_path / "a", target=target)
    assert {name for name, dtype in types(model).items() if dtype == torch.float32} == {NORM}
    before, after = (load_file(folder / "model.safetensors")[NORM] for folder in (source, model))
    assert torch.equal(before, after)
    assert json.loads((model / "config.json").read_text())["dtype"] == "bfloat16"


def test_what_a_shorter_type_rounds_off_is_said(tmp_path: Path) -> None:
    for dtype, notes in ((torch.float16, 1), (torch.bfloat16, 0)):
        source, out = llama(tmp_path / f"{dtype}", dtype), tmp_path / f"{dtype}-a"
        compiled(source, out, target="vllm-cpu")
        said = json.loads((out / "report.json").read_text())["notes"]
        assert len([note for note in said if "significant bits" in note and "fp16 (11)" in note]) == notes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_type_stays(dtype: torch.dtype, tmp_path: Path) -> None:
    source = llama(tmp_path / "m", dtype)
    model = compiled(source, tmp_path / "a")
    assert set(types(model).values()) == {dtype}
    assert json.loads((model / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    assert hf.AutoModelForCausalLM.from_pretrained(model).dtype == dtype

    # What no pass touched is the source's, bit for bit.
    before, after = (load_file(folder / "model.safetensors") for folder in (source, model))
    same = [name for name in before if before[name].shape == after[name].shape and "mlp" not in name]
    assert len(same) > 10
    assert all(torch.equal(before[name], after[name]) for name in same)


def test_what_is_stored_counts_and_not_what_the_config_says(tmp_path: Path) -> None:
    source = llama(tmp_path / "m", torch.bfloat16)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    model = compiled(source, tmp_path / "a")
    assert set(types(model).values()) == {torch.bfloat16}
    assert json.loads((model / "config.json").read_text())["dtype"] == "bfloat16"


def test_precision_is_asked_for(tmp_path: Path) -> None:
    source = llama(tmp_path / "m", torch.bfloat16, **{NORM: torch.float32})
    assert set(types(compiled(source, tmp_path / "a", "--precision", "fp32")).values()) == {torch.float32}
    assert set(types(compiled(source, tmp_path / "b", "--precision", "fp16")).values()) == {torch.float16}


def test_experts_and_their_router(tmp_path: Path) -> None:
    """Experts are put together from tensors of the file when they are read, and taken apart again."""
    sizes = SIZES | {"num_hidden_layers": 1, "num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2}
    source = tmp_path / "m"
    randomised(hf.MixtralForCausalLM(hf.MixtralConfig(**sizes))).bfloat16().save_pretrained(source)
    values = load_file(source / "model.safetensors")
    routers = {name for name in values if name.endswith(".gate.weight")}
    assert len(routers) == 1
    values |= {name: values[name].float() * (1 + 2**-12) for name in routers}
    save_file(values, source / "model.safetensors", {"format": "pt"})
    model = compiled(source, tmp_path / "a")
    assert {name for name, dtype in types(model).items() if dtype == torch.float32} == routers
    after = load_file(model / "model.safetensors")
    assert all(torch.equal(values[name], after[name]) for name in routers)


def test_a_decoder_is_measured_in_its_own_type(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = llama(tmp_path / "m", torch.bfloat16, **{NORM: torch.float32}), tmp_path / "a"
    asked = ["--target", "hf", "--prune", "channels=0.25", *SMALL, "--out", str(out)]
    assert run(["compile", str(source), *asked]) == 0
    report = json.loads(capsys.readouterr().out)
    # Rounding of that type, and no more, is what the check allows: random models have a spread of about one nat.
    found = report["fidelity"]
    assert found["mean_abs_logprob_diff"] <= found["logprob_bound"] < 0.3

    own = sum(path.stat().st_size for path in source.iterdir())
    model = report["model"]
    assert model["source_bytes"] == own
    assert model["precision"] == "bf16"
    assert model["artifact_bytes"]["compiled"] < own
    assert model["artifact_bytes"]["baseline"] == pytest.approx(own, rel=0.02)


def test_an_image_model_is_measured_again_in_its_own_type(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {key: value for key, value in SIZES.items() if key not in ("vocab_size", "max_position_embeddings")}
    config = hf.ViTConfig(**sizes, image_size=16, patch_size=4, num_labels=5)
    randomised(hf.ViTForImageClassification(config)).bfloat16().save_pretrained(tmp_path / "m")
    out = tmp_path / "a"
    asked = ["--target", "hf", "--prune", "channels=0.25", *SMALL, "--out", str(out)]
    assert run(["compile", str(tmp_path / "m"), *asked]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(types(out / "model").values()) == {torch.bfloat16}
    assert report["fidelity"]["relative_error"] <= report["fidelity"]["error_bound"] < 0.1

    assert run(["verify", str(out), "--max-quality-loss", "1000x", "--json"]) == 0  # its baseline is in the cache
    assert json.loads(capsys.readouterr().out)["model"] == report["model"]


def test_a_plan_has_these_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = llama(tmp_path / "m", torch.bfloat16)
    assert run(["explain", str(source), "--target", "hf", "--prune", "channels=0.25"]) == 0
    assert "beside the source's files" in capsys.readouterr().out
    assert run(["explain", str(source), "--target", "hf", "--prune", "channels=0.25", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["bytes"]["baseline"] == pytest.approx(2 * plan["parameters"]["baseline"], rel=1e-3)  # and frequencies
    assert plan["source_bytes"] == sum(path.stat().st_size for path in source.iterdir())
