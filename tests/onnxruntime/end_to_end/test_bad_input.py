"""Damaged models, and words that mean nothing: the code, the part that is wrong, and no artifact."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.onnxruntime.end_to_end.commands import lines
from tests.shell import shell


def damaged(llama: Path, folder: Path, kind: str) -> Path:
    """A copy of the model, damaged."""
    shutil.copytree(llama, folder)
    weights = folder / "model.safetensors"
    if kind == "pickle":
        weights.rename(folder / "pytorch_model.bin")
    elif kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif kind == "renamed tensor":
        tensors = load_file(weights)
        tensors["model.norm.bias"] = tensors.pop("model.norm.weight")
        save_file(tensors, weights)
    elif kind == "tokenizer":
        (folder / "tokenizer.json").write_text("{")
    return folder


@pytest.mark.parametrize(
    ("kind", "code", "name"),
    [
        ("pickle", 4, "CS2003"),
        ("truncated", 4, "CS2004"),
        ("renamed tensor", 4, "CS2005"),
        ("tokenizer", 2, "CS1034"),
    ],
)
def test_bad_models(llama: Path, tmp_path: Path, kind: str, code: int, name: str) -> None:
    model = damaged(llama, tmp_path / "model", kind)
    found = shell(model, "--target", "ort-cpu", "--quantize", "w8a8", "--out", tmp_path / "out")
    assert (found.code, found.error["code"]) == (code, name)
    assert not (tmp_path / "out").exists()


SHORT = ("--sequence-length", "32")
BAD_WORDS: dict[str, tuple[tuple[str, ...], int, str, str]] = {
    "unknown target": (("--target", "ort-cpux"), 2, "CS1001", "ort-cpu"),
    "fraction 0": (("--prune", "channels=0"), 2, "CS1000", "between 0 and 1"),
    "fraction 1": (("--prune", "channels=1"), 2, "CS1000", "between 0 and 1"),
    "fraction 1.5": (("--prune", "channels=1.5"), 2, "CS1000", "between 0 and 1"),
    "pass that is not installed": (("--prune", "neurons=0.5"), 4, "CS4101", "prune-neurons"),
    "nothing of the kind": (("--prune", "experts=0.5"), 4, "CS2104", "no mixture-of-experts"),
    "no such scheme": (("--quantize", "w3a16"), 2, "CS1105", "w8a8"),
    "no such pattern": (("--sparsity", "4:2"), 2, "CS1105", "N:M"),
    "no such criterion": (("--prune", "channels=0.5", "--criterion", "guess"), 2, "CS1007", "magnitude"),
    "criterion without text": (("--prune", "channels=0.5", "--criterion", "activation"), 2, "CS1121", "calibration"),
    "empty calibration": (("--calibration", "{tmp}/empty.jsonl", *SHORT), 2, "CS1032", "empty.jsonl"),
    "absent calibration": (("--calibration", "{tmp}/absent.jsonl", *SHORT), 2, "CS1031", "absent.jsonl"),
    "calibration that is not JSON": (("--calibration", "{tmp}/recipe.yaml", *SHORT), 2, "CS1031", "line 1"),
    "sequence longer than the model": (
        ("--calibration", "{tmp}/text.jsonl", "--sequence-length", "129"),
        2,
        "CS1036",
        "128 tokens",
    ),
    "bad recipe key": (("--recipe", "{tmp}/recipe.yaml"), 2, "CS1105", "recipe.yaml:3"),
    "no such recipe": (("--recipe", "int9"), 2, "CS1108", "int8"),
    "gate on no slice": (("--gate", "ppl[en]<=1.1x"), 2, "CS1012", "--eval en=FILE"),
    "gate on nothing": (("--gate", "beauty>=1"), 2, "", "beauty"),
    "workload": (("--workload", "prompt=many"), 2, "", "prompt"),
    "negative seed": (("--seed", "-1"), 2, "CS1105", "seed"),
}


@pytest.mark.parametrize("name", BAD_WORDS)
def test_bad_words(llama: Path, tmp_path: Path, name: str) -> None:
    words, code, error, part = BAD_WORDS[name]
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "recipe.yaml").write_text("schema_version: 1\nseed: 3\nquantise: w8a8\n")
    lines(tmp_path / "text.jsonl", ["Some text. " * 50])
    target = () if "--target" in words else ("--target", "ort-cpu")
    given = [word.format(tmp=tmp_path) for word in words]
    found = shell(llama, *target, *given, "--out", tmp_path / "out")
    assert found.code == code, found.out
    assert found.error["code"] == error or not error
    assert part in json.dumps(found.error, ensure_ascii=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("model", ["./missing", "package.module:factory"])
def test_no_such_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    monkeypatch.chdir(tmp_path)
    found = shell(model, "--target", "ort-cpu")
    assert found.code == 2
    assert found.error["code"] in ("CS1002", "CS1037")
    assert not list(tmp_path.iterdir())
