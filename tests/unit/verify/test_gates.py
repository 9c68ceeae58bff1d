"""Gates: grammar, the unfavourable end of an interval, metrics that are missing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compile_sparse.compiler.errors import UsageError
from compile_sparse.compiler.recipes.flags import merge_options
from compile_sparse.compiler.recipes.recipe import Recipe
from compile_sparse.compiler.verify.gates import METRICS, evaluate_gates, parse_gate

REPORT = {
    "verdict_why": "",
    "model": {
        "parameters": {"baseline": 100, "compiled": 80},
        "artifact_bytes": {"baseline": 1000, "compiled": 500},
    },
    "fidelity": {"top1_agreement": 0.995},
    "performance": {
        "baseline": {"decode_tok_s": 100.0, "ttft_ms": {"p50": 10.0}, "peak_rss_bytes": 1000},
        "compiled": {"decode_tok_s": 130.0, "ttft_ms": {"p50": 8.0}, "peak_rss_bytes": 700},
        "ratio": {"decode_tok_s": {"value": 1.3, "ci95": [1.1, 1.5]}, "samples_s": {"value": 2.0, "ci95": [1.9, 2.1]}},
    },
    "quality": {
        "slices": {
            "en": {"ppl_compiled": 10.2, "ratio": 1.02, "ci95": [1.0, 1.06], "kl": 0.01, "top1_agreement": 0.9},
            "pl": {"ppl_compiled": 21.0, "ratio": 1.2, "ci95": [1.1, 1.3], "kl": 0.05, "top1_agreement": 0.8},
        }
    },
}
PAIRS = {
    "quality": {
        "slices": {
            "pairs": {
                "loss": 1.25,
                "mean_cosine": 0.97,
                "rank_agreement": 0.9,
                "scores": {"recall@1": {"baseline": 0.8, "compiled": 0.6}, "mrr": {"baseline": 0.9, "compiled": 0.9}},
            },
            "labels": {"loss": 1.02, "scores": {"accuracy@5": {"baseline": 0.5, "compiled": 0.49}}, "logit_error": 0.1},
        }
    },
}


@pytest.mark.parametrize(
    ("gate", "value", "bound", "passed"),
    [
        ("decode_tok_s>=1.1x", 1.3, 1.1, True),
        ("decode_tok_s>=1.2x", 1.3, 1.1, False),  # the estimate would pass, its lower bound does not
        ("decode_tok_s<=1.4x", 1.3, 1.5, False),
        ("decode_tok_s>=130", 130.0, 130.0, True),
        ("samples_s >= 1.9x", 2.0, 1.9, True),
        ("ttft_ms[p50]<=8", 8.0, 8.0, True),
        ("ttft_ms[p50]<=0.8x", 0.8, 0.8, True),
        ("ppl[en]<=1.05x", 1.02, 1.02, True),
        ("ppl[en]<=10", 10.2, 10.2, False),
        ("ppl[pl]<=1.05x", 1.2, 1.2, False),
        ("worst_slice_ppl<=1.1x", 1.2, 1.2, False),
        ("worst_slice_ppl<=1.2x", 1.2, 1.2, True),
        ("kl[pl]<=0.1", 0.05, 0.05, True),
        ("top1[pl]>=0.85", 0.8, 0.8, False),
        ("artifact_bytes<=0.6x", 0.5, 0.5, True),
        ("artifact_bytes<=499", 500.0, 500.0, False),
        ("parameters<=0.9x", 0.8, 0.8, True),
        ("fidelity_top1>=0.99", 0.995, 0.995, True),
        ("peak_rss_bytes<=0.8x", 0.7, 0.7, True),
    ],
)
def test_judgement(gate, value, bound, passed):
    (result,) = evaluate_gates([gate], REPORT)
    assert result["gate"] == gate.strip()
    assert result["value"] == pytest.approx(value)
    assert result["bound"] == pytest.approx(bound)
    assert result["passed"] is passed
    assert result["why"].endswith(".")


@pytest.mark.parametrize(
    ("gate", "value", "passed"),
    [
        ("recall@1[pairs]>=0.6", 0.6, True),
        ("recall@1[pairs]>=0.98x", 0.75, False),
        ("mrr[pairs]>=0.98x", 1.0, True),
        ("accuracy@5[labels]>=0.98x", 0.98, True),
        ("cosine[pairs]>=0.96", 0.97, True),
        ("rank_agreement[pairs]>=0.95", 0.9, False),
        ("logit_error[labels]<=0.1", 0.1, True),
        ("loss[labels]<=1.1x", 1.02, True),
        ("worst_slice_loss<=1.1x", 1.25, False),
        ("recall@5[pairs]>=0.1", None, False),
        ("ndcg@10[labels]>=0.1x", None, False),
    ],
)
def test_scores_of_data_are_gated(gate, value, passed):
    (result,) = evaluate_gates([gate], PAIRS)
    assert result["value"] == (None if value is None else pytest.approx(value))
    assert result["passed"] is passed


def test_a_failure_by_its_bound_says_so():
    (result,) = evaluate_gates(["decode_tok_s>=1.2x"], REPORT)
    assert "1.3x (95 % interval 1.1x to 1.5x)" in result["why"]
    assert "unfavourable end, 1.1x" in result["why"]


@pytest.mark.parametrize("name", sorted(METRICS))
@pytest.mark.parametrize("report", [{}, {"performance": None, "quality": None, "fidelity": None}])
def test_missing_metrics_fail_with_a_reason(name, report):
    selectors = METRICS[name].selectors
    selector = "" if selectors is None else f"[{(selectors or ('en',))[0]}]"
    (result,) = evaluate_gates([f"{name}{selector}<=1000"], {**report, "verdict_why": "No such hardware here."})
    assert result == {
        "gate": f"{name}{selector}<=1000",
        "value": None,
        "bound": None,
        "passed": False,
        "why": "Not measured: No such hardware here.",
    }


def test_nan_never_passes():
    report = {"fidelity": {"top1_agreement": float("nan")}}
    assert not evaluate_gates(["fidelity_top1<=2"], report)[0]["passed"]
    slices = {"en": {"ratio": 1.0}, "broken": {"ratio": float("nan")}}
    assert not evaluate_gates(["worst_slice_ppl<=1.1x"], {"quality": {"slices": slices}})[0]["passed"]
    slices["broken"] = {"tokens": 5}
    assert not evaluate_gates(["worst_slice_ppl<=1.1x"], {"quality": {"slices": slices}})[0]["passed"]


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("decode_tok_s", "form"),
        ("decode_tok_s>1.2x", "form"),
        ("decode_tok_s>=-1x", "form"),
        ("decode_tok_s>=1.2xx", "form"),
        ("decode_toks>=1.2x", "Did you mean 'decode_tok_s'?"),
        ("decode_tok_s[p50]>=1.2x", "nothing in brackets"),
        ("ttft_ms<=3", "needs brackets: ttft_ms[p50]"),
        ("ttft_ms[p42]<=3", "p50, p95, p99"),
        ("ppl<=1x", "ppl[SLICE]"),
        ("fidelity_top1>=0.99x", "without 'x'"),
        ("sparse_layers>=1x", "counts layers, and a dense baseline has none; write the number without 'x'"),
        ("sparse_layers[decode]>=1", "nothing in brackets"),
        ("decode_tok_s>=1e999x", "finite"),
    ],
)
def test_grammar_errors(text, part):
    with pytest.raises(UsageError, match="CS1011") as caught:
        parse_gate(text)
    assert part in str(caught.value)


@given(st.text(max_size=40))
def test_any_text_is_a_gate_or_a_usage_error(text):
    try:
        parse_gate(text)
    except UsageError as error:
        assert error.code == "CS1011"


def _sparsity(*profiles):
    return {"sparsity": {"profiles": {str(index): profile for index, profile in enumerate(profiles)}}}


@pytest.mark.parametrize(
    ("profiles", "value"),
    [
        ([{"chosen": 140}], 140),
        ([{"chosen": 140, "kernels": 7}], 7),
        ([{"chosen": 140}, {"chosen": 3}], 3),  # the profile with the fewest counts
        ([{"chosen": 140}, {"chosen": 0, "kernels": 9}], 0),
        ([{"kernels": 12}, {"chosen": 140}], 12),  # the log named no layers, the engine's kernels are known
        ([{"chosen": 140}, {}], None),  # half an answer is none
        ([], None),
    ],
)
def test_sparse_layers(profiles, value):
    enough, too_few = evaluate_gates(["sparse_layers>=1", "sparse_layers>=141"], _sparsity(*profiles))
    assert enough["value"] == value
    assert enough["passed"] is (value is not None and value >= 1)
    assert too_few["passed"] is False
    assert too_few["why"].startswith("Not measured" if value is None else f"Measured {value}")


def test_unverified_sparsity_fails_with_its_own_reason():
    report = {"verdict_why": "Something else.", "sparsity": {"unverified": "There is no A100 here."}}
    (result,) = evaluate_gates(["sparse_layers>=1"], report)
    assert (result["passed"], result["value"], result["why"]) == (False, None, "Not measured: There is no A100 here.")


def test_require_sparse_is_a_gate():
    recipe = Recipe(gates=("kl[en]<=1",), evaluation={"slices": {"en": "en.jsonl"}})
    merged = merge_options(recipe, require_sparse=100, gates=["top1[en]>=0.5"])
    assert merged.gates == ("kl[en]<=1", "top1[en]>=0.5", "sparse_layers>=100")
    assert merge_options(recipe).gates == recipe.gates


@pytest.mark.parametrize("value", [0, -1, 2.5, True, "3"])
def test_require_sparse_needs_a_count(value):
    with pytest.raises(UsageError, match="CS1004") as caught:
        merge_options(require_sparse=value)
    assert caught.value.where == "--require-sparse"
