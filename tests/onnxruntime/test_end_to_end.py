"""The whole command line with the real runtime, on tiny random models.

Captures are remembered by folder: they are the slow part, and programs are values. Everything else is what users run.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import transformers as hf
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from compile_sparse.backends.onnxruntime import OnnxRuntimeBackend
from compile_sparse.compiler.capture import ModelFolder, capture
from compile_sparse.compiler.cli.main import run
from compile_sparse.compiler.extension.backend_contract import Lowered
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.ir.weights import ResidentTensor
from compile_sparse.compiler.pipeline import compilation
from compile_sparse.compiler.pipeline import remeasure as verification
from compile_sparse.compiler.planning import plan
from tests.random_weights import randomised

SMALL = ("--workload", "prompt=8,output=4,rounds=3")
CONTEXT = 128


class Shell(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def report(self) -> dict[str, Any]:
        return dict(json.loads(self.out))

    @property
    def error(self) -> dict[str, Any]:
        return dict(json.loads(self.out)["error"])


def shell(*words: object) -> Shell:
    """Run a command line in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run([str(word) for word in words])
    return Shell(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module", autouse=True)
def surroundings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of our own, one thread, and captures remembered by folder."""
    known: dict[tuple[Path, bool], Program] = {}

    def remembered(folder: ModelFolder, *, require_weights: bool = True, **options: Any) -> Program:
        key = (folder.path, require_weights)
        if key not in known:
            known[key] = capture(folder, require_weights=require_weights, **options)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COMPILE_SPARSE_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("OMP_NUM_THREADS", "1")
        for module in (compilation, plan, verification):
            patch.setattr(module, "capture", remembered)
        yield


def byte_tokenizer() -> Tokenizer:
    """One token per byte and a beginning-of-sequence token: 257 ids."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(["<s>", *alphabet])}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return made


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def llama(root: Path) -> Path:
    """A two-layer Llama with a tokenizer."""
    config = hf.LlamaConfig(
        vocab_size=257,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        bos_token_id=0,
        eos_token_id=0,
    )
    folder = root / "llama"
    randomised(hf.LlamaForCausalLM(config)).save_pretrained(folder)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def lines(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


@dataclass(frozen=True)
class Data:
    calibration: Path
    english: Path
    polish: Path


@pytest.fixture(scope="module")
def data(root: Path) -> Data:
    english = ["The quick brown fox jumps over the lazy dog, and nobody minds. " * 3, "Numbers: 1, 2, 3. " * 9]
    polish = ["Zażółć gęślą jaźń; pchnąć w tę łódź jeża lub ośm skrzyń fig. " * 3, "Wąż, żółw i źrebię. " * 8]
    return Data(
        lines(root / "calibration.jsonl", english + polish),
        lines(root / "english.jsonl", english),
        lines(root / "polish.jsonl", polish),
    )


@pytest.fixture(scope="module")
def command(llama: Path, data: Data, root: Path) -> tuple[object, ...]:
    """The command of the first example, but for gates."""
    return (
        *(llama, "--target", "ort-cpu", "--prune", "channels=0.25", "--quantize", "w8a8"),
        *("--calibration", data.calibration, "--sequence-length", 64),
        *("--eval", f"en={data.english}", "--eval", f"pl={data.polish}", *SMALL),
        *("--out", root / "artifact", "--json"),
    )


@pytest.fixture(scope="module")
def compiled(command: tuple[object, ...]) -> Shell:
    """Its first run."""
    return shell(*command, "--gate", "artifact_bytes<=0.6x", "--gate", "worst_slice_ppl<=1000x", "--verify-each")


@pytest.fixture
def artifact(compiled: Shell, root: Path, tmp_path: Path) -> Path:
    """A copy of the artifact to do anything with."""
    assert compiled.code == 0, compiled.err
    return Path(shutil.copytree(root / "artifact", tmp_path / "artifact"))


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
    assert compiled.code == 0, compiled.err
    report = compiled.report
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
    report = compiled.report
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


def test_an_artifact_can_be_measured_again(compiled: Shell, artifact: Path, data: Data) -> None:
    words = ("verify", artifact, "--eval", f"pl={data.polish}", "--gate", "ppl[pl]<=1000x", "--json")
    again = shell(*words)
    assert again.code == 0, again.err
    report = again.report
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
    found = shell("verify", artifact, "--json")
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
    words = [artifact if str(word).endswith("artifact") else word for word in command if word != "--json"]
    found = shell(*words, "--force", "--gate", "decode_tok_s>=1000x", "--gate", "artifact_bytes<=0.6x")
    assert found.code == 3
    assert "CS3001" in found.err
    assert found.out.splitlines()[-1] == str(artifact / "report.json")
    report = json.loads((artifact / "report.json").read_text())
    assert [gate["passed"] for gate in report["gates"]] == [False, True]
    again = shell("verify", artifact, "--json")
    assert again.code == 3  # the gates it was compiled with still hold for it
    assert set(again.report["quality"]["slices"]) == set(report["quality"]["slices"])  # measured before, still known
    assert shell("verify", artifact, "--gate", "artifact_bytes<=0.6x", "--json").code == 0


def test_a_request_longer_than_the_model_is_refused_before_any_work(
    llama: Path, artifact: Path, tmp_path: Path
) -> None:
    found = shell(llama, "--target", "ort-cpu", "--workload", "prompt=120,output=60", "--out", tmp_path / "o", "--json")
    assert (found.code, found.error["code"]) == (2, "CS1040")
    again = shell("verify", artifact, "--workload", "prompt=120,output=60", "--json")
    assert (again.code, again.error["code"]) == (2, "CS1040")


def test_an_artifact_whose_manifest_lists_too_little_is_incomplete(artifact: Path) -> None:
    manifest = json.loads((artifact / "manifest.json").read_text())
    del manifest["files"]["source_config.json"]
    (artifact / "source_config.json").unlink()
    (artifact / "manifest.json").write_text(json.dumps(manifest))
    found = shell("verify", artifact, "--json")
    assert (found.code, found.error["code"]) == (2, "CS1021")
    assert "source_config.json" in found.error["why"]


def test_an_interrupted_run_leaves_no_artifact_and_resumes(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    words = (llama, "--target", "ort-cpu", "--quantize", "w8a16", *SMALL, "--out", out, "--json")

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
        second.setattr(OnnxRuntimeBackend, "lower", forbidden)
        found = shell(*words)
    assert found.code == 0, found.out
    assert [section["name"] for section in found.report["passes"]] == ["quantize", "lower"]
    assert (out / "model" / "model.onnx.data").stat().st_mtime_ns == lowered
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


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
    words = (mute, "--target", "ort-cpu", "--prune", "channels=0.5", "--criterion", "activation", *SMALL, "--json")
    found = shell(
        *words, "--calibration", tokens, "--eval", f"ids={tokens}", "--sequence-length", 32, "--out", tmp_path / "out"
    )
    assert found.code == 0, found.out
    assert found.report["quality"]["slices"]["ids"]["tokens"] == 3 * (31 + 7)
    assert not (tmp_path / "out" / "model" / "tokenizer.json").exists()
    found = shell(*words, "--calibration", data.calibration, "--sequence-length", 32, "--out", tmp_path / "text")
    assert (found.code, found.error["code"]) == (2, "CS1035")


def test_no_data_is_needed(llama: Path, tmp_path: Path) -> None:
    found = shell(llama, "--target", "ort-cpu", "--quantize", "w4a16-g32", *SMALL, "--out", tmp_path / "out", "--json")
    assert found.code == 0, found.out
    assert "quality" not in found.report
    # Nobody said how long evaluation windows are, and the default is longer than this model's context.
    text = lines(tmp_path / "text.jsonl", ["Some text. " * 50])
    again = shell("verify", tmp_path / "out", "--eval", f"en={text}", "--json")
    assert again.code == 0, again.out
    # 550 bytes behind a beginning token: four windows of 128, and a last one of 42 + 1.
    assert again.report["quality"]["slices"]["en"]["tokens"] == 550
    assert found.report["fidelity"]["tokens"] == 8 * 63
    assert found.report["model"]["artifact_bytes"]["compiled"] < found.report["model"]["artifact_bytes"]["baseline"]


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
    found = shell(*words, "--gate", "samples_s>=0.01x", "--out", tmp_path / "out", "--json")
    assert found.code == 0, found.out
    report = found.report
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
    found = shell(*words, "--json")
    assert found.code == 0, found.out
    planned = found.report
    assert planned["parameters"]["baseline"] - planned["parameters"]["compiled"] == 2 * 3 * 32 * 64
    assert planned["bytes"]["compiled"] < planned["bytes"]["baseline"]
    assert planned["refusals"] == []
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    found = shell(tmp_path, "--target", "ort-cpu", "--quantize", "w8a8", "--out", tmp_path / "out", "--json")
    assert (found.code, found.error["code"]) == (4, "CS2003")


def test_zeros_the_runtime_multiplies_are_refused_with_figures(llama: Path, tmp_path: Path) -> None:
    words = (llama, "--target", "ort-cpu", "--sparsity", "2:4", *SMALL, "--out", tmp_path / "out", "--json")
    refusal = shell(*words)
    assert (refusal.code, refusal.error["code"]) == (4, "CS4103")
    assert "50% of" in refusal.error["why"]
    assert "MB" in refusal.error["why"]
    assert "Measured:" in refusal.error["why"]
    assert "--allow-useless" in refusal.error["hint"]
    assert not list(tmp_path.iterdir())
    planned = shell("explain", llama, "--target", "ort-cpu", "--sparsity", "2:4", "--json")
    assert planned.code == 4
    assert [entry["code"] for entry in planned.report["refusals"]] == ["CS4103"]
    found = shell(*words, "--allow-useless")
    assert found.code == 0, found.out
    # The layers' weights are most of the parameters, and half of them are zero.
    assert 0.25 < found.report["model"]["zeros"] < 0.5
    sizes = found.report["model"]["artifact_bytes"]
    assert sizes["compiled"] == pytest.approx(sizes["baseline"], rel=0.01)


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16-g32"])
def test_a_wrong_scale_makes_the_verdict_unverified(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    """The artifact loads and runs, only its logits are another model's. Speed must not be reported as a gain."""
    honest = OnnxRuntimeBackend.lower

    def swapped(backend: OnnxRuntimeBackend, program: Program, *arguments: Any) -> Lowered:
        name = "lm_head.weight.scale"
        if name in program.weights:
            wrong = ResidentTensor(program.weights.load(name).roll(1, 0))
            program = replace(program, weights=program.weights.updated({name: wrong}))
        return honest(backend, program, *arguments)

    words = (llama, "--target", "ort-cpu", "--quantize", scheme, *SMALL, "--gate", "fidelity_top1>=0.97", "--json")
    monkeypatch.setattr(OnnxRuntimeBackend, "lower", swapped)
    found = shell(*words, "--out", tmp_path / "wrong")
    assert found.code == 3
    assert found.report["verdict"] == "unverified"
    assert found.report["fidelity"]["top1_agreement"] < 0.97
    assert "different model" in found.report["verdict_why"]


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
    found = shell(model, "--target", "ort-cpu", "--quantize", "w8a8", "--out", tmp_path / "out", "--json")
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
    found = shell(llama, *target, *given, "--out", tmp_path / "out", "--json")
    assert found.code == code, found.out
    assert found.error["code"] == error or not error
    assert part in json.dumps(found.error, ensure_ascii=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("model", ["./missing", "package.module:factory"])
def test_no_such_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    monkeypatch.chdir(tmp_path)
    found = shell(model, "--target", "ort-cpu", "--json")
    assert found.code == 2
    assert found.error["code"] in ("CS1002", "CS1037")
    assert not list(tmp_path.iterdir())


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
    found = shell(llama, "--target", "ort-cpu", "--out", tmp_path / "readonly" / "out", "--json")
    assert (found.code, found.error["code"]) == (5, "CS5003")
    assert "read-only" in found.error["why"]


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
        "--json",
        "--verify-each",
    )
    assert found.code == 0, found.out
    assert found.report["verdict"] == "unverified"
    assert "performance" not in found.report
    assert {path.name for path in (tmp_path / "out" / "model").iterdir()} == {"program.txt", "weights.safetensors"}
    again = shell("verify", tmp_path / "out", "--json")
    assert (again.code, again.error["code"]) == (5, "CS5007")
    gated = shell(*words, "--sequence-length", 32, "--gate", "decode_tok_s>=1x", "--out", tmp_path / "gated", "--json")
    assert gated.code == 3
    assert gated.report["gates"][0]["passed"] is False
    assert (tmp_path / "gated" / "manifest.json").is_file()
