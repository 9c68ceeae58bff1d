"""Scores of retrieval and classification, from 0 to 1, more is better. Pure functions of arrays.

They are what scikit-learn calls ``f1_score(average="macro")``, ``roc_auc_score(multi_class="ovr")`` and ``ndcg_score``, and SciPy
``spearmanr``, in a few lines of numpy.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["accuracy", "auc", "macro_f1", "mrr", "ndcg", "ranks", "recall", "relevant_ranks", "spearman", "top_k"]

Array = NDArray[Any]


def accuracy(labels: Array, predicted: Array) -> float:
    """Share of equal elements of ``[N]`` and ``[N]``."""
    return float((labels == predicted).mean())


def top_k(labels: Array, logits: Array, k: int) -> float:
    """Share of ``labels [N]`` among the ``k`` largest of ``logits [N, C]``; a label that ties with the ``k``-th place is not."""
    own = np.take_along_axis(logits, labels[:, None], axis=1)
    better = (logits >= own).sum(axis=1) - 1
    return float((better < k).mean())


def macro_f1(labels: Array, predicted: Array) -> float:
    """F1 of every class that occurs among ``labels [N]`` or ``predicted [N]``, averaged."""
    found = []
    for kind in np.unique(np.concatenate([labels, predicted])):
        own, said = labels == kind, predicted == kind
        found.append(2 * (own & said).sum() / (own.sum() + said.sum()))
    return float(np.mean(found))


def auc(labels: Array, scores: Array) -> float | None:
    """Area under the ROC curve: how often a sample of a class scores higher than one of another; ties count half.

    Args:
        labels: ``[N]``, classes from 0.
        scores: ``[N]`` of class 1 against class 0, or ``[N, C]``: each class against the others, averaged over those that have
            both. None when no class has.
    """
    if scores.ndim == 1:
        return _area(labels == 1, scores)
    areas = [_area(labels == kind, scores[:, kind]) for kind in range(scores.shape[1])]
    known = [area for area in areas if area is not None]
    return float(np.mean(known)) if known else None


def _area(positive: Array, scores: Array) -> float | None:
    count, others = int(positive.sum()), int((~positive).sum())
    if not count or not others:
        return None
    return float((ranks(scores)[positive].sum() - count * (count + 1) / 2) / (count * others))


def ranks(values: Array) -> NDArray[np.float64]:
    """Rank of every element of ``[N]`` from 1, the smallest first; equal ones share their mean rank."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    shared: NDArray[np.float64] = (last - (counts - 1) / 2)[places]
    return shared


def spearman(left: Array, right: Array) -> float:
    """Correlation of the ranks of ``[N]`` and ``[N]``; of constants 1 when both are constant and 0 otherwise."""
    a, b = (each - each.mean() for each in (ranks(left), ranks(right)))
    norm = float(np.sqrt((a * a).sum() * (b * b).sum()))
    if norm == 0:
        return float(not a.any() and not b.any())
    return float((a * b).sum() / norm)


def relevant_ranks(similarity: Array, relevant: Array) -> list[Array]:
    """Per query, the places from 1 of its relevant documents, best first.

    Args:
        similarity: ``[Q, D]``. Among equal ones the relevant documents come last: a model that cannot tell documents apart has
            found none.
        relevant: ``[Q, D]``, booleans, at least one per query.
    """
    found = []
    for row, wanted in zip(similarity, relevant, strict=True):
        order = np.lexsort((wanted, -row))
        found.append(1 + np.flatnonzero(wanted[order]))
    return found


def recall(places: list[Array], k: int) -> float:
    """Share of a query's relevant documents in its first ``k`` places, averaged over queries; see ``relevant_ranks``."""
    return float(np.mean([(each <= k).sum() / len(each) for each in places]))


def mrr(places: list[Array]) -> float:
    """Mean of one over the place of the first relevant document."""
    return float(np.mean([1 / each[0] for each in places]))


def ndcg(places: list[Array], k: int) -> float:
    """Normalised discounted cumulative gain of the first ``k`` places, relevance 0 or 1, averaged over queries."""
    found = []
    for each in places:
        gain = (1 / np.log2(1 + each[each <= k])).sum()
        best = (1 / np.log2(2 + np.arange(min(k, len(each))))).sum()
        found.append(gain / best)
    return float(np.mean(found))
