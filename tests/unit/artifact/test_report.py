"""The report's keys are an interface: these documents must stay valid, and these must not become so."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError
from rich.console import Console

from compile_sparse.compiler.artifact.report import Report
from compile_sparse.compiler.cli.tables import doctor_table, plan_table, report_table, targets_table

DECODER = {
    "schema_version": 1,
    "target": "ort-cpu",
    "verdict": "faster",
    "runtime": {"name": "onnxruntime", "version": "1", "device": "cpu"},
    "model": {
        "parameters": {"baseline": 10, "compiled": 8},
        "artifact_bytes": {"baseline": 40, "compiled": 8},
        "zeros": 0.0,
    },
    "passes": [
        {
            "name": "prune-channels",
            "requested": {"fraction": 0.25},
            "achieved": {"fraction": 0.25},
            "seconds": 1.0,
            "peak_rss_bytes": 1,
            "skips": [{"where": "a", "code": "CS2104", "why": "b", "hint": "c"}],
        }
    ],
    "fidelity": {"tokens": 10, "mean_abs_logprob_diff": 0.001, "top1_agreement": 1.0},
    "performance": {
        "workload": {"batch": 1, "prompt_tokens": 128, "output_tokens": 64, "rounds": 5},
        "baseline": {
            "prefill_tok_s": 1.0,
            "decode_tok_s": 1.0,
            "ttft_ms": {"p50": 1, "p95": 1, "p99": 1},
            "tpot_ms": {"p50": 1},
            "peak_rss_bytes": 1,
        },
        "compiled": {"prefill_tok_s": 2.0, "decode_tok_s": 2.0},
        "ratio": {
            "prefill_tok_s": {"value": 2.0, "ci95": [1.9, 2.1]},
            "decode_tok_s": {"value": 2.0, "ci95": [1.9, 2.1]},
        },
    },
    "quality": {
        "slices": {
            "en": {
                "ppl_baseline": 10.0,
                "ppl_compiled": 10.2,
                "ratio": 1.02,
                "ci95": [1.0, 1.04],
                "kl": 0.01,
                "top1_agreement": 0.99,
            }
        },
        "worst_slice": "en",
    },
    "gates": [{"gate": "ppl[en]<=1.05x", "value": 1.02, "passed": True}],
}
ENCODER = {
    "target": "ort-cpu",
    "verdict": "unverified",
    "verdict_why": "x",
    "model": {"kind": "encoder", "parameters": {"baseline": 1, "compiled": 1}},
    "fidelity": {"samples": 8, "mean_cosine": 0.999, "max_abs_diff": 0.01},
    "performance": {
        "workload": {"batch": 8, "rounds": 5},
        "baseline": {"samples_s": 1.0},
        "compiled": {"samples_s": 2.0},
        "ratio": {"samples_s": {"value": 2.0, "ci95": [1.0, 3.0]}},
    },
    "quality": {"slices": {"en": {"top1_agreement": 0.9, "mean_cosine": 0.99}}, "worst_slice": "en"},
    "gates": [{"gate": "parameters<=0.5x", "value": None, "passed": False, "why": "Not measured."}],
}

_SPARSITY = {
    "pattern": "2:4",
    "intended": 3,
    "in_graph": {
        "states": {"2:4": 2, "dense": 1},
        "layers": [
            {"node": "a/MatMul_1", "tensor": "w", "dtype": "FLOAT16", "k": 512, "n": 1024, "state": state}
            for state in ("2:4", "2:4", "dense")
        ],
        "unintended": ["z"],
    },
    "profiles": {
        "prefill": {
            "eligible": 2,
            "chosen": 1,
            "kernels": 1,
            "logged_eligible": 5,
            "logged_chosen": 4,
            "layers": [{"node": "a/MatMul_1", "eligible": True, "chosen": False, "kernel": False}],
            "declined": [{"k": 512, "n": 1024, "dtype": "FLOAT16", "layers": 1, "example": "a/MatMul_1"}],
            "twin": {"value": 1.25, "ci95": [1.2, 1.3]},
        },
        "decode": {"chosen": 0},
    },
    "notes": ["TensorRT chose no sparse kernel in profile 'decode'."],
}
SPARSE = {**DECODER, "sparsity": _SPARSITY}
UNVERIFIED = {**DECODER, "sparsity": {"pattern": "2:4", "intended": 3, "unverified": "There is no A100 here."}}


def _contains(whole, part):
    if isinstance(part, dict):
        return all(key in whole and _contains(whole[key], value) for key, value in part.items())
    if isinstance(part, list):
        return len(whole) == len(part) and all(_contains(a, b) for a, b in zip(whole, part, strict=True))
    return whole == part


@pytest.mark.parametrize(
    "document", [DECODER, ENCODER, SPARSE, UNVERIFIED], ids=["decoder", "encoder", "sparse", "unverified"]
)
def test_documents_survive(document):
    assert _contains(json.loads(Report.model_validate(document).as_json()), document)


def test_absent_is_absent_not_null_and_not_zero():
    found = json.loads(Report.model_validate(ENCODER).as_json())
    assert "prefill_tok_s" not in found["performance"]["compiled"]
    assert "runtime" not in found
    assert "profiles" not in json.loads(Report.model_validate(UNVERIFIED).as_json())["sparsity"]
    decode = json.loads(Report.model_validate(SPARSE).as_json())["sparsity"]["profiles"]["decode"]
    assert decode == {"chosen": 0}


@pytest.mark.parametrize(
    "change",
    [
        {"verdict": "great"},
        {"surprise": 1},
        {"model": {"parameters": {"baseline": -1, "compiled": 1}}},
        {"fidelity": {"top1_agreement": 1.5}},
        {"sparsity": {**_SPARSITY, "intended": -1}},
        {"sparsity": {**_SPARSITY, "profiles": {"p": {"chosen": -1}}}},
        {"fidelity": {"mean_abs_logprob_diff": float("nan")}},
    ],
)
def test_wrong_documents(change):
    with pytest.raises(ValidationError):
        Report.model_validate({**DECODER, **change})


def _shown(table):
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table)
    return console.export_text()


def test_tables_of_whole_and_minimal_data():
    assert "perplexity [en]" in _shown(report_table(DECODER))
    assert "agreement with the dense model [en]" in _shown(report_table(DECODER))
    assert "samples/s" in _shown(report_table(ENCODER))
    assert "Not measured." in _shown(report_table(ENCODER))
    assert "refused" in _shown(report_table({"verdict": "refused"}))
    assert "?" in _shown(plan_table({}))
    for table in (targets_table([]), doctor_table([{"target": "[x]", "available": True}])):
        assert _shown(table)
    achieved = {"channels": {"before": 6144, "after": 4608}, "fraction": 0.25}
    assert "channels=6,144 to 4,608" in _shown(plan_table({"passes": [{"name": "p", "achieved": achieved}]}))


def test_scores_and_agreement_stand_beside_each_other():
    scores = {"recall@1": {"baseline": 0.9, "compiled": 0.45}}
    slices = {
        "pairs": {"loss": 2.0, "loss_of": "ndcg@10", "scores": scores, "mean_cosine": 0.75, "rank_agreement": 0.5}
    }
    slices["pairs"]["note"] = "Means were assumed."
    report = {
        **ENCODER,
        "verdict": "quality-lost",
        "quality": {"slices": slices, "worst_slice": "pairs", "max_loss": 1.1},
    }
    assert _contains(json.loads(Report.model_validate(report).as_json()), report)
    rows = {line.split("│")[1].strip(): line for line in _shown(report_table(report)).splitlines() if "│" in line}
    assert [cell.strip() for cell in rows["recall@1 [pairs]"].split("│")[2:5]] == ["0.9000", "0.4500", "0.500x"]
    assert "note: [pairs]: Means were assumed." in _shown(report_table(report))
    assert "cosine 0.7500, rank 0.5000" in rows["agreement with the dense model [pairs]"]


def test_lost_quality_is_red():
    console = Console(width=160, record=True, file=open("/dev/null", "w"), force_terminal=True)  # noqa: SIM115
    console.print(report_table({"verdict": "quality-lost", "verdict_why": "Why."}))
    assert "\x1b[1;31mquality-lost" in console.export_text(styles=True)


def test_markup_in_names_is_text():
    """A model, slice or gate name may contain what rich would read as markup."""
    hostile = "[/bold][link=x]"
    document = {
        **ENCODER,
        "verdict_why": hostile,
        "notes": [hostile],
        "gates": [{"gate": hostile, "passed": True, "why": hostile}],
    }
    document["quality"] = {
        "slices": {hostile: {"ppl_compiled": 1.0}, "b": {"ppl_compiled": 1.0}},
        "worst_slice": hostile,
    }
    assert _shown(report_table(document)).count(hostile) == 5


def test_sparsity_table():
    shown = _shown(report_table(SPARSE))
    rows = {line.split()[1]: line for line in shown.splitlines() if "prefill" in line or "decode " in line}
    cells = [cell.strip() for cell in rows["prefill"].strip("│ ").split("│")]
    assert cells == ["prefill", "3", "2", "2", "1", "1", "1.250x (1.200 to 1.300)"]
    cells = [cell.strip() for cell in rows["decode"].strip("│").split("│")]
    assert cells == ["decode", "3", "2", "unverified", "0", "unverified", ""]
    assert "prefill: 1 of K=512 N=1,024 FLOAT16 stayed dense" in shown
    assert "note: TensorRT chose no sparse kernel" in shown
    shown = _shown(report_table(UNVERIFIED))
    assert shown.count("unverified") == 4
    assert "unverified: There is no A100 here." in shown
    assert "zeros, and what the builder" not in _shown(report_table(DECODER))
