"""An artifact on disk: measured again, damaged, replaced, interrupted."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from compile_sparse.backends.onnxruntime import OnnxRuntimeBackend
from compile_sparse.compiler.pipeline import compilation
from tests.onnxruntime.end_to_end.commands import SMALL, Data
from tests.shell import Shell, shell


def test_an_artifact_can_be_measured_again(compiled: Shell, artifact: Path, data: Data) -> None:
    words = ("verify", artifact, "--eval", f"pl={data.polish}", "--gate", "ppl[pl]<=1000x")
    again = shell(*words)
    assert again.code == 0, again.errors
    report = again.data
    assert set(report["quality"]["slices"]) == {"pl"}
    assert (
        report["quality"]["slices"]["pl"]["samples"] == json.loads(compiled.out)["quality"]["slices"]["pl"]["samples"]
    )
    assert report["performance"]["workload"]["prompt_tokens"] == 8  # what it was compiled with
    assert [gate["gate"] for gate in report["gates"]] == ["ppl[pl]<=1000x"]
    assert json.loads((artifact / "report.json").read_text()) == report


def test_one_changed_byte_is_refused(artifact: Path) -> None:
    file = artifact / "model" / "model.onnx.data"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    found = shell("verify", artifact)
    assert (found.code, found.error["code"]) == (2, "CS1023")
    assert "model.onnx.data" in found.error["why"]


def test_an_existing_artifact_is_replaced_only_by_force(
    compiled: Shell, command: tuple[object, ...], root: Path
) -> None:
    assert compiled.code == 0
    before = (root / "artifact" / "manifest.json").read_bytes()
    found = shell(*command)
    assert (found.code, found.error["code"]) == (2, "CS1020")
    assert "--force" in found.error["hint"]
    assert (root / "artifact" / "manifest.json").read_bytes() == before


def test_a_failed_gate_leaves_artifact_and_report(artifact: Path, command: tuple[object, ...]) -> None:
    """Also: ``--force`` replaces, and the table ends with the path of the report."""
    words = [artifact if str(word).endswith("artifact") else word for word in command]
    gates = ("--gate", "decode_tok_s>=1000x", "--gate", "artifact_bytes<=0.6x")
    found = shell(*words, "--force", *gates, json=False)
    assert found.code == 3
    assert "CS3001" in found.errors
    assert found.out.splitlines()[-1] == str(artifact / "report.json")
    report = json.loads((artifact / "report.json").read_text())
    assert [gate["passed"] for gate in report["gates"]] == [False, True]
    again = shell("verify", artifact)
    assert again.code == 3  # the gates it was compiled with still hold for it
    assert set(again.data["quality"]["slices"]) == set(report["quality"]["slices"])  # measured before, still known
    assert shell("verify", artifact, "--gate", "artifact_bytes<=0.6x").code == 0


def test_a_request_longer_than_the_model_is_refused_before_any_work(
    llama: Path, artifact: Path, tmp_path: Path
) -> None:
    found = shell(llama, "--target", "ort-cpu", "--workload", "prompt=120,output=60", "--out", tmp_path / "o")
    assert (found.code, found.error["code"]) == (2, "CS1040")
    again = shell("verify", artifact, "--workload", "prompt=120,output=60")
    assert (again.code, again.error["code"]) == (2, "CS1040")


def test_an_artifact_whose_manifest_lists_too_little_is_incomplete(artifact: Path) -> None:
    manifest = json.loads((artifact / "manifest.json").read_text())
    del manifest["files"]["source_config.json"]
    (artifact / "source_config.json").unlink()
    (artifact / "manifest.json").write_text(json.dumps(manifest))
    found = shell("verify", artifact)
    assert (found.code, found.error["code"]) == (2, "CS1021")
    assert "source_config.json" in found.error["why"]


def test_an_interrupted_run_leaves_no_artifact_and_resumes(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    words = (llama, "--target", "ort-cpu", "--quantize", "w8a16", *SMALL, "--out", out)

    def interrupted(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    def forbidden(*arguments: Any, **options: Any) -> None:
        raise AssertionError("captured again")

    with monkeypatch.context() as first:
        first.setattr(compilation, "measure", interrupted)
        found = shell(*words)
    assert (found.code, found.error["code"]) == (130, "CS6001")
    assert not out.exists()
    (staged,) = tmp_path.glob(".out.staging-*")
    lowered = (staged / "content" / "model" / "model.onnx.data").stat().st_mtime_ns
    with monkeypatch.context() as second:
        second.setattr(compilation, "capture", forbidden)
        second.setattr(OnnxRuntimeBackend, "write", forbidden)
        found = shell(*words)
    assert found.code == 0, found.out
    assert [section["name"] for section in found.data["passes"]] == ["quantize", "lower"]
    assert (out / "model" / "model.onnx.data").stat().st_mtime_ns == lowered
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_read_only_folder_is_an_environment_failure(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Permission bits do not stop an administrator, so the file system's answer is given here."""
    import errno

    real = os.mkdir

    def mkdir(path: Any, *arguments: Any, **options: Any) -> None:
        if str(path).startswith(str(tmp_path / "readonly")):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        real(path, *arguments, **options)

    (tmp_path / "readonly").mkdir()
    monkeypatch.setattr(os, "mkdir", mkdir)
    found = shell(llama, "--target", "ort-cpu", "--out", tmp_path / "readonly" / "out")
    assert (found.code, found.error["code"]) == (5, "CS5003")
    assert "read-only" in found.error["why"]
