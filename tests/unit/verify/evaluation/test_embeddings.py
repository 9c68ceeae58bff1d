"""Embeddings of both models: what is alike, what is retrieved, and models that are broken in known ways."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from compile_sparse.compiler.artifact.report import Change, ModelSection, Report
from compile_sparse.compiler.verify.evaluation.embeddings import Pairs, Sentences
from compile_sparse.compiler.verify.evaluation.pooling import Pooling
from compile_sparse.compiler.verify.gates import evaluate_gates
from compile_sparse.compiler.verify.quality import quality_of
from compile_sparse.compiler.verify.quality_verdict import with_quality
from tests.unit.verify.evaluation.fakes import encoded, measured

DRAWS = np.random.default_rng(0)
TABLE = DRAWS.standard_normal((400, 16))
COUNT = 20
QUERIES = tuple(encoded(100 + i, 101 + i) for i in range(0, 2 * COUNT, 2))
DOCUMENTS = tuple(encoded(100 + i, 101 + i, 200 + i) for i in range(0, 2 * COUNT, 2))
"""Document i has the tokens of query i and one more."""


def dense(feeds: Mapping[str, Any]) -> dict[str, Any]:
    return {"last_hidden_state": TABLE[feeds["input_ids"]]}


def noisy(size: float) -> Any:
    table = TABLE + size * np.random.default_rng(1).standard_normal(TABLE.shape)
    return lambda feeds: {"last_hidden_state": table[feeds["input_ids"]]}


def shuffled(feeds: Mapping[str, Any]) -> dict[str, Any]:
    """Every token of a query has the vector of its neighbour's; documents, which are longer, are right."""
    ids = feeds["input_ids"]
    moved = np.where((ids >= 100) & (ids < 200), 100 + (ids - 100 + 2) % (2 * COUNT), ids)
    return {"last_hidden_state": TABLE[moved if ids.shape[1] == 4 else ids]}


def report(slice_: Any) -> Report:
    sizes = ModelSection(parameters=Change(baseline=2, compiled=1))
    quality = quality_of({"x": slice_}, 1.1)
    return Report(target="t", verdict="faster", verdict_why="Measured 2x.", model=sizes, quality=quality)


def test_the_same_model_finds_the_same() -> None:
    found = measured(Pairs(QUERIES, DOCUMENTS, Pooling()), dense)
    assert found.scores is not None
    assert found.scores["recall@1"].baseline == found.scores["recall@1"].compiled > 0.9
    assert set(found.scores) == {"recall@1", "recall@5", "recall@10", "mrr", "ndcg@10", "dense_index_recall@1"}
    assert (found.loss, found.loss_of) == (pytest.approx(1.0), "ndcg@10")
    assert found.mean_cosine == pytest.approx(1.0)
    assert found.rank_agreement == pytest.approx(1.0)
    assert found.samples == COUNT


def test_recall_is_that_of_a_search_by_hand() -> None:
    found = measured(Pairs(QUERIES, DOCUMENTS, Pooling()), dense, noisy(1.0))
    table = TABLE + np.random.default_rng(1).standard_normal(TABLE.shape)
    hits = 0
    for place, query in enumerate(QUERIES):
        vector = table[list(query.ids)].mean(0)
        others = [table[list(document.ids)].mean(0) for document in DOCUMENTS]
        alike = [vector @ o / np.linalg.norm(vector) / np.linalg.norm(o) for o in others]
        hits += int(np.argmax(alike)) == place
    assert found.scores is not None
    assert found.scores["recall@1"].compiled == pytest.approx(hits / COUNT)
    assert found.scores["recall@1"].compiled < 1


def test_shuffled_embeddings_lose_recall_and_fail_gates() -> None:
    found = measured(Pairs(QUERIES, DOCUMENTS, Pooling()), dense, shuffled)
    assert found.scores is not None
    assert found.scores["recall@1"].compiled < 0.2 < 0.9 < found.scores["recall@1"].baseline
    assert found.scores["dense_index_recall@1"].compiled < 0.2
    judged = with_quality(report(found))
    assert judged.verdict == "quality-lost"
    assert "ndcg@10 on [x] went from" in judged.verdict_why
    data = judged.model_dump(mode="json")
    gates = evaluate_gates(["recall@1[x]>=0.98x", "mrr[x]>=0.98x", "dense_index_recall@1[x]>=0.9"], data)
    assert not any(gate["passed"] for gate in gates)


def test_a_rotated_space_finds_as_well_but_not_in_a_dense_index() -> None:
    """Recall of its own index cannot tell, the cosine and the dense index do."""
    rotation, _ = np.linalg.qr(DRAWS.standard_normal((16, 16)))

    def turned(feeds: Mapping[str, Any]) -> dict[str, Any]:
        return {"last_hidden_state": TABLE[feeds["input_ids"]] @ rotation}

    found = measured(Pairs(QUERIES, DOCUMENTS, Pooling()), dense, turned)
    assert found.scores is not None
    assert found.scores["recall@1"].compiled == found.scores["recall@1"].baseline
    assert found.rank_agreement == pytest.approx(1.0)
    assert abs(found.mean_cosine or 0) < 0.5
    assert found.scores["dense_index_recall@1"].compiled < 0.5


def test_a_document_in_two_lines_is_one_document() -> None:
    """Otherwise its copies would push each other down."""
    again = Pairs((QUERIES[0], QUERIES[1], QUERIES[2]), (DOCUMENTS[0], DOCUMENTS[0], DOCUMENTS[2]), Pooling())
    assert again.samples == 3 + 2
    found = measured(again, dense)
    assert found.scores is not None
    assert found.scores["recall@1"].baseline >= 2 / 3


@pytest.mark.parametrize(("noise", "least"), [(0.05, 0.99), (0.3, 0.9), (3.0, 0.0)])
def test_sentences_are_judged_by_their_cosine(noise: float, least: float) -> None:
    found = measured(Sentences(DOCUMENTS, Pooling()), dense, noisy(noise))
    assert found.mean_cosine is not None
    assert least <= found.mean_cosine < 1
    assert found.loss == pytest.approx(1 / found.mean_cosine)
    assert found.rank_agreement is not None
    assert (found.rank_agreement > 0.85) is (noise < 1)


def test_no_numbers_are_lost_quality() -> None:
    found = measured(
        Sentences(DOCUMENTS, Pooling()),
        dense,
        lambda feeds: {"last_hidden_state": 0 * dense(feeds)["last_hidden_state"] * np.nan},
    )
    assert (found.loss, found.loss_of) == (None, "cosine")
    assert with_quality(report(found)).verdict == "quality-lost"


def test_what_had_to_be_assumed_is_said() -> None:
    assert measured(Sentences(DOCUMENTS, Pooling(assumed="Means.")), dense).note == "Means."


def test_texts_of_one_length_run_together_without_padding() -> None:
    lengths = []

    def watched(feeds: Mapping[str, Any]) -> dict[str, Any]:
        lengths.append(feeds["input_ids"].shape)
        assert feeds["attention_mask"].all()
        assert "token_type_ids" not in feeds  # the model takes none
        return dense(feeds)

    measured(Pairs(QUERIES, DOCUMENTS, Pooling()), watched)
    assert {shape[1] for shape in lengths} == {4, 5}
    assert max(shape[0] for shape in lengths) == 8
