"""The report of a compilation: every documented key, the right figures, and what no runtime can give."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.onnxruntime.end_to_end.commands import Data
from tests.shell import Shell, shell


def documented() -> dict[str, Any]:
    """Every key of report.json that other tools rely on; leaves are types."""
    latency = {"p50": float, "p95": float, "p99": float}
    speed = {
        "prefill_tok_s": float,
        "decode_tok_s": float,
        "ttft_ms": latency,
        "tpot_ms": latency,
        "peak_rss_bytes": int,
    }
    ratio = {"value": float, "ci95": list}
    one = {
        "ppl_baseline": float,
        "ppl_compiled": float,
        "ratio": float,
        "ci95": list,
        "kl": float,
        "top1_agreement": float,
    }
    return {
        "schema_version": int,
        "target": str,
        "verdict": str,
        "runtime": {"name": str, "version": str, "device": str},
        "model": {
            "parameters": {"baseline": int, "compiled": int},
            "artifact_bytes": {"baseline": int, "compiled": int},
            "zeros": float,
        },
        "passes": list,
        "fidelity": {"tokens": int, "mean_abs_logprob_diff": float, "top1_agreement": float},
        "performance": {
            "workload": {"batch": int, "prompt_tokens": int, "output_tokens": int, "rounds": int},
            "baseline": speed,
            "compiled": speed,
            "ratio": {"prefill_tok_s": ratio, "decode_tok_s": ratio},
        },
        "quality": {"slices": {"en": one, "pl": one}, "worst_slice": str},
        "gates": list,
    }


def missing(found: Any, wanted: Any, path: str = "report") -> list[str]:
    """Where ``found`` lacks a key or has another type."""
    if isinstance(wanted, dict):
        if not isinstance(found, dict):
            return [path]
        return [gap for key in wanted for gap in missing(found.get(key), wanted[key], f"{path}.{key}")]
    return [] if isinstance(found, wanted) else [f"{path}: {found!r}"]


def test_the_report_has_every_documented_key(compiled: Shell, root: Path) -> None:
    assert compiled.code == 0, compiled.errors
    report = compiled.data
    assert missing(report, documented()) == []
    assert json.loads((root / "artifact" / "report.json").read_text()) == report
    assert [section["name"] for section in report["passes"]] == ["prune-channels", "quantize", "lower"]
    for section in report["passes"][:2]:
        gaps = missing(
            section,
            {"requested": dict, "achieved": dict, "seconds": float, "peak_rss_bytes": int, "skips": list},
            section["name"],
        )
        assert gaps == []
    assert report["quality"]["worst_slice"] in ("en", "pl")
    assert [gate["passed"] for gate in report["gates"]] == [True, True]


def test_the_report_has_the_right_figures(compiled: Shell, llama: Path) -> None:
    report = compiled.data
    dense = sum(tensor.numel() for tensor in load_file(llama / "model.safetensors").values())
    removed = 2 * 3 * 32 * 64  # layers, projections, channels (128 to 96), width
    assert report["model"]["parameters"] == {"baseline": dense, "compiled": dense - removed}
    # 64 tokens in each of 8 windows, the first of which nobody predicts.
    assert report["fidelity"]["tokens"] == 8 * 63
    assert report["fidelity"]["top1_agreement"] >= 0.97
    assert report["verdict"] != "unverified"
    measured = report["performance"]
    assert measured["workload"] | {"rounds": 3} == measured["workload"]
    for kind in ("baseline", "compiled"):
        assert 0 < measured[kind]["tpot_ms"]["p50"] <= measured[kind]["tpot_ms"]["p99"]
    for slice_ in report["quality"]["slices"].values():
        assert slice_["ci95"][0] <= slice_["ratio"] <= slice_["ci95"][1]
        assert slice_["ratio"] == pytest.approx(slice_["ppl_compiled"] / slice_["ppl_baseline"])
        assert slice_["kl"] > 0
        assert 0 < slice_["top1_agreement"] < 1


def test_the_manifest_lists_every_file_with_its_digest(compiled: Shell, root: Path) -> None:
    assert compiled.code == 0
    folder = root / "artifact"
    files = json.loads((folder / "manifest.json").read_text())["files"]
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert set(files) == present - {"manifest.json"}
    assert {"model/model.onnx", "model/model.onnx.data", "model/tokenizer.json", "report.json"} <= set(files)
    for name, entry in files.items():
        content = (folder / name).read_bytes()
        assert entry == {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}, name


def test_nothing_of_this_machine_is_in_the_artifact(compiled: Shell, root: Path) -> None:
    assert compiled.code == 0
    for path in (root / "artifact").rglob("*"):
        if path.suffix in (".json", ".onnx"):
            assert str(root).encode() not in path.read_bytes(), path.name


def test_nothing_is_left_beside_the_artifact(compiled: Shell, root: Path) -> None:
    assert compiled.code == 0
    assert not list(root.glob(".artifact.*"))


def test_the_null_target_runs_everything_but_the_model(llama: Path, data: Data, tmp_path: Path) -> None:
    words = (llama, "--target", "null", "--prune", "channels=0.25", "--calibration", data.calibration)
    found = shell(
        *words,
        "--sequence-length",
        32,
        "--eval",
        f"en={data.english}",
        "--out",
        tmp_path / "out",
        "--verify-each",
    )
    assert found.code == 0, found.out
    assert found.data["verdict"] == "unverified"
    assert "performance" not in found.data
    assert {path.name for path in (tmp_path / "out" / "model").iterdir()} == {"program.txt", "weights.safetensors"}
    again = shell("verify", tmp_path / "out")
    assert (again.code, again.error["code"]) == (5, "CS5007")
    gated = shell(*words, "--sequence-length", 32, "--gate", "decode_tok_s>=1x", "--out", tmp_path / "gated")
    assert gated.code == 3
    assert gated.data["gates"][0]["passed"] is False
    assert (tmp_path / "gated" / "manifest.json").is_file()
