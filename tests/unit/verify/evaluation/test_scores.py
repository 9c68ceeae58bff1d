"""Scores against scikit-learn 1.9.1 and SciPy 1.17.1 (their results are written here), and against counting by hand."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from compile_sparse.compiler.verify.evaluation import scores

LABELS = np.array([0, 1, 2, 2, 1, 0, 2, 1, 0, 0, 2, 1])
SAID = np.array([0, 1, 2, 1, 1, 0, 0, 1, 2, 0, 2, 2])
LOGITS = np.array([
    [0.0, 0.3, -0.3], [-0.9, -0.5, -1.0], [0.1, 1.3, -0.5], [-0.6, 0.5, 0.4], [0.1, -0.9, -0.0], [0.7, -1.3, -0.5],
    [-1.9, -1.3, -1.8], [-0.2, -1.3, 0.3], [0.2, -0.2, -2.5], [-0.5, -0.0, 0.1], [-1.5, -0.5, -1.0], [-0.8, 1.1, -0.8],
])  # fmt: skip
SIMILARITY = np.array([
    [-0.03, 0.88, -0.58, -0.11, 0.11, 0.06, -1.23, 0.08, 1.36, -1.55, 0.86, 0.12],
    [-0.64, 2.0, 0.76, -1.2, 0.07, 0.58, -0.19, 0.68, -0.07, 0.67, 1.44, -0.68],
    [0.2, -0.46, 0.13, -1.19, -0.58, -0.2, 0.9, 1.15, -1.32, -0.79, 0.65, -1.99],
])  # fmt: skip
RELEVANT = np.zeros((3, 12), bool)
RELEVANT[[0, 1, 1, 1, 2], [2, 4, 5, 11, 0]] = True


def test_classification_is_scikit_learns() -> None:
    shares = np.exp(LOGITS) / np.exp(LOGITS).sum(axis=1, keepdims=True)
    assert scores.accuracy(LABELS, SAID) == pytest.approx(0.6666666666666666)
    assert scores.macro_f1(LABELS, SAID) == pytest.approx(0.6666666666666666)
    assert scores.auc(LABELS, shares) == pytest.approx(0.59375)
    assert scores.auc((LABELS == 1).astype(int), LOGITS[:, 1]) == pytest.approx(0.390625)
    assert scores.top_k(LABELS, LOGITS, 2) == pytest.approx(0.6666666666666666)


def test_f1_by_hand() -> None:
    """Class 0: 2 right of 2 wanted and 3 said, 0.8; class 1: 1 of 2 and 1, 2/3."""
    assert scores.macro_f1(np.array([0, 0, 1, 1]), np.array([0, 0, 0, 1])) == pytest.approx((0.8 + 2 / 3) / 2)


def test_area_by_counting_pairs() -> None:
    positive, values = np.array([1, 0, 1, 0, 0]), np.array([0.5, 0.5, 0.9, 0.1, 0.7])
    pairs = product(values[positive == 1], values[positive == 0])
    counted = [1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs]
    assert scores.auc(positive, values) == pytest.approx(np.mean(counted))
    assert scores.auc(np.zeros(5, int), values) is None


def test_rank_correlation_is_scipys() -> None:
    a, b = np.array([1.0, 2, 2, 3, 5, 4, 4, 7]), np.array([2.0, 1, 3, 3, 3, 9, 8, 7])
    assert scores.spearman(a, b) == pytest.approx(0.666717477738473)
    assert scores.ranks(a).tolist() == [1, 2.5, 2.5, 4, 7, 5.5, 5.5, 8]
    assert scores.spearman(a, -a) == pytest.approx(-1.0)
    assert scores.spearman(a, np.ones(8)) == 0.0


def test_gain_is_scikit_learns() -> None:
    places = scores.relevant_ranks(SIMILARITY, RELEVANT)
    assert scores.ndcg(places, 10) == pytest.approx(0.3477760271216895)
    assert scores.ndcg(places, 5) == pytest.approx(0.14355885269113097)


def test_retrieval_by_hand() -> None:
    similarity = np.array([[0.9, 0.8, 0.1], [0.2, 0.5, 0.7]])
    places = scores.relevant_ranks(similarity, np.array([[True, False, True], [False, True, False]]))
    assert [each.tolist() for each in places] == [[1, 3], [2]]
    assert scores.recall(places, 1) == pytest.approx((0.5 + 0) / 2)
    assert scores.recall(places, 2) == pytest.approx((0.5 + 1) / 2)
    assert scores.mrr(places) == pytest.approx((1 + 0.5) / 2)


def test_what_cannot_tell_documents_apart_has_found_none() -> None:
    places = scores.relevant_ranks(np.ones((4, 4)), np.eye(4, dtype=bool))
    assert scores.recall(places, 1) == 0.0
    assert scores.recall(places, 4) == 1.0
    assert scores.top_k(np.arange(4), np.ones((4, 4)), 1) == 0.0
