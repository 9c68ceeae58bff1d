"""Every option reaches the API, results go to stdout, and the last line is the report's path."""

from __future__ import annotations

import inspect
import json

import pytest


def test_compile_is_the_default_command(api, shell):
    for words in (("M",), ("compile", "M")):
        code, out, _ = shell(*words, "--target", "null")
        assert code == 0
        assert out.splitlines()[-1] == "out/report.json"
    assert shell("--target", "null", "M")[0] == 0
    assert [call[0] for call in api.calls] == ["compile"] * 3
    assert all(call[1] == ("M",) for call in api.calls)


def test_every_option_arrives(api, shell):
    code, _, err = shell(
        *("M", "--target", "T", "--recipe", "R", "--prune", "channels=0.25", "--prune", "heads=0.5"),
        *(
            "--criterion",
            "wanda",
            "--allocation",
            "global",
            "--sparsity",
            "2:4",
            "--low-rank",
            "0.3",
            "--quantize",
            "w8a8",
            "--quantizer",
            "gptq",
        ),
        *(
            "--calibration",
            "c",
            "--calibration-samples",
            "4",
            "--sequence-length",
            "32",
            "--bos",
            "never",
            "--eval",
            "en=e",
            "--eval",
            "pl=p",
        ),
        *("--kv-cache", "fp8", "--concurrency", "1,8", "--tensor-parallel", "2"),
        *("--precision", "bf16", "--image-size", "64x96"),
        *("--max-length", "64", "--engine", "none", "--emit", "triton", "--require-sparse", "3"),
        *(
            "--max-quality-loss",
            "1.2x",
            "--workload",
            "prompt=8",
            "--gate",
            "decode_tok_s>=1.2x",
            "--gate",
            "ppl[en]<=1.1x",
            "--out",
            "O",
        ),
        *("--no-verify", "--seed", "3", "--force", "--allow-useless", "--verify-each"),
    )
    assert code == 0, err
    ((_, _, options),) = api.calls
    assert options.pop("progress") is not None
    assert options == {
        "target": "T",
        "recipe": "R",
        "prune": {"channels": 0.25, "heads": 0.5},
        "criterion": "wanda",
        "allocation": "global",
        "sparsity": "2:4",
        "low_rank": 0.3,
        "quantize": "w8a8",
        "quantizer": "gptq",
        "kv_cache": "fp8",
        "concurrency": "1,8",
        "tensor_parallel": 2,
        "precision": "bf16",
        "image_size": "64x96",
        "max_length": 64,
        "engine": "none",
        "emit": ("triton",),
        "require_sparse": 3,
        "calibration": "c",
        "calibration_samples": 4,
        "sequence_length": 32,
        "bos": "never",
        "eval": {"en": "e", "pl": "p"},
        "max_quality_loss": "1.2x",
        "workload": "prompt=8",
        "gates": ("decode_tok_s>=1.2x", "ppl[en]<=1.1x"),
        "out": "O",
        "verify": False,
        "seed": 3,
        "force": True,
        "allow_useless": True,
        "verify_each": True,
    }


def test_options_left_out_are_none(api, shell):
    shell("M", "--target", "T")
    ((_, _, options),) = api.calls
    given = {name for name, value in options.items() if value not in (None, (), False)}
    assert given == {"target", "verify", "progress"}


@pytest.mark.parametrize("command", ["compile", "explain", "verify"])
def test_the_real_api_accepts_what_the_command_line_sends(api, shell, command):
    real = _real_api()
    words = ["A"] if command == "verify" else ["M", "--target", "null"]
    assert shell(command, *words)[0] == 0
    (_, positional, options) = api.calls[-1]
    inspect.signature(getattr(real, command)).bind(*positional, **options)


def _real_api():
    """The real module, beside the fake that stands in ``sys.modules``."""
    import importlib.util

    spec = importlib.util.find_spec("compile_sparse")
    assert spec is not None
    assert spec.submodule_search_locations
    path = f"{next(iter(spec.submodule_search_locations))}/api.py"
    found = importlib.util.spec_from_file_location("real_api", path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def test_table_shows_what_people_decide_on(api, shell):
    _, out, _ = shell("M", "--target", "null")
    for part in (
        "faster",
        "1.300x (1.200 to 1.400)",
        "perplexity [en]",
        "0.800x",
        "passed",
        "CS2104",
        "It is [frozen].",
        "99.90%",
    ):
        assert part in out, part


def test_json_is_the_report_alone(api, shell):
    _, out, _ = shell("M", "--target", "null", "--json")
    assert json.loads(out) == api.result.report


def test_explain(api, shell):
    code, out, _ = shell("explain", "M", "--target", "null", "--prune", "channels=0.5")
    assert code == 0
    assert "expected size" in out
    assert "0.750x" in out
    assert json.loads(shell("explain", "M", "--target", "null", "--json")[1]) == api.plan
    assert "verify" not in api.calls[0][2]


def test_explain_of_what_compile_would_refuse_exits_4(api, shell):
    refusal = {"where": "--sparsity 2:4", "code": "CS4001", "why": "Zeros are multiplied.", "hint": "Prune channels."}
    api.plan = {**api.plan, "refusals": [refusal]}
    code, out, _ = shell("explain", "M", "--target", "null")
    assert code == 4
    assert "Zeros are multiplied." in out


def test_verify(api, shell):
    code, out, _ = shell(
        *("verify", "A", "--eval", "en=e", "--workload", "batch=2", "--concurrency", "2,4"),
        *("--gate", "parameters<=1x", "--model", "M", "--max-quality-loss", "2x"),
    )
    assert code == 0
    assert out.splitlines()[-1] == "out/report.json"
    ((_, (artifact,), options),) = api.calls
    assert str(artifact) == "A"
    options.pop("progress")
    assert options == {
        "eval": {"en": "e"},
        "max_quality_loss": "2x",
        "workload": "batch=2",
        "concurrency": "2,4",
        "gates": ("parameters<=1x",),
        "model": "M",
        "allow_foreign_engine": None,
    }


def test_doctor(api, shell):
    code, out, _ = shell("doctor")
    assert code == 0
    assert "No runtime." in out
    assert json.loads(shell("doctor", "--json")[1])[0]["available"] is False


def test_targets(shell):
    code, out, _ = shell("targets")
    assert code == 0
    assert "ort-cpu" in out
    assert {"null", "ort-cpu"} <= {target["name"] for target in json.loads(shell("targets", "--json")[1])}
    code, out, _ = shell("targets", "show", "ort-cpu")
    assert code == 0
    assert "alignment: 32" in out
    assert json.loads(shell("targets", "show", "ort-cpu", "--json")[1])["backend"] == "onnxruntime"
